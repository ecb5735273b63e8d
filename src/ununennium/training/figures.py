"""The figures of a pass over a loader: the mean loss, and the metrics."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ununennium.metrics import MetricCollection
from ununennium.training.batches import is_on_host
from ununennium.training.step import BatchResult

Gather = Callable[[Any], list[Any]]


def _alone(value: Any) -> list[Any]:
    return [value]


_GATHERED = 64  # batches whose losses are gathered on an accelerator before they are summed


class RunningMean:
    """Mean of values weighted by counts: sums of both, divided once; the device is not waited for before ``compute``.

    Sums are float64 (float32 on devices that lack it). A value whose count is 0 is nothing, NaN included: the mean
    of no targets is not a number, and not an error.

    Parameters
    ----------
    finite_only : bool, default False
        Leave values that are NaN or infinite out of the mean.

    Attributes
    ----------
    count : float
        What ``compute`` divided by.
    first_not_finite : int or None
        Number of the first value over a count above 0 that was NaN or infinite; known after ``compute``.
    """

    def __init__(self, finite_only: bool = False) -> None:
        self._finite_only = finite_only
        self._host = _Sums()
        self._values: list[Tensor] = []
        self._counts: list[Tensor | float] = []
        self._device: Tensor | None = None  # the same three sums, of values on an accelerator
        self._number = 0
        self.count: float = 0.0
        self.first_not_finite: int | None = None

    def update(self, value: Tensor, count: Tensor | float) -> None:
        """Take in a mean, a detached 0-dimensional tensor, over ``count`` targets."""
        if is_on_host(value):
            self._host.add(value.item(), count, self._number, self._finite_only)
            self._number += 1
            return
        self._values.append(value)
        self._counts.append(count)
        if len(self._values) == _GATHERED:
            self._gather()

    def compute(self, gather: Gather = _alone) -> float:
        """Return the mean, over all processes if ``gather`` asks them; NaN if nothing was counted."""
        if self._values:
            self._gather()
        own = self._host if self._device is None else self._host.and_those(_Sums(*self._device.tolist()))
        totals, counts, bads = zip(*gather(own.as_tuple()), strict=True)
        total, self.count, bad = math.fsum(totals), math.fsum(counts), min(bads)
        self.first_not_finite = None if math.isinf(bad) else int(bad)
        return total / self.count if self.count else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Return sums and what is not yet summed, as live tensors: sums in another order would have other bits."""
        return {
            "host": self._host.as_tuple(),
            "values": list(self._values),
            "counts": list(self._counts),
            "sums": self._device,
            "gathered": self._number,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what ``state_dict`` gave."""
        self._host = _Sums(*state.get("host", ()))
        self._values = [value.to(device) for value in state["values"]]
        self._counts = [c.to(device) if isinstance(c, Tensor) else c for c in state["counts"]]
        self._device = None if state["sums"] is None else state["sums"].to(device)
        self._number = state["gathered"]

    def absorb(self, state: dict[str, Any], device: torch.device) -> None:
        """Add the sums of another process."""
        other = RunningMean(self._finite_only)
        other.load_state_dict(state, device)
        for part in (self, other):
            if part._values:
                part._gather()
        self._host = self._host.and_those(other._host)
        if self._device is None or other._device is None:
            self._device = other._device if self._device is None else self._device
        else:
            both = self._device + other._device
            self._device = torch.stack([both[0], both[1], torch.minimum(self._device[2], other._device[2])])

    def _gather(self) -> None:
        device = self._values[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack(self._values).to(dtype)
        counts = torch.stack([c if isinstance(c, Tensor) else torch.tensor(c, dtype=dtype) for c in self._counts])
        counts = counts.to(device=device, dtype=dtype, non_blocking=True)
        numbers = torch.arange(self._number, self._number + len(values), device=device)
        finite = values.isfinite()
        bad = torch.where((counts > 0) & ~finite, numbers, torch.inf).min().to(dtype)
        if self._finite_only:
            counts = torch.where(finite, counts, 0)
        total, count = torch.where(counts > 0, values * counts, 0).sum(), counts.sum()
        if self._device is not None:
            total, count, bad = total + self._device[0], count + self._device[1], torch.minimum(bad, self._device[2])
        self._device = torch.stack([total, count, bad])
        self._number += len(values)
        self._values, self._counts = [], []


class _Sums:
    """The sum of values times their counts, that of the counts, and the number of the first value not finite."""

    def __init__(self, total: float = 0.0, count: float = 0.0, bad: float = math.inf) -> None:
        self.total, self.count, self.bad = total, count, bad

    def add(self, value: float, count: Tensor | float, number: int, finite_only: bool) -> None:
        count = float(count)
        if not count > 0:
            return
        if not math.isfinite(value):
            self.bad = min(self.bad, number)
            if finite_only:
                return
        self.total += value * count
        self.count += count

    def and_those(self, other: "_Sums") -> "_Sums":
        return _Sums(self.total + other.total, self.count + other.count, min(self.bad, other.bad))

    def as_tuple(self) -> tuple[float, float, float]:
        return self.total, self.count, self.bad


class Figures:
    """Mean loss and metrics over the batches of one pass.

    Parameters
    ----------
    prefix : str
        What their names in the logs begin with: ``train_`` or ``val_``.
    metrics : MetricCollection
        The metrics; the loss is always there.
    finite_only : bool, default False
        Leave losses that are NaN or infinite out of the mean.

    Attributes
    ----------
    loss : RunningMean
        The loss, over what it averages over.
    """

    def __init__(self, prefix: str, metrics: MetricCollection, finite_only: bool = False) -> None:
        self.prefix = prefix
        self.metrics = metrics
        self._finite_only = finite_only
        self.loss: RunningMean = RunningMean(finite_only)

    def reset(self) -> None:
        """Begin a pass."""
        self.loss = RunningMean(self._finite_only)
        self.metrics.reset()

    def update(self, result: BatchResult) -> None:
        """Take in one batch."""
        self.loss.update(result.loss, result.num_targets)
        if len(self.metrics):
            self.metrics.update(result.outputs, result.targets)

    def names(self) -> list[str]:
        """Return the names that ``compute`` gives, as far as they are known before."""
        return [self.prefix + name for name in ("loss", *self.metrics.names())]

    def compute(self, gather: Gather = _alone, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the figures of the pass by name; of all processes, given how to gather from them and how to sum."""
        figures = {"loss": self.loss.compute(gather), **self.metrics.compute(total)}
        return {self.prefix + name: value for name, value in figures.items()}

    def may_give(self, name: str) -> bool:
        """Tell whether there may be a figure of a name that ``names`` does not know."""
        return name.startswith(self.prefix) and self.metrics.may_give(name.removeprefix(self.prefix))

    def state_dict(self) -> dict[str, Any]:
        """Return what the pass has summed so far, as live tensors in plain data."""
        return {"loss": self.loss.state_dict(), "metrics": self.metrics.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on, on a device, from what ``state_dict`` gave.

        Raises
        ------
        ValueError
            If it is of other metrics.
        """
        self.metrics.load_state_dict(state["metrics"])
        self.metrics.to(device)
        self.loss.load_state_dict(state["loss"], device)

    def absorb(self, state: dict[str, Any], device: torch.device) -> None:
        """Add what another process has summed."""
        self.metrics.absorb(state["metrics"])
        self.loss.absorb(state["loss"], device)
