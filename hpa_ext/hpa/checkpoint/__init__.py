"""HPA on checkpoints: from disk to disk, in bounded memory."""

from hpa_ext.hpa.checkpoint.estimate import CheckpointPlan, plan_checkpoint
from hpa_ext.hpa.checkpoint.plain_merge import merge_checkpoint
from hpa_ext.hpa.checkpoint.run import harmonize_checkpoint

__all__ = ["CheckpointPlan", "harmonize_checkpoint", "merge_checkpoint", "plan_checkpoint"]
