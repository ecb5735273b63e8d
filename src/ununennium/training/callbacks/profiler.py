"""A look into a few steps with PyTorch's profiler."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ununennium._arguments import integer
from ununennium.training.callbacks.base import Callback
from ununennium.training.checkpoint import whole_or_absent

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer


class ProfilerCallback(Callback):
    """Record a few steps with `torch.profiler`: a trace for a browser, and a table of what took longest.

    Steps are those of this ``fit``, counted from 0, each with all batches that it accumulates. Other steps cost
    nothing. What goes wrong in it becomes a warning, and the run goes on.

    Parameters
    ----------
    path : str or Path
        The folder, made if need be. ``trace-0.json`` opens in https://ui.perfetto.dev or chrome://tracing, and
        ``trace-0.txt`` is the table; the number is that of the process. Those of an earlier run are replaced.
    first_step, last_step : int, default 10 and 12
        The steps to record, the last one included: of a run that is warm.
    num_operators : int, default 20
        Rows of the table.
    all_processes : bool, default False
        Record in every process. By default process 0 alone does.
    record_shapes, with_stack : bool, default False
        Record shapes of operators' inputs, and where in the source they were called: both slow the steps down.

    Raises
    ------
    TypeError, ValueError
        If a number is no integer, or out of range.
    """

    def __init__(
        self,
        path: str | Path,
        first_step: int = 10,
        last_step: int = 12,
        *,
        num_operators: int = 20,
        all_processes: bool = False,
        record_shapes: bool = False,
        with_stack: bool = False,
    ) -> None:
        minima = {"first_step": (first_step, 0), "last_step": (last_step, 0), "num_operators": (num_operators, 1)}
        for name, (value, minimum) in minima.items():
            integer(name, value, minimum)
        if last_step < first_step:
            raise ValueError(f"last_step must be at least first_step, got {last_step} and {first_step}")
        self.path: Path = Path(path).expanduser().absolute()  # wherever the process goes meanwhile
        self.first_step = first_step
        self.last_step = last_step
        self.num_operators = num_operators
        self.all_processes = all_processes
        self.record_shapes = record_shapes
        self.with_stack = with_stack
        self._profiler: Any = None
        self._step: int | None = None  # None when there is nothing more to record

    def on_train_start(self, trainer: Trainer) -> None:
        """Begin to count."""
        self._step = 0 if self.all_processes or trainer.rank == 0 else None

    def on_batch_start(self, trainer: Trainer, batch_idx: int) -> None:
        """Begin to record before the first step, one step early if there is one, for the profiler to warm up in."""
        if self._step is None or self._profiler is not None or trainer.state.open_batches:
            return
        if self._step >= max(self.first_step - 1, 0):
            self._guarded(lambda: self._begin(self.first_step - self._step))  # type: ignore[operator]

    def on_batch_end(self, trainer: Trainer, batch_idx: int, logs: Mapping[str, Tensor]) -> None:
        """Count, and end with the last step."""
        if self._step is None or trainer.state.open_batches:
            return
        self._step += 1
        if self._profiler is not None:
            last = self._step > self.last_step
            self._guarded(lambda: self._end(trainer) if last else self._profiler.step())

    def on_train_end(self, trainer: Trainer) -> None:
        """Write what there is of a run that was shorter."""
        if self._profiler is not None:
            self._guarded(lambda: self._end(trainer))
        self._step = None

    def _begin(self, warmup: int) -> None:
        from torch import profiler

        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]  # it would be cut off
            raise RuntimeError("another profiler is running: end it before fit, or leave one of the two out")
        activities = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(profiler.ProfilerActivity.CUDA)
        active = self.last_step - self.first_step + 1
        schedule = profiler.schedule(wait=0, warmup=warmup, active=active, repeat=1) if warmup else None
        made = profiler.profile(
            activities=activities,
            schedule=schedule,
            record_shapes=self.record_shapes,
            with_stack=self.with_stack,
            acc_events=True,
        )
        made.start()
        self._profiler = made

    def _end(self, trainer: Trainer) -> None:
        made, self._profiler, self._step = self._profiler, None, None
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)  # for the last step's work to be in the trace
        made.stop()
        by = "self_device_time_total" if trainer.device.type != "cpu" else "self_cpu_time_total"
        table = made.key_averages().table(sort_by=by, row_limit=self.num_operators)
        with whole_or_absent(self.path / f"trace-{trainer.rank}.json") as aside:
            made.export_chrome_trace(str(aside))
        with whole_or_absent(self.path / f"trace-{trainer.rank}.txt") as aside:
            aside.write_text(table, encoding="utf-8")

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            profiler, self._profiler, self._step = self._profiler, None, None
            if profiler is not None:
                try:
                    profiler.stop()
                except Exception as again:
                    error.add_note(f"and it could not be stopped: {again}")
            warnings.warn(
                f"the steps could not be profiled ({type(error).__name__}: {error}); the run goes on", stacklevel=3
            )
