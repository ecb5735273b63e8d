"""The six moments of a run, and who is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ununennium.training.callbacks.monitor import not_in_logs

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

Hooks = list[Callable[..., Any]]
_MEMORY = "state_dict", "load_state_dict"


class Callback:
    """Base class of callbacks: override the hooks you need; the others cost nothing.

    Hooks are called in the order of the Trainer's list; callbacks with ``saves_state`` come after all others, so that
    what they save is complete. The Trainer's counters (``trainer.state``) have advanced when an end hook is called.

    A callback with a memory has ``state_dict`` and ``load_state_dict``; checkpoints then hold it. It may hold None,
    bool, int, float, str, list, tuple, set, dict, tensors and NumPy arrays.

    Attributes
    ----------
    monitor : str or None
        The figure that the callback looks at in the logs of an epoch; checked before the first step.
    log_names : tuple of str
        Figures that the callback adds to the logs in ``on_epoch_end``, so that others may monitor them.
    saves_state : bool
        Whether the callback saves what other callbacks know. Its ``save`` is called when a signal ends the run.
    looks_on : bool
        Whether the callback only writes things down, so that a run may be resumed with it or without it, whatever the
        checkpoint has. A checkpoint that has its memory gives it back.
    averages_weights : bool
        Whether ``state_dict`` gives weights by canonical name, under "averaged", which checkpoints keep in a file of
        their own; see `WeightAverage`.
    """

    monitor: str | None = None
    log_names: tuple[str, ...] = ()
    saves_state: ClassVar[bool] = False
    looks_on: ClassVar[bool] = False
    averages_weights: ClassVar[bool] = False

    @property
    def broadcast_tensors(self) -> Sequence[Tensor]:
        """What is given the values of process 0 after the batches of an epoch."""
        return ()

    def on_train_start(self, trainer: Trainer) -> None:
        """Do something before the first epoch; what is wrong should be raised here. Memories are restored by then."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Do something at the end of ``fit``. Called, too, when an error or Ctrl-C ends it."""

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Do something before an epoch, and before the rest of one that a resumed run enters (``state.batch``)."""

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Do something after an epoch and its validation; ``logs`` has the figures of both, and may be added to."""

    def on_batch_start(self, trainer: Trainer, batch_idx: int) -> None:
        """Do something before a training batch goes forward."""

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        """Do something after a training batch, and the optimizer step if it closed a window.

        ``logs`` holds 0-dimensional tensors on the device: ``train_loss`` of this batch. Reading one as a number makes
        an accelerator wait for it.
        """

    def evaluation(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """Return the context in which the model is evaluated: that of averaged weights, say, put back at its end."""
        return nullcontext()

    def save(self, trainer: Trainer) -> None:
        """Save the run as it is now; asked of callbacks with ``saves_state`` when a signal ends the run."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback has to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


class CallbackList:
    """The callbacks in the order in which they are called, and the overridden hooks of each kind.

    Raises
    ------
    TypeError
        If something is no callback.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks: list[Callback] = sorted(callbacks, key=lambda c: getattr(c, "saves_state", False))  # stable
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(
                    f"callbacks must be ununennium.training.Callback objects, got {callback!r}"
                    + (": an instance of it is meant" if isinstance(callback, type) else "")
                )
            kind = type(callback)
            missing = {name for name in _MEMORY if getattr(kind, name) is getattr(Callback, name)}
            if len(missing) == 1:
                raise TypeError(
                    f"{kind.__name__} has no {missing.pop()}: a callback that remembers something needs both "
                    f"{' and '.join(_MEMORY)}, or a resumed run is another run"
                )
        self.train_start: Hooks = self._overriding("on_train_start")
        self.epoch_start: Hooks = self._overriding("on_epoch_start")
        self.batch_start: Hooks = self._overriding("on_batch_start")
        self.batch_end: Hooks = self._overriding("on_batch_end")
        self.epoch_end: Hooks = self._overriding("on_epoch_end")
        self.train_end: Hooks = self._overriding("on_train_end")
        self.evaluation: Hooks = self._overriding("evaluation")

    def _overriding(self, hook: str) -> Hooks:
        methods = [getattr(callback, hook) for callback in self.callbacks]
        return [m for m in methods if getattr(m, "__func__", m) is not getattr(Callback, hook)]

    @property
    def with_memory(self) -> list[Callback]:
        """The callbacks that a checkpoint holds."""
        return [c for c in self.callbacks if type(c).state_dict is not Callback.state_dict]

    @property
    def savers(self) -> list[Callback]:
        """The callbacks that save what others know."""
        return [c for c in self.callbacks if c.saves_state]

    def check_monitors(self, names: list[str], may_be: Callable[[str], bool], validates: bool, complete: bool) -> None:
        """Raise for a monitored figure that the epoch's logs won't have.

        Parameters
        ----------
        names : list of str
            The figures there will be; those that callbacks add are added here.
        may_be : callable
            Tells of another name whether there may be such a figure, which shows at the epoch's end.
        validates : bool
            Whether there is a validation loader.
        complete : bool
            Whether all names are known: what the default metrics are shows with the first batch.
        """
        names = sorted([*names, *(name for callback in self.callbacks for name in callback.log_names)])
        for callback in self.callbacks:
            monitor, owner = callback.monitor, type(callback).__name__
            if monitor is None or monitor in names or may_be(monitor):
                continue
            if monitor.startswith("val_") and not validates:
                raise ValueError(
                    f"{owner} monitors {monitor!r}, but there is no val_loader: pass one, or monitor one of {names}"
                )
            if complete:
                raise not_in_logs(callback, names)

    def end(self, trainer: Trainer, failure: BaseException | None = None) -> None:
        """Call every ``on_train_end``, also after one that raised.

        Their first error is raised when all were called; while a ``failure`` is under way it becomes a note to that.
        """
        errors = []
        for hook in self.train_end:
            try:
                hook(trainer)
            except Exception as raised:
                errors.append(raised)
        if errors and failure is None:
            raise errors[0]
        for error in errors:
            assert failure is not None
            failure.add_note(f"Then on_train_end raised {type(error).__name__}: {error}")
