"""Callbacks: what happens around the steps."""

from ununennium.training.callbacks.averaging import WeightAverage
from ununennium.training.callbacks.base import Callback
from ununennium.training.callbacks.checkpoint import CheckpointCallback
from ununennium.training.callbacks.csv_logger import CSVLogger
from ununennium.training.callbacks.early_stopping import EarlyStoppingCallback
from ununennium.training.callbacks.ema import EMACallback
from ununennium.training.callbacks.logger import Logger
from ununennium.training.callbacks.lr_scheduler import LRSchedulerCallback
from ununennium.training.callbacks.mlflow_logger import MLflowLogger
from ununennium.training.callbacks.preview import PreviewCallback
from ununennium.training.callbacks.profiler import ProfilerCallback
from ununennium.training.callbacks.progress import ProgressCallback
from ununennium.training.callbacks.report import ReportCallback
from ununennium.training.callbacks.swa import SWACallback
from ununennium.training.callbacks.tensorboard_logger import TensorBoardLogger
from ununennium.training.callbacks.unfreeze import GradualUnfreeze
from ununennium.training.callbacks.wandb_logger import WandbLogger

__all__ = [
    "CSVLogger",
    "Callback",
    "CheckpointCallback",
    "EMACallback",
    "EarlyStoppingCallback",
    "GradualUnfreeze",
    "LRSchedulerCallback",
    "Logger",
    "MLflowLogger",
    "PreviewCallback",
    "ProfilerCallback",
    "ProgressCallback",
    "ReportCallback",
    "SWACallback",
    "TensorBoardLogger",
    "WandbLogger",
    "WeightAverage",
]
