"""The closed-form compromise between a model before and after a tuning step, for layers, models and adapters."""

from hpa_ext.compromise.adapter import harmonize_adapter
from hpa_ext.compromise.config import CompromiseConfig
from hpa_ext.compromise.earlier import add_task_, sum_gram_files, sum_of_tasks
from hpa_ext.compromise.layer import harmonize, harmonize_
from hpa_ext.compromise.model import harmonize_model
from hpa_ext.compromise.report import CompromiseLayerReport, CompromiseReport

__all__ = [
    "CompromiseConfig",
    "CompromiseLayerReport",
    "CompromiseReport",
    "add_task_",
    "harmonize",
    "harmonize_",
    "harmonize_adapter",
    "harmonize_model",
    "sum_gram_files",
    "sum_of_tasks",
]

TAKES_EARLIER_GRAMS = True
"""Whether its functions have the argument `earlier`."""
