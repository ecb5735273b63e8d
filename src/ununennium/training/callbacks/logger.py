"""What a run is made of and how it goes, gathered for those who write it down."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ununennium._arguments import integer
from ununennium.training.callbacks.base import Callback
from ununennium.training.distributed import reader

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_TOGETHER = 64  # rows that are read from the device and written at once,
_SECONDS = 5.0  # or as many as there are after this time


class Row(NamedTuple):
    """Figures of a moment, under names without its kind.

    Attributes
    ----------
    kind : {"step", "epoch"}
        Whether they are of an optimizer step or of an epoch.
    step : int
        Optimizer steps made by then.
    values, more : dict of str to float or Tensor
        ``values`` of an epoch are its logs themselves, which callbacks that come later may add to.
    """

    kind: str
    step: int
    values: dict[str, Any]
    more: dict[str, Any]


class Logger(Callback):
    """Base of callbacks that write a run down: `write` is the one method that a new logger needs.

    Gathered are, of every ``every_n_steps``-th optimizer step, ``step/train_loss`` (of process 0), ``step/lr`` (with
    several parameter groups ``step/lr/0`` …), ``step/gradient_norm`` with clipping, ``step/memory`` on CUDA; of every
    epoch ``epoch/epoch`` (counted from 1), all figures of the logs, ``epoch/chips_per_second``, ``epoch/data_wait``
    (0 … 1), ``epoch/seconds`` and ``epoch/memory``. Memory is the peak so far in GiB: what PyTorch has allocated on
    CUDA, else the resident set of this process. Values stay on the device until several are read at once: no step
    waits for them.

    Only process 0 writes. What was not yet written when a checkpoint was made is in the checkpoint. A resumed run goes
    on in the same log: what was logged after the checkpoint is taken back by `rewind`, or not logged again.

    Parameters
    ----------
    every_n_steps : int
        Which optimizer steps to log.

    Attributes
    ----------
    run_id : str or None
        The log's own name for the run, set in `open` by loggers that have one; checkpoints remember it.
    settles : float
        Seconds for which what was written may still get lost in a crash; checkpoints hold it for that long.

    Raises
    ------
    ValueError
        If ``every_n_steps`` is not an integer above 0.
    """

    settles: ClassVar[float] = 0.0
    looks_on: ClassVar[bool] = True

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps: int = integer("every_n_steps", every_n_steps, minimum=1)
        self.run_id: str | None = None
        self._run: str | None = None  # the Trainer's name for it
        self._opened = self._restored = False
        self._rows: deque[Row] = deque()  # not yet written
        self._read: Any = None  # gives the values of the first rows, which are on their way from the device
        self._num_read = 0
        self._unsettled: deque[tuple[float, Row]] = deque()
        self._written = -1  # the last step of which something was written
        self._there: Mapping[str, int] = {}
        self._step = 0
        self._rates: list[Any] = []
        self._flushed = 0.0

    # What a logger does

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures down, those of one step or of one epoch, under their full names.

        Parameters
        ----------
        step : int
            Optimizer steps made by then.
        values : mapping of str to float
            All names begin with ``step/``, or all with ``epoch/``.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define write(step, values)")

    def open(self, trainer: Trainer) -> None:
        """Begin to log: a new run where ``run_id`` is None, else that one again; raise here what is wrong."""

    def rewind(self, step: int) -> Mapping[str, int]:
        """Forget, in a resumed run, what was logged after a step; called after `open`.

        Returns
        -------
        mapping of str to int
            What can't be forgotten, and so is not written again: the last step logged of kind "step" and "epoch".
        """
        return {}

    def flush(self) -> None:
        """See to it that what was written outlives the process."""

    def close(self, finished: bool) -> None:
        """End what `open` began; ``finished`` tells whether the run is over, or was left before its end."""

    def write_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Write down, once a run, what it is set up with: plain data."""

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write down an image (H, W, 3), uint8."""

    # What is gathered

    def log_image(self, trainer: Trainer, name: str, image: np.ndarray) -> None:
        """Log an image (H, W, 3), uint8, of the run as it is now; of other processes than 0 nothing is logged.

        Raises
        ------
        ValueError
            If it is no such image.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image {name!r} must be uint8 of shape (H, W, 3), got {image.dtype} of {image.shape}")
        if not self._opened:
            return
        self._flush(everything=True)
        step = trainer.state.optimizer_steps
        if step > self._there.get("epoch", -1):
            self.write_image(step, name, image)

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the log; of a resumed run, where the checkpoint was."""
        if trainer.rank:
            return
        state = trainer.state
        restored, self._restored = self._restored, False
        new = not restored and state.run != self._run
        if new:
            self.run_id, self._written = None, -1
            self._rows.clear()
            self._unsettled.clear()
        self._run, self._read, self._num_read = state.run, None, 0
        self._step, self._flushed = state.optimizer_steps, time.monotonic()
        self.open(trainer)
        self._opened = True
        self._there = self.rewind(self._written) if restored else {}
        if new:
            self.write_hyperparameters(trainer.hyperparameters)
            self.flush()

    def on_train_end(self, trainer: Trainer) -> None:
        """Write what is left, and close."""
        if not self._opened:
            return
        try:
            self._flush(everything=True)
        finally:
            self._opened = False
            self.close(trainer.state.epoch >= trainer.epochs or trainer.state.stopping)

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Write the epoch before, to which nobody adds any more."""
        self._flush()

    def on_batch_start(self, trainer: Trainer, batch_idx: int) -> None:
        """Note the learning rates that the step is made with, before a scheduler moves on."""
        state = trainer.state
        if self._opened and not state.open_batches and (state.optimizer_steps + 1) % self.every_n_steps == 0:
            rates = (group["lr"] for group in trainer.optimizer.param_groups)
            self._rates = [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        """Take a step's values along, on the device; now and then write those of steps before."""
        step = trainer.state.optimizer_steps
        if step == self._step or not self._opened:
            return
        self._step = step
        if step % self.every_n_steps == 0:
            self._rows.append(Row("step", step, self._of_step(trainer), {}))
        if len(self._rows) - self._num_read > _TOGETHER or time.monotonic() - self._flushed > _SECONDS:
            self._flush()

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Take the figures along, and those that callbacks still add."""
        if not self._opened:
            return
        speed = trainer.speed
        assert speed is not None
        more = {
            "epoch": epoch + 1,
            "chips_per_second": speed.chips_per_second,
            "data_wait": speed.data_wait,
            "seconds": speed.seconds,
            "memory": _peak_memory(trainer.device),
        }
        self._rows.append(Row("epoch", trainer.state.optimizer_steps, logs, more))

    def state_dict(self) -> dict[str, Any]:
        """Return the run's name in the log, up to where it is written, and what is not."""
        if self._opened and self._ends_epoch:  # an epoch's figures have arrived: nothing is waited for
            self._flush(everything=True)
        self._settle()
        rows = [row for _, row in self._unsettled] + list(self._rows)
        return {
            "run_id": self.run_id,
            "written": self._written,
            "rows": [[row.kind, row.step, {**row.more, **row.values}] for row in rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.run_id, self._written = state["run_id"], state["written"]
        rows = state["rows"]
        self._rows = deque(Row(kind, step, {k: float(v) for k, v in values.items()}, {}) for kind, step, values in rows)
        self._unsettled.clear()
        self._restored = True

    def _of_step(self, trainer: Trainer) -> dict[str, Any]:
        rates = self._rates
        values: dict[str, Any] = {"train_loss": trainer.step_loss}
        values |= {"lr": rates[0]} if len(rates) == 1 else {f"lr/{i}": rate for i, rate in enumerate(rates)}
        if trainer.gradient_norm is not None:
            values["gradient_norm"] = trainer.gradient_norm
        if trainer.device.type == "cuda":
            values["memory"] = _peak_memory(trainer.device)
        return values

    @property
    def _ends_epoch(self) -> bool:
        return bool(self._rows) and self._rows[-1].kind == "epoch"

    def _flush(self, everything: bool = False) -> None:
        """Write what has arrived from the device and send the next values on their way.

        The last step is held back, as long as it is not known whether an epoch ends with it: so `rewind` to a step
        takes back the figures of that epoch, too.
        """
        self._flushed = time.monotonic()
        written = len(self._rows)
        if self._read is not None:
            self._write_read()
        everything = everything or self._ends_epoch
        self._num_read = len(self._rows) - (not everything) if self._rows else 0
        values = (v for row in list(self._rows)[: self._num_read] for v in row.values.values())
        tensors = [v for v in values if isinstance(v, Tensor)]
        if tensors:
            device = tensors[0].device
            self._read = reader(torch.stack([t.to(device).reshape(()) for t in tensors]))
        else:
            self._read = list
        if everything or not tensors or self._is_host(device):
            self._write_read()
        if len(self._rows) < written:
            self.flush()

    @staticmethod
    def _is_host(device: torch.device) -> bool:
        return device.type == "cpu"

    def _write_read(self) -> None:
        numbers = iter(self._read())
        self._read = None
        for _ in range(self._num_read):
            row = self._rows[0]
            values = {k: next(numbers) if isinstance(v, Tensor) else v for k, v in row.values.items()}
            row = row._replace(values={k: float(v) for k, v in {**row.more, **values}.items()}, more={})
            if row.step > self._there.get(row.kind, -1):
                self.write(row.step, {f"{row.kind}/{k}": v for k, v in row.values.items()})
            self._written = row.step
            self._rows.popleft()
            if self.settles:
                self._unsettled.append((self._flushed, row))
        self._num_read = 0
        self._settle()

    def _settle(self) -> None:
        before = time.monotonic() - self.settles
        while self._unsettled and self._unsettled[0][0] < before:
            self._unsettled.popleft()


def check_installed(logger: Logger, module: str, extra: str) -> None:
    """Raise if the package that a logger writes with is missing, naming what to install."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"{type(logger).__name__} needs {module}, which is not installed: pip install 'ununennium[{extra}]'"
        )


def set_aside(folder: Path, pattern: str) -> None:
    """Move what an earlier run has left in a folder to the first ``earlier-<n>`` in it that has no such files."""
    left = sorted(folder.glob(pattern))
    if not left:
        return
    number = 1
    while any((folder / f"earlier-{number}").glob(pattern)):
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir(exist_ok=True)
    for path in left:
        path.rename(aside / path.name)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested plain data as one level, names joined by points; lists of one thing are that thing."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def _peak_memory(device: torch.device) -> float:
    """Return the peak so far, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not everywhere

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
