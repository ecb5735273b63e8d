"""A progress bar, and a table with a row an epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ununennium.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_WIDTH = 10


class ProgressCallback(Callback):
    """Show a bar over the batches of an epoch and a table row after it; without a terminal, the rows alone.

    The bar is tqdm's, on stderr; the table goes to stdout. The loss on the bar is one that has already arrived on the
    host: the device never waits for the bar.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._loss = _Arriving()
        self._columns: list[str] = []
        self._started = 0.0

    def on_train_start(self, trainer: Trainer) -> None:
        """Forget the table of an earlier run; say which seed this one has, and where it goes on."""
        self._columns = []
        state = trainer.state
        where = f", going on after optimizer step {state.optimizer_steps} in epoch {state.epoch + 1}"
        self._print(f"seed {state.seed}{where if trainer.resumes else ''}")

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Open a bar."""
        from tqdm.auto import tqdm  # imported where it is used: `import ununennium.training` stays quick

        self._started = time.perf_counter()
        self._bar = tqdm(
            total=trainer.num_batches,
            initial=trainer.state.batch,
            desc=f"epoch {epoch + 1}/{trainer.epochs}",
            unit="batch",
            leave=False,
            disable=None,  # without a terminal
            dynamic_ncols=True,
        )

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        """Advance the bar; when it was drawn, ask for a loss to show next time."""
        if self._bar.update(1):
            loss = self._loss.latest(logs["train_loss"])
            if loss is not None:
                self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Close the bar and print the row."""
        self._bar.close()
        figures = {name: value for name, value in logs.items() if "/" not in name}  # figures per class are too many
        columns = ["epoch", *figures, "lr", "seconds"]
        if columns != self._columns:
            self._columns = columns
            self._print(" ".join(name.rjust(_WIDTH) for name in columns))
        cells = [f"{epoch + 1}/{trainer.epochs}", *(f"{value:.4f}" for value in figures.values())]
        cells += [f"{trainer.optimizer.param_groups[0]['lr']:.2e}", f"{time.perf_counter() - self._started:.1f}"]
        self._print(" ".join(cell.rjust(max(_WIDTH, len(name))) for cell, name in zip(cells, columns, strict=True)))

    def on_train_end(self, trainer: Trainer) -> None:
        """Close a bar that an error left open."""
        if self._bar is not None:
            self._bar.close()

    @staticmethod
    def _print(line: str) -> None:
        print(line, flush=True)


class _Arriving:
    """Numbers on their way from the device: copied without waiting, read once they are there."""

    def __init__(self) -> None:
        self._value: float | None = None
        self._host: Tensor | None = None
        self._copied: Any = None

    def latest(self, value: Tensor) -> float | None:
        """Send a 0-dimensional tensor on its way and return the newest that has arrived."""
        if value.device.type == "cpu":
            return float(value)
        if value.device.type != "cuda":
            return None
        if self._host is not None and self._copied.query():
            self._value, self._host = float(self._host), None
        if self._host is None:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._value
