"""Callbacks: what happens around the steps."""

from ununennium.training.callbacks.base import Callback
from ununennium.training.callbacks.checkpoint import CheckpointCallback
from ununennium.training.callbacks.early_stopping import EarlyStoppingCallback
from ununennium.training.callbacks.lr_scheduler import LRSchedulerCallback
from ununennium.training.callbacks.progress import ProgressCallback

__all__ = ["Callback", "CheckpointCallback", "EarlyStoppingCallback", "LRSchedulerCallback", "ProgressCallback"]
