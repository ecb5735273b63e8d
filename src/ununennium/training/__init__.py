"""The training loop: Trainer, its callbacks and its errors."""

from ununennium.training.callbacks import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    LRSchedulerCallback,
    ProgressCallback,
)
from ununennium.training.checkpoint import export_weights
from ununennium.training.errors import BatchError, CheckpointError, DataOrderError, NonFiniteError, Preempted
from ununennium.training.trainer import Trainer

__all__ = [
    "BatchError",
    "Callback",
    "CheckpointCallback",
    "CheckpointError",
    "DataOrderError",
    "EarlyStoppingCallback",
    "LRSchedulerCallback",
    "NonFiniteError",
    "Preempted",
    "ProgressCallback",
    "Trainer",
    "export_weights",
]
