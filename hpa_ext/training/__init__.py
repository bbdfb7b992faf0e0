"""A plain training loop, LoRA on the language model, and the settings of the demo."""

from .demo_settings import DemoSettings
from .loop import TrainingLog, TrainingSettings, train

__all__ = ["DemoSettings", "TrainingLog", "TrainingSettings", "train"]
