"""Checkpoints of transformers with FP8 weights: `dsopt.load` and `dsopt.save`."""

from dsopt.checkpoint.loading import load
from dsopt.checkpoint.problems import CheckpointError
from dsopt.checkpoint.saving import save

__all__ = ["CheckpointError", "load", "save"]
