"""Harmonized adapters on a model in memory: loading, merging, several steps as one."""

from hpa_ext.adapters.load import load_adapter, merge_adapter
from hpa_ext.checkpoints.compose import compose_adapters

__all__ = ["compose_adapters", "load_adapter", "merge_adapter"]
