"""The operations: checks, dispatch to the native kernels, and torch.library registration.

Each is a function here and an operator of the same name under ``torch.ops.hpa_ext``; both take the same path through
the checks. None of them knows of models or files.
"""

from hpa_ext.ops._backend import backend_of, cuda_gram_kernel, native_cuda
from hpa_ext.ops.column_mask import column_mask
from hpa_ext.ops.column_mask_list import column_mask_list
from hpa_ext.ops.column_scores import column_scores
from hpa_ext.ops.column_scores_list import column_scores_list
from hpa_ext.ops.gram import gram_accumulate_
from hpa_ext.ops.gram_list import gram_accumulate_list_
from hpa_ext.ops.instruction_set import instruction_set
from hpa_ext.ops.inverse_diagonal import InverseDiagonal, inverse_diagonal
from hpa_ext.ops.inverse_diagonal_rows import RowsDiagonal, inverse_diagonal_of_rows
from hpa_ext.ops.low_rank import LOW_RANK_DTYPES, low_rank_add, low_rank_backend, low_rank_merge, low_rank_scores
from hpa_ext.ops.project_merge import project_merge
from hpa_ext.ops.project_merge_list import project_merge_list
from hpa_ext.ops.routed_lora import routed_lora
from hpa_ext.ops.routed_lora_add import routed_lora_add_
from hpa_ext.ops.routed_lora_list import routed_lora_list

__all__ = [
    "LOW_RANK_DTYPES",
    "InverseDiagonal",
    "RowsDiagonal",
    "backend_of",
    "column_mask",
    "column_mask_list",
    "column_scores",
    "column_scores_list",
    "cuda_gram_kernel",
    "gram_accumulate_",
    "gram_accumulate_list_",
    "instruction_set",
    "inverse_diagonal",
    "inverse_diagonal_of_rows",
    "low_rank_add",
    "low_rank_backend",
    "low_rank_merge",
    "low_rank_scores",
    "native_cuda",
    "project_merge",
    "project_merge_list",
    "routed_lora",
    "routed_lora_add_",
    "routed_lora_list",
]
