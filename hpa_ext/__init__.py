"""Merge weights before and after a tuning step so that safety and earlier tasks survive.

HPA (CVPR 2026) for layers, models and checkpoints: `Gram`, `calibrate`, `harmonize`, `harmonize_model`,
`harmonize_checkpoint`; the operations under `hpa_ext.ops`. See the README for the API in twenty lines.
"""

from hpa_ext import hide, ops
from hpa_ext.adapters import compose_adapters, load_adapter, merge_adapter
from hpa_ext.build_info import build_info
from hpa_ext.calibrating import calibrate_checkpoint
from hpa_ext.calibration import calibrate
from hpa_ext.checkpoints import CheckpointError, verify_checkpoint
from hpa_ext.checkpoints.gram_file import GramFile, save_grams
from hpa_ext.compromise import CompromiseConfig, CompromiseLayerReport, CompromiseReport, harmonize_adapter
from hpa_ext.data import load_conversations
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramCollection, GramPair
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.harmonizing import harmonize, harmonize_, harmonize_checkpoint, harmonize_model, plan_checkpoint
from hpa_ext.hpa import HPAConfig, LayerReport, ModelReport
from hpa_ext.hpa.checkpoint import merge_checkpoint

__version__ = build_info()["version"]

__all__ = [
    "CheckpointError",
    "CompromiseConfig",
    "CompromiseLayerReport",
    "CompromiseReport",
    "Gram",
    "GramCollection",
    "GramDiagonal",
    "GramFile",
    "GramPair",
    "HPAConfig",
    "LayerReport",
    "ModelReport",
    "NumericalError",
    "__version__",
    "build_info",
    "calibrate",
    "calibrate_checkpoint",
    "compose_adapters",
    "harmonize",
    "harmonize_",
    "harmonize_adapter",
    "harmonize_checkpoint",
    "harmonize_model",
    "hide",
    "load_adapter",
    "load_conversations",
    "merge_adapter",
    "merge_checkpoint",
    "ops",
    "plan_checkpoint",
    "save_grams",
    "verify_checkpoint",
]
