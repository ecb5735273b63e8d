"""Saving the best and the last of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ununennium._arguments import integer
from ununennium.training.callbacks.base import Callback
from ununennium.training.callbacks.monitor import Mode, check_mode, check_monitor, is_better, monitored, resolve_mode
from ununennium.training.checkpoint import Folder

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Save checkpoints; ``best`` and ``last`` in the folder lead to two of them.

    Each holds the whole run, and ``Trainer.fit(…, resume="auto")`` goes on from the newest. They are written by a
    thread, from a copy, while training goes on. A signal that ends the run (SIGTERM, Ctrl-C) has one written first.

    Parameters
    ----------
    path : str or Path
        The folder. Each checkpoint is a folder in it, ``step-…``; ``best`` and ``last`` are relative links. One run
        at a time may write to it.
    monitor : str, default "val_loss"
        The figure in the epoch's logs that decides which is best. NaN never is.
    mode : {"auto", "min", "max"}, default "auto"
        Whether less or more is better; "auto" asks the metric, and is "min" for everything else.
    save_best_only : bool, default True
        Keep the best (and the last) only. With ``False`` every epoch's checkpoint is kept.
    save_last : bool, default True
        Save every epoch and let ``last`` lead to the newest. With ``False`` epochs are saved only when they are among
        the best.
    every_n_steps : int, optional
        Save, as ``last``, also inside epochs: after every so many optimizer steps of the run.
    every_n_seconds : float, optional
        The same, after the first optimizer step for which the last save is so long ago.
    keep_last : int, default 1
        How many of the newest to keep.
    keep_best : int, default 1
        How many of the best to keep.

    Attributes
    ----------
    best : float or None
        The best value so far.

    Raises
    ------
    ValueError
        For a mode that there is not, or a number that is not above 0.
    """

    monitor: str
    saves_state: ClassVar[bool] = True

    def __init__(
        self,
        path: str | Path,
        monitor: str = "val_loss",
        mode: Mode = "auto",
        save_best_only: bool = True,
        save_last: bool = True,
        *,
        every_n_steps: int | None = None,
        every_n_seconds: float | None = None,
        keep_last: int = 1,
        keep_best: int = 1,
    ) -> None:
        check_mode(mode)
        numbers = {"every_n_steps": every_n_steps, "keep_last": keep_last, "keep_best": keep_best}
        for name, number in numbers.items():
            integer(name, 1 if number is None else number, minimum=1)
        if every_n_seconds is not None and not every_n_seconds > 0:
            raise ValueError(f"every_n_seconds must be above 0, got {every_n_seconds!r}")
        self.path: Path = Path(path).expanduser().absolute()  # wherever the process goes meanwhile
        self.monitor = monitor
        self.mode = mode
        self.save_best_only = save_best_only
        self.save_last = save_last
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._folder = Folder(self.path)
        self._bests: list[tuple[float, str]] = []  # values and checkpoints, the best first
        self._pointers: dict[str, str] = {}  # where they lead once the last save is committed
        self._judged: int | None = None  # the epoch whose figures were looked at, and what is to be saved of it
        self._planned: _Plan | None = None
        self._prepared = False
        self._step = 0
        self._at: tuple[Any, ...] | None = None  # where the run was when it was last saved, and when
        self._seconds = 0.0

    @property
    def best(self) -> float | None:
        """The best value so far."""
        return self._bests[0][0] if self._bests else None

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the folder, and see that it can be written to, before hours are spent."""
        others = (c for c in trainer.callbacks.callbacks if isinstance(c, CheckpointCallback) and c is not self)
        for other in others:
            if other.path.resolve() == self.path.resolve():
                raise ValueError(
                    f"two CheckpointCallbacks (of {self.monitor!r} and {other.monitor!r}) write to {self.path}, and "
                    "would move each other's best and last: give each a folder of its own"
                )
        if trainer.rank == 0:
            self._folder.open()
            self._folder.catch_up(self._pointers, trainer.state.run)
        self._prepared, self._at, self._judged, self._planned = False, None, None, None
        self._step, self._seconds = trainer.state.optimizer_steps, trainer.clock

    def on_train_end(self, trainer: Trainer) -> None:
        """Leave the folder to others."""
        self._folder.close()

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        """Save if it is time to, between two optimizer steps."""
        if trainer.state.open_batches:
            return
        if not self._prepared:  # the optimizer has its state by now
            self._prepared = True
            trainer.prepare_save()
        if self._is_due(trainer.state.optimizer_steps, trainer.clock):
            self.save(trainer)

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Save, move the pointers, and delete what they left."""
        for callback in trainer.callbacks.callbacks:  # all judge first, so that each checkpoint holds what all know
            if isinstance(callback, CheckpointCallback) and callback._judged != epoch:
                callback._judge(trainer, epoch, logs)
        if self._planned is not None:
            self._write(trainer, *self._planned)
            self._planned = None

    def _judge(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        mode = resolve_mode(self.mode, self.monitor, trainer)
        value = monitored(self, logs)
        rank = sum(not is_better(value, better, mode) for better, _ in self._bests)
        among_best = rank < self.keep_best and is_better(value, None, mode)
        self._judged, self._planned = epoch, None
        if among_best or self.save_last or not self.save_best_only:
            pointers = ["best"] * (among_best and rank == 0) + ["last"] * self.save_last
            self._planned = self._plan(trainer, pointers, (rank, value) if among_best else None)

    def save(self, trainer: Trainer) -> None:
        """Save the run as it is now, as ``last``, unless that was done."""
        if self._at != _position(trainer):
            self._write(trainer, *self._plan(trainer, ["last"]))

    def _is_due(self, optimizer_steps: int, clock: float) -> bool:
        stepped, self._step = optimizer_steps != self._step, optimizer_steps
        if self.every_n_steps is not None and stepped and optimizer_steps % self.every_n_steps == 0:
            return True
        return self.every_n_seconds is not None and clock - self._seconds >= self.every_n_seconds

    def _plan(self, trainer: Trainer, pointers: list[str], ranked: tuple[int, float] | None = None) -> _Plan:
        """Note what a save will change, before it is made, since it is saved, too."""
        before = self._bests, self._pointers
        name = self._folder.new_name(trainer.state.optimizer_steps)
        if ranked is not None:
            rank, value = ranked
            self._bests = [*self._bests[:rank], (value, name), *self._bests[rank:]][: self.keep_best]
        self._pointers = self._pointers | dict.fromkeys(pointers, name)
        return name, pointers, before

    def _write(self, trainer: Trainer, name: str, pointers: list[str], before: tuple[Any, Any]) -> None:
        keep = {best for _, best in self._bests}

        def done(error: BaseException | None) -> None:
            if error is None:
                self._folder.settle(name, pointers, keep, self.keep_last, epochs=not self.save_best_only)
            else:
                (self._bests, self._pointers), self._at = before, None

        try:
            trainer.save(self._folder.path / name, wait=False, done=done)
        except BaseException as error:
            done(error)
            raise
        self._at, self._seconds = _position(trainer), trainer.clock

    def state_dict(self) -> dict[str, Any]:
        """Return the best values with their checkpoints, and where the pointers lead."""
        return {"monitor": self.monitor, "bests": list(self._bests), "pointers": dict(self._pointers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        check_monitor(self, state)
        self._bests = [(value, name) for value, name in state["bests"]]
        self._pointers = dict(state["pointers"])


_Plan = tuple[str, list[str], tuple[Any, Any]]  # a checkpoint's name, the pointers that move, what was before


def _position(trainer: Trainer) -> tuple[Any, ...]:
    state = trainer.state
    return state.epoch, state.batch, state.validating, state.optimizer_steps
