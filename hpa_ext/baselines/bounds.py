"""The bounds: what tuning alone does, in sequence, on all tasks at once, or not at all."""

from __future__ import annotations

from .registry import Method, register

register(Method("zero-shot", "Zero-shot (aligned model)", "bound", None, "no tuning"))
register(Method("multi-task", "Multi-task", "bound", None, "one tuning on all tasks at once"))
register(Method("seqft", "SeqFT", "bound", None, "LoRA, merged after each step"))
