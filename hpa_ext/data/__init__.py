"""Samples, toy tasks, collation and safety sets."""

from .collate import calibration_batches, collate_prompts, collate_training
from .safety_set import SafetySet, collect_safety_set
from .samples import Sample

__all__ = [
    "SafetySet",
    "Sample",
    "calibration_batches",
    "collate_prompts",
    "collate_training",
    "collect_safety_set",
]
