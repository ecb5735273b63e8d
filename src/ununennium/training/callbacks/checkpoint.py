"""Saving the best and the last of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ununennium.training.callbacks.base import Callback
from ununennium.training.callbacks.monitor import Mode, check_mode, is_better, resolve_mode
from ununennium.training.checkpoint import new_name, point, remove

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Save checkpoints at the end of epochs; ``best`` and ``last`` in the folder lead to two of them.

    Parameters
    ----------
    path : str or Path
        The folder. Each checkpoint is a folder in it, ``step-…``; ``best`` and ``last`` are relative links.
    monitor : str, default "val_loss"
        The figure in the epoch's logs that decides which is best. NaN never is.
    mode : {"auto", "min", "max"}, default "auto"
        Whether less or more is better; "auto" asks the metric, and is "min" for everything else.
    save_best_only : bool, default True
        Keep the best (and the last) only. With ``False`` every epoch's checkpoint is kept.
    save_last : bool, default True
        Save every epoch and let ``last`` lead to the newest. With ``False`` only improvements are saved.

    Attributes
    ----------
    best : float or None
        The best value so far.
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
    ) -> None:
        check_mode(mode)
        self.path = Path(path)
        self.monitor = monitor
        self.mode = mode
        self.save_best_only = save_best_only
        self.save_last = save_last
        self.best: float | None = None
        self._kept: dict[str, str] = {}  # pointer -> checkpoint, of this run: what was there before is not touched

    def on_train_start(self, trainer: Trainer) -> None:
        """Make the folder and see that it can be written to, before hours are spent."""
        others = (c for c in trainer.callbacks.callbacks if isinstance(c, CheckpointCallback) and c is not self)
        for other in others:
            if other.path.resolve() == self.path.resolve():
                raise ValueError(
                    f"two CheckpointCallbacks (of {self.monitor!r} and {other.monitor!r}) write to {self.path}, and "
                    "would move each other's best and last: give each a folder of its own"
                )
        for pointer in ("best", "last"):
            if (self.path / pointer).exists() and not (self.path / pointer).is_symlink():
                raise FileExistsError(
                    f"{self.path / pointer} is no link that leads to a checkpoint, so it can't be moved: "
                    "choose another folder"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OSError(
                error.errno,
                f"checkpoints can't be written to this folder ({error.strerror}); choose another",
                str(self.path),
            ) from error

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Save, move the pointers, and delete what they left."""
        value = logs[self.monitor]
        better = is_better(value, self.best, resolve_mode(self.mode, self.monitor, trainer))
        if not (better or self.save_last or not self.save_best_only):
            return
        name = new_name(trainer.state.optimizer_steps)
        moved = ["best"] * better + ["last"] * self.save_last
        before = self.best, self._kept
        left = {self._kept[pointer] for pointer in moved if pointer in self._kept}
        self.best = value if better else self.best  # before saving, since it is saved, too
        self._kept = self._kept | dict.fromkeys(moved, name)
        try:
            trainer.save(self.path / name)
        except BaseException:
            self.best, self._kept = before
            raise
        for pointer in moved:
            point(self.path, pointer, name)
        if self.save_best_only:
            for old in left - set(self._kept.values()):
                if (self.path / old).is_dir():
                    remove(self.path / old)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and which checkpoints the pointers lead to."""
        return {"best": self.best, "kept": dict(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.best, self._kept = state["best"], dict(state["kept"])
