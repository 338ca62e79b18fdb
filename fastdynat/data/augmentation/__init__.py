"""Augmentation beyond crop and flip: stages that change uint8 batches, drawn per position of the epoch."""

from fastdynat.data.augmentation.stages import Stage, apply_stages, stages_of

__all__ = ["Stage", "apply_stages", "stages_of"]
