"""The training loop: Trainer, its callbacks and its errors."""

from ununennium.training.callbacks import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    LRSchedulerCallback,
    ProgressCallback,
)
from ununennium.training.errors import BatchError, CheckpointError, NonFiniteError
from ununennium.training.trainer import Trainer

__all__ = [
    "BatchError",
    "Callback",
    "CheckpointCallback",
    "CheckpointError",
    "EarlyStoppingCallback",
    "LRSchedulerCallback",
    "NonFiniteError",
    "ProgressCallback",
    "Trainer",
]
