"""Checkpoints on disk: safetensors read and written a tensor at a time, outputs that are complete or absent."""

from hpa_ext.checkpoints.digest import RunningDigest
from hpa_ext.checkpoints.errors import CheckpointError
from hpa_ext.checkpoints.fingerprint import fingerprint
from hpa_ext.checkpoints.header import Shard, TensorEntry
from hpa_ext.checkpoints.identity import identity
from hpa_ext.checkpoints.journal import JOURNAL_FILE, Journal
from hpa_ext.checkpoints.manifest import MANIFEST_FILE, read_manifest, write_manifest
from hpa_ext.checkpoints.masks import MASKS_FILE, LayerMasks, read_masks, write_masks
from hpa_ext.checkpoints.output import begin_output, check_output, finished_output, partial_directory, publish
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.checkpoints.shard_plan import ShardPlan, index_of
from hpa_ext.checkpoints.side_files import copy_side_files
from hpa_ext.checkpoints.verify import VerifyReport, verify_checkpoint
from hpa_ext.checkpoints.writer import ShardedWriter

__all__ = [
    "JOURNAL_FILE",
    "MANIFEST_FILE",
    "MASKS_FILE",
    "CheckpointError",
    "CheckpointReader",
    "Journal",
    "LayerMasks",
    "RunningDigest",
    "Shard",
    "ShardPlan",
    "ShardedWriter",
    "TensorEntry",
    "VerifyReport",
    "begin_output",
    "check_output",
    "copy_side_files",
    "fingerprint",
    "finished_output",
    "identity",
    "index_of",
    "partial_directory",
    "publish",
    "read_manifest",
    "read_masks",
    "verify_checkpoint",
    "write_manifest",
    "write_masks",
]
