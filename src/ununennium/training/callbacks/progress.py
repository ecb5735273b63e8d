"""A progress bar, and a table with a row an epoch."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ununennium.training.callbacks.base import Callback
from ununennium.training.callbacks.monitor import best_epoch, resolve_mode

if TYPE_CHECKING:
    from ununennium.training.speed import Speed
    from ununennium.training.trainer import Trainer

_EVERY = 0.1  # seconds between two drawings of the bar
_MUCH_WAITING = 0.3, 1.0  # the share of an epoch, and the seconds, above which it is worth a line
_ALWAYS = ("epoch", "train_loss", "val_loss", "time")


class ProgressCallback(Callback):
    """Show a bar over the batches of an epoch and a table row after it; without a terminal, the rows alone.

    The bar is tqdm's, on stderr, or in a notebook its widget: loss of the last batches, learning rate, chips a second.
    The loss is one that has already arrived on the host: the device never waits for the bar. The table goes to stdout:
    figures of training and validation, learning rate, chips a second, the share of training spent waiting for data
    (``wait``), and seconds; in a terminal, as many as fit. A star marks an epoch that was the best by then, by what
    `CheckpointCallback` or another callback monitors, else by ``val_loss``, or without validation ``train_loss``.

    If training waits for data for more than 30 % of an epoch, a line says once what to change.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._batches = 0  # that the bar does not show yet
        self._next = 0.0
        self._loss = _Arriving()
        self._columns: list[str] = []
        self._started = 0.0
        self._warned = False

    def on_train_start(self, trainer: Trainer) -> None:
        """Forget the table of an earlier run; say which seed this one has, and where it goes on."""
        self._columns, self._warned = [], False
        state = trainer.state
        if not trainer.resumes:
            where = ""
        elif state.epoch < trainer.epochs:
            where = f", going on after optimizer step {state.optimizer_steps} in epoch {state.epoch + 1}"
        else:
            where = f", finished: {state.epoch} of {trainer.epochs} epochs are trained"
        self._print(f"seed {state.seed}{where}")

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Open a bar."""
        from tqdm.auto import tqdm  # imported where it is used: `import ununennium.training` stays quick

        self._started = time.perf_counter()
        self._batches, self._next = 0, 0.0
        in_notebook = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)
        self._bar = tqdm(
            total=trainer.num_batches,
            initial=trainer.state.batch,
            desc=f"epoch {epoch + 1}/{trainer.epochs}",
            unit="batch",
            leave=False,
            disable=False if in_notebook else None,  # without a terminal
            dynamic_ncols=True,
            mininterval=0,
            miniters=0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        if self._bar.disable:
            self._next = float("inf")

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        """Advance the bar, and draw it now and then."""
        self._batches += 1
        now = time.perf_counter()
        if now < self._next:
            return
        self._next = now + _EVERY
        figures = []
        loss = self._loss.latest(logs["train_loss"])
        if loss is not None:
            figures.append(f"loss {_number(loss)}")
        rate = trainer.optimizer.param_groups[0]["lr"]
        if not isinstance(rate, Tensor) or rate.device.type == "cpu":
            figures.append(f"lr {float(rate):.1e}")
        figures.append(f"{_rate(trainer.running_speed.chips_per_second * trainer.world_size)} chips/s")
        self._bar.set_postfix_str(" ".join(figures), refresh=False)
        self._bar.update(self._batches)
        self._batches = 0

    @contextmanager
    def evaluation(self, trainer: Trainer) -> Iterator[None]:
        """Say on the bar that validation is under way."""
        bar = self._bar
        if bar is None or bar.disable:
            yield
            return
        before = bar.desc
        bar.update(self._batches)
        self._batches = 0
        bar.set_description(f"{before.removesuffix(': ')}, validating")
        try:
            yield
        finally:
            bar.set_description_str(before, refresh=False)

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Close the bar and print the row."""
        self._close()
        speed = trainer.speed
        assert speed is not None
        figures = [name for name in logs if "/" not in name]  # figures per class are too many
        cells = {
            "epoch": f"{epoch + 1}/{trainer.epochs}",
            **{name: _number(logs[name]) for name in sorted(figures, key=lambda n: n.partition("_")[2] != "loss")},
            "lr": f"{float(trainer.optimizer.param_groups[0]['lr']):.1e}",
            "chips/s": _rate(speed.chips_per_second),
            "wait": f"{speed.data_wait:.0%}",
            "time": f"{time.perf_counter() - self._started:.1f}s",
        }
        monitor, best = _monitored(trainer, logs), _best(trainer)
        star = monitor in logs and best is not None and best[0] == epoch
        widths = {name: max(len(name), len(cell), 8 if name in logs else 0) for name, cell in cells.items()}
        widths["epoch"] = max(widths["epoch"], 2 * len(str(trainer.epochs)) + 1)
        columns = _fitting(widths, [*_ALWAYS, monitor], _room())
        if columns != self._columns:
            self._columns = columns
            self._print(" ".join(name.rjust(widths[name]) for name in columns))
        row = " ".join(cells[name].rjust(widths[name]) for name in columns)
        self._print(row + (" *" if star else ""))
        if not self._warned and speed.data_wait > _MUCH_WAITING[0] and speed.waiting > _MUCH_WAITING[1]:
            self._warned = True
            self._print(_advice(speed, epoch, trainer.train_loader))

    def on_train_end(self, trainer: Trainer) -> None:
        """Close a bar that an error left open; say which epoch was the best."""
        self._close()
        best = _best(trainer)
        if self._columns and best is not None:
            epoch, monitor, value = best
            self._print(f"best {monitor} {_number(value)} in epoch {epoch + 1}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @staticmethod
    def _print(line: str) -> None:
        print(line, flush=True)


def _monitored(trainer: Trainer, logs: Mapping[str, float]) -> str:
    """Return the figure that tells which epoch is best."""
    watching = (c.monitor for c in sorted(trainer.callbacks.callbacks, key=lambda c: not c.saves_state))
    return next(name for name in (*watching, "val_loss", "train_loss") if name is not None and name in logs)


def _best(trainer: Trainer) -> tuple[int, str, float] | None:
    """Return the best finished epoch, the figure that tells and its value; None if there is none."""
    records = trainer.state.records
    if not records:
        return None
    monitor = _monitored(trainer, records[-1][1])
    given = [getattr(c, "mode", "auto") for c in trainer.callbacks.callbacks if c.monitor == monitor]
    mode = resolve_mode(next((m for m in given if m != "auto"), "auto"), monitor, trainer)
    best = best_epoch(records, monitor, mode)
    return None if best is None else (best[0], monitor, best[1])


def _fitting(widths: Mapping[str, int], needed: Sequence[str], room: int | None) -> list[str]:
    """Return the columns that fit, in order: those needed, then of validation, then how fast it goes, then the rest."""
    others = [name for name in widths if name not in needed]
    rank = {"wait": 0, "chips/s": 1, "lr": 3}
    others.sort(key=lambda name: rank.get(name, 2 if name.startswith("val_") else 4))
    chosen = {name for name in needed if name in widths}
    left = (room or sys.maxsize) - sum(widths[name] + 1 for name in chosen) - 1  # one for the star
    for name in others:
        if widths[name] + 1 > left:
            break
        chosen.add(name)
        left -= widths[name] + 1
    return [name for name in widths if name in chosen]


def _room() -> int | None:
    """Return how many columns the terminal has that the table goes to; None if there is none."""
    if not sys.stdout.isatty():
        return None
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _advice(speed: Speed, epoch: int, loader: Any, cores: int | None = None) -> str:
    workers = getattr(loader, "num_workers", None)
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    stored = "store chips to be read faster (tiled, ZSTD or LZ4, local disk)"
    if workers is None:
        remedy = "prepare the training batches in the background, as a DataLoader with num_workers does"
    elif workers == 0:
        remedy = f"give the training DataLoader num_workers={min(cores, 4)} (it has 0)"
    elif workers < cores:
        remedy = f"raise num_workers ({workers} of {cores} cores), or {stored}"
    else:
        remedy = f"{stored}; num_workers={workers} takes all {cores} cores"
    return f"waiting for data took {speed.data_wait:.0%} of epoch {epoch + 1}: {remedy}"


def _number(value: float) -> str:
    """Return four digits after the point, or of a number that is too big or small for that, four in all."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 or value != value else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


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
