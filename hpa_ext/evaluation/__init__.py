"""Generation and metrics."""

from .generate import generate_answers
from .metrics import DEFAULT_REFUSALS, RefusalList, SafetyScore, accuracy, attack_success_rate, safety_score

__all__ = [
    "DEFAULT_REFUSALS",
    "RefusalList",
    "SafetyScore",
    "accuracy",
    "attack_success_rate",
    "generate_answers",
    "safety_score",
]
