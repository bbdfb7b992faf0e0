"""Merge weights before and after a tuning step so that safety and earlier tasks survive.

HPA (CVPR 2026) for layers and models: `Gram`, `calibrate`, `harmonize`, `harmonize_model`; the six operations under
`hpa_ext.ops`. See the README for the API in twenty lines.
"""

from hpa_ext import ops
from hpa_ext.build_info import build_info
from hpa_ext.calibration import calibrate
from hpa_ext.errors import NumericalError
from hpa_ext.gram import Gram, GramCollection, GramPair
from hpa_ext.hpa import HPAConfig, LayerReport, ModelReport, harmonize, harmonize_, harmonize_model

__version__ = build_info()["version"]

__all__ = [
    "Gram",
    "GramCollection",
    "GramPair",
    "HPAConfig",
    "LayerReport",
    "ModelReport",
    "NumericalError",
    "__version__",
    "build_info",
    "calibrate",
    "harmonize",
    "harmonize_",
    "harmonize_model",
    "ops",
]
