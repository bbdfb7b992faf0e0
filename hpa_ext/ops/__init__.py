"""The six operations: checks, dispatch to the native kernels, and torch.library registration.

Each is a function here and an operator of the same name under ``torch.ops.hpa_ext``; both take the same path through
the checks. None of them knows of models or files.
"""

from hpa_ext.ops._backend import backend_of, native_cuda
from hpa_ext.ops.column_mask import column_mask
from hpa_ext.ops.column_scores import column_scores
from hpa_ext.ops.gram import gram_accumulate_
from hpa_ext.ops.inverse_diagonal import InverseDiagonal, inverse_diagonal
from hpa_ext.ops.project_merge import project_merge
from hpa_ext.ops.routed_lora import routed_lora

__all__ = [
    "InverseDiagonal",
    "backend_of",
    "column_mask",
    "column_scores",
    "gram_accumulate_",
    "inverse_diagonal",
    "native_cuda",
    "project_merge",
    "routed_lora",
]
