"""Calibration of checkpoints on disk, whole or layer by layer, resumable, in one process or several."""

from hpa_ext.calibrating.checkpoint import calibrate_checkpoint, load_processor

__all__ = ["calibrate_checkpoint", "load_processor"]
