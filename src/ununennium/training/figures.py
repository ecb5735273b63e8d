"""The figures of a pass over a loader: the mean loss, and the metrics."""

import math

import torch
from torch import Tensor

from ununennium.metrics import MetricCollection
from ununennium.training.step import BatchResult

_GATHERED = 64  # batches whose losses are gathered before they are summed, so that a step costs two list appends


class RunningMean:
    """Mean of values weighted by counts: sums of both, divided once; the device is not waited for before ``compute``.

    Sums are float64 (float32 on devices that lack it). A value whose count is 0 is nothing, NaN included: the mean
    of no targets is not a number, and not an error.

    Attributes
    ----------
    count : float
        What ``compute`` divided by.
    first_not_finite : int or None
        Number of the first value over a count above 0 that was NaN or infinite; known after ``compute``.
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._counts: list[Tensor | int] = []
        self._sums: Tensor | None = None
        self._gathered = 0
        self.count = 0.0
        self.first_not_finite: int | None = None

    def update(self, value: Tensor, count: Tensor | int) -> None:
        """Take in a mean, a detached 0-dimensional tensor, over ``count`` targets."""
        self._values.append(value)
        self._counts.append(count)
        if len(self._values) == _GATHERED:
            self._gather()

    def compute(self) -> float:
        """Return the mean; NaN if nothing was counted."""
        if self._values:
            self._gather()
        if self._sums is None:
            return float("nan")
        total, self.count, bad = self._sums.tolist()
        self.first_not_finite = None if math.isinf(bad) else int(bad)
        return total / self.count if self.count else float("nan")

    def _gather(self) -> None:
        device = self._values[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack(self._values).to(dtype)
        counts = torch.stack([c if isinstance(c, Tensor) else torch.tensor(c) for c in self._counts])
        counts = counts.to(device=device, dtype=dtype, non_blocking=True)
        numbers = torch.arange(self._gathered, self._gathered + len(values), device=device)
        bad = torch.where((counts > 0) & ~values.isfinite(), numbers, torch.inf).min().to(dtype)
        total, count = torch.where(counts > 0, values * counts, 0).sum(), counts.sum()
        if self._sums is not None:
            total, count, bad = total + self._sums[0], count + self._sums[1], torch.minimum(bad, self._sums[2])
        self._sums = torch.stack([total, count, bad])
        self._gathered += len(values)
        self._values, self._counts = [], []


class Figures:
    """Mean loss and metrics over the batches of one pass.

    Parameters
    ----------
    prefix : str
        What their names in the logs begin with: ``train_`` or ``val_``.
    metrics : MetricCollection
        The metrics; the loss is always there.

    Attributes
    ----------
    loss : RunningMean
        The loss, over what it averages over.
    """

    def __init__(self, prefix: str, metrics: MetricCollection) -> None:
        self.prefix = prefix
        self.metrics = metrics
        self.loss = RunningMean()

    def reset(self) -> None:
        """Begin a pass."""
        self.loss = RunningMean()
        self.metrics.reset()

    def update(self, result: BatchResult) -> None:
        """Take in one batch."""
        self.loss.update(result.loss, result.num_targets)
        if len(self.metrics):
            self.metrics.update(result.outputs, result.targets)

    def names(self) -> list[str]:
        """Return the names that ``compute`` gives, as far as they are known before."""
        return [self.prefix + name for name in ("loss", *self.metrics.names())]

    def compute(self) -> dict[str, float]:
        """Return the figures of the pass by name."""
        figures = {"loss": self.loss.compute(), **self.metrics.compute()}
        return {self.prefix + name: value for name, value in figures.items()}
