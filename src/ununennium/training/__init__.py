"""The training loop: Trainer, its callbacks and its errors."""

from ununennium.training.callbacks import (
    Callback,
    CheckpointCallback,
    CSVLogger,
    EarlyStoppingCallback,
    EMACallback,
    GradualUnfreeze,
    Logger,
    LRSchedulerCallback,
    MLflowLogger,
    PreviewCallback,
    ProfilerCallback,
    ProgressCallback,
    ReportCallback,
    SWACallback,
    TensorBoardLogger,
    WandbLogger,
)
from ununennium.training.checkpoint import export_weights
from ununennium.training.errors import (
    BatchError,
    CheckpointError,
    DataOrderError,
    NonFiniteError,
    Preempted,
    ProcessError,
)
from ununennium.training.trainer import Trainer
from ununennium.training.tuning import largest_batch, lr_range_test

__all__ = [
    "BatchError",
    "CSVLogger",
    "Callback",
    "CheckpointCallback",
    "CheckpointError",
    "DataOrderError",
    "EMACallback",
    "EarlyStoppingCallback",
    "GradualUnfreeze",
    "LRSchedulerCallback",
    "Logger",
    "MLflowLogger",
    "NonFiniteError",
    "Preempted",
    "PreviewCallback",
    "ProcessError",
    "ProfilerCallback",
    "ProgressCallback",
    "ReportCallback",
    "SWACallback",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
    "export_weights",
    "largest_batch",
    "lr_range_test",
]
