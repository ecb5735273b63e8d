"""Stopping when nothing gets better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ununennium._arguments import integer
from ununennium.training.callbacks.base import Callback
from ununennium.training.callbacks.monitor import Mode, check_mode, check_monitor, is_better, monitored, resolve_mode

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class EarlyStoppingCallback(Callback):
    """Stop training when a figure stops improving, counting as Keras does.

    Parameters
    ----------
    monitor : str, default "val_loss"
        The figure in the epoch's logs.
    patience : int, default 10
        Training stops at the ``patience``-th epoch in a row without improvement.
    mode : {"auto", "min", "max"}, default "auto"
        Whether less or more is better; "auto" asks the metric, and is "min" for everything else.
    min_delta : float, default 1e-4
        An improvement must exceed this.

    Raises
    ------
    TypeError, ValueError
        If ``patience`` is no integer of at least 0, ``min_delta`` not finite or below 0, or ``mode`` another.

    Attributes
    ----------
    best : float or None
        The best value so far.
    wait : int
        Epochs in a row without improvement.
    stopped_epoch : int or None
        The epoch after which this callback stopped training.
    """

    monitor: str

    def __init__(
        self, monitor: str = "val_loss", patience: int = 10, mode: Mode = "auto", min_delta: float = 1e-4
    ) -> None:
        check_mode(mode)
        if isinstance(min_delta, bool) or not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be a finite number of at least 0, got {min_delta!r}")
        self.monitor = monitor
        self.patience: int = integer("patience", patience, minimum=0)
        self.mode = mode
        self.min_delta = min_delta
        self.best: float | None = None
        self.wait: int = 0
        self.stopped_epoch: int | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Let a run that was stopped, and loaded again, stay stopped; more patience lets it go on."""
        if self.wait and self.wait >= self.patience:
            trainer.stop()
        elif self.stopped_epoch is not None and self.stopped_epoch + 1 == trainer.state.epoch:
            self.stopped_epoch = None
            trainer.state.stopping = False

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Compare, count, and ask the Trainer to stop when patience is over."""
        value = monitored(self, logs)
        if is_better(value, self.best, resolve_mode(self.mode, self.monitor, trainer), self.min_delta):
            self.best, self.wait = value, 0
            return
        self.wait += 1
        if self.wait >= self.patience:
            self.stopped_epoch = epoch
            trainer.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and how long ago it was."""
        return {"monitor": self.monitor, "best": self.best, "wait": self.wait, "stopped_epoch": self.stopped_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        check_monitor(self, state)
        self.best, self.wait, self.stopped_epoch = state["best"], state["wait"], state["stopped_epoch"]
