"""A run for Weights & Biases."""

from __future__ import annotations

import importlib
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ununennium.training.callbacks.logger import Logger, check_installed

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_BLOCK, _FILE_HEADER, _RECORD_HEADER = 32768, 7, struct.Struct("<IHB")
_PADDING, _WHOLE, _LAST = 0, 1, 4
_KINDS = ("step", "epoch")


class WandbLogger(Logger):
    """Log to Weights & Biases, or with ``mode="offline"`` to files for ``wandb sync``.

    Charts are drawn over ``step/optimizer_step`` and ``epoch/optimizer_step``, since W&B's own step only ever rises by
    what is logged. A resumed run goes on under the same id; what it has logged already, which the server tells, or
    offline its files, is not logged again. Needs the extra ``wandb``.

    Parameters
    ----------
    project : str, optional
        By default W&B's.
    name : str, optional
        Of the run; by default W&B makes one up.
    mode : {"online", "offline", "disabled"}, optional
        By default W&B's (``WANDB_MODE``).
    path : str or Path, default "."
        Where W&B puts its folder ``wandb``.
    every_n_steps : int, default 10
        Which optimizer steps to log.
    **options
        Passed on to ``wandb.init``.

    Raises
    ------
    ModuleNotFoundError
        If wandb is not installed.
    RuntimeError
        When training starts, if there is a W&B run in this process that somebody else began.
    """

    settles: ClassVar[float] = 120.0  # W&B writes and sends in the background

    run_id: str | None

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        mode: str | None = None,
        path: str | Path = ".",
        every_n_steps: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(every_n_steps)
        check_installed(self, "wandb", "wandb")
        self.path: Path = Path(path).expanduser().absolute()  # wherever the process goes meanwhile
        self.options: dict[str, Any] = {"project": project, "name": name, "mode": mode, **options}
        self._logged: Any = None  # W&B's run

    def open(self, trainer: Trainer) -> None:
        """Begin the run, or go on with it."""
        import wandb  # it takes a second

        if wandb.run is not None:
            raise RuntimeError(
                f"there is a W&B run already ({wandb.run.id}), which WandbLogger would go on with: end it with "
                "wandb.finish(), and pass what it was begun with to WandbLogger"
            )
        again = self.run_id is not None
        self.run_id = self.run_id or self.options.get("id") or trainer.state.run
        self.path.mkdir(parents=True, exist_ok=True)
        while list(self.path.glob(f"wandb/*run-{time.strftime('%Y%m%d_%H%M%S')}-{self.run_id}")):
            time.sleep(0.1)  # else W&B would write over the files of a start in the same second
        going_on = {"resume": "allow"} if again else {}
        options = {**self.options, **going_on, "id": self.run_id, "dir": str(self.path)}
        self._logged = wandb.init(**{name: value for name, value in options.items() if value is not None})
        for kind in _KINDS:
            self._logged.define_metric(f"{kind}/*", step_metric=f"{kind}/optimizer_step")

    def rewind(self, step: int) -> Mapping[str, int]:
        """Return what is there: W&B forgets nothing."""
        if self._logged.offline:
            return self._in_files()
        known = {kind: self._logged.summary.get(f"{kind}/optimizer_step") for kind in _KINDS}
        return {kind: int(last) for kind, last in known.items() if last is not None}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        kind = next(iter(values)).partition("/")[0]
        self._logged.log({f"{kind}/optimizer_step": step, **values})

    def close(self, finished: bool) -> None:
        """End the run; this waits until all is written, or sent."""
        self._logged.finish(exit_code=0 if finished else 1)

    def write_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Set the run's config."""
        self._logged.config.update(dict(values), allow_val_change=True)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log an image."""
        import wandb

        self._logged.log({name: wandb.Image(image), "epoch/optimizer_step": step})

    def _in_files(self) -> dict[str, int]:
        """Return the last step of each kind in the files that this run has left offline."""
        internal: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
        last: dict[str, int] = {}
        for path in self.path.glob(f"wandb/offline-run-*-{self.run_id}/run-{self.run_id}.wandb"):
            for content in _records(path.read_bytes()):
                record = internal.Record()
                record.ParseFromString(content)
                figures = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                for kind in _KINDS:
                    if f"{kind}/train_loss" in figures:
                        last[kind] = max(last.get(kind, -1), int(figures[f"{kind}/optimizer_step"]))
        return last


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the whole records of a ``.wandb`` file: LevelDB's log format behind a header of its own.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md.
    """
    at, begun = _FILE_HEADER, b""
    while at + _RECORD_HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _RECORD_HEADER.size:
            at += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(data, at)
        if kind == _PADDING:
            at += left
            continue
        at += _RECORD_HEADER.size
        if at + length > len(data):
            return
        begun += data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield begun
            begun = b""
