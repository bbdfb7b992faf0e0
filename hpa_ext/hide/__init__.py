"""HiDe (ACL 2025): experts of several tasks in one model, fused below and routed on top, from plain PEFT adapters."""

from hpa_ext.hide.anchor_collection import collect_anchors
from hpa_ext.hide.anchors import Anchors
from hpa_ext.hide.cka import linear_cka
from hpa_ext.hide.config import HiDeConfig
from hpa_ext.hide.features import ClipText, EmbeddingText, Features, ImageFeature
from hpa_ext.hide.harmonized import harmonize_experts
from hpa_ext.hide.layer_cka import CKARun, LayerCKA, expert_cka, layer_cka
from hpa_ext.hide.model import HiDeModel
from hpa_ext.hide.own_features import clip_features, own_features

__all__ = [
    "Anchors",
    "CKARun",
    "ClipText",
    "EmbeddingText",
    "Features",
    "HiDeConfig",
    "HiDeModel",
    "ImageFeature",
    "LayerCKA",
    "clip_features",
    "collect_anchors",
    "expert_cka",
    "harmonize_experts",
    "layer_cka",
    "linear_cka",
    "own_features",
]
