"""Stepping a learning-rate scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ununennium.training.callbacks.base import Callback
from ununennium.training.callbacks.monitor import monitored
from ununennium.training.errors import CheckpointError

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class LRSchedulerCallback(Callback):
    """Step a PyTorch scheduler at the right time.

    Parameters
    ----------
    scheduler : torch.optim.lr_scheduler.LRScheduler
        Made over the Trainer's optimizer.
    step_on : {"epoch", "batch"}, default "epoch"
        After every epoch and its validation; or after every optimizer step that really happened, which with
        accumulation is once a window, and not when the loss scaler skipped the step. `OneCycleLR` wants "batch".
    monitor : str, optional
        What `ReduceLROnPlateau` looks at, "val_loss" by default. No other scheduler takes one.

    Raises
    ------
    TypeError
        For what is no scheduler of PyTorch.
    ValueError
        For a plateau scheduler that should step on batches, a monitor that nothing looks at, or another ``step_on``;
        when training starts, for a scheduler over another optimizer, or a plateau of the wrong direction.
    """

    def __init__(
        self,
        scheduler: LRScheduler,
        step_on: Literal["epoch", "batch"] = "epoch",
        *,
        monitor: str | None = None,
    ) -> None:
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(f"scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {scheduler!r}")
        if step_on not in ("epoch", "batch"):
            raise ValueError(f'step_on must be "epoch" or "batch", got {step_on!r}')
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        if plateau and step_on == "batch":
            raise ValueError('ReduceLROnPlateau looks at the figures of an epoch: use step_on="epoch"')
        if monitor is not None and not plateau:
            raise ValueError(
                f"{type(scheduler).__name__} looks at no figure: monitor is for ReduceLROnPlateau, leave it out"
            )
        self.scheduler = scheduler
        self._made = _settings_of(scheduler)
        self.step_on = step_on
        self.monitor: str | None = (monitor or "val_loss") if plateau else None
        self._optimizer_steps = 0

    def on_train_start(self, trainer: Trainer) -> None:
        """Check that the scheduler drives the Trainer's optimizer."""
        if self.scheduler.optimizer is not trainer.optimizer:
            raise ValueError(
                f"{type(self.scheduler).__name__} was made over another optimizer than the Trainer's, so it would "
                "change no learning rate: make it over the optimizer that the Trainer gets"
            )
        self._optimizer_steps = trainer.state.optimizer_steps
        self._check_direction(trainer)

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        """Step if an optimizer step happened in this batch."""
        if self.step_on == "batch" and trainer.state.optimizer_steps != self._optimizer_steps:
            self._optimizer_steps = trainer.state.optimizer_steps
            self.scheduler.step()

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Step if the scheduler steps on epochs."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            assert self.monitor is not None
            self._check_direction(trainer)  # again: the default metrics are known by now
            self.scheduler.step(monitored(self, logs))
        elif self.step_on == "epoch":
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state."""
        return {
            "class": type(self.scheduler).__name__,
            "step_on": self.step_on,
            "made": self._made,
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        if state["class"] != type(self.scheduler).__name__:
            raise CheckpointError(
                f"the checkpoint's scheduler is {state['class']}, this one {type(self.scheduler).__name__}: pass the "
                "same, or take the weights alone with Trainer.load_weights"
            )
        made = {"step_on": self.step_on, **self._made}
        for name, value in {"step_on": state.get("step_on", self.step_on), **state.get("made", {})}.items():
            if name in made and made[name] != value:
                raise CheckpointError(
                    f"the checkpoint's {state['class']} had {name}={value!r}, this one has {made[name]!r}: make it "
                    "with the same, or take the weights alone with Trainer.load_weights"
                )
        self.scheduler.load_state_dict(state["scheduler"])

    def _check_direction(self, trainer: Trainer) -> None:
        if not isinstance(self.scheduler, ReduceLROnPlateau) or self.monitor is None:
            return
        higher = trainer.higher_is_better(self.monitor)
        if higher is not None and (self.scheduler.mode == "max") != higher:
            right = "max" if higher else "min"
            raise ValueError(
                f"ReduceLROnPlateau has mode={self.scheduler.mode!r}, but of {self.monitor!r} "
                f"{'more' if higher else 'less'} is better: make it with mode={right!r}"
            )


def _settings_of(scheduler: LRScheduler) -> dict[str, Any]:
    """Return what a scheduler was made with: plain values that it keeps and that are no state of its course."""
    course = {"last_epoch", "_step_count", "num_bad_epochs", "cooldown_counter", "best", "T_cur", "T_i"}
    kept = scheduler.state_dict()
    plain = (bool, int, float, str, type(None))
    return {k: v for k, v in kept.items() if isinstance(v, plain) and k not in course and "lr" not in k}
