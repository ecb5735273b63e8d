"""Figures of regression, read from sums that they share."""

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ununennium.metrics.base import DerivedMetric, flat


class RegressionSums:
    """Sums over targets and errors, kept on the device of the predictions.

    They are float64 (float32 on devices that lack it). The targets' squared deviations are from their mean, and parts
    are put together as Chan et al. have it, so that targets far from zero lose nothing.

    Parameters
    ----------
    ignore_value : float, optional
        Target value that is left out. NaN always is.
    num_channels : int, optional
        Number of channels K, of which each has sums of its own; by default all values go into the same.

    References
    ----------
    T. F. Chan, G. H. Golub, R. J. LeVeque (1983), Algorithms for computing the sample variance: analysis and
    recommendations, The American Statistician 37(3).
    """

    def __init__(self, ignore_value: float | None = None, num_channels: int | None = None) -> None:
        left_out = None if ignore_value is None or math.isnan(ignore_value) else float(ignore_value)
        self.ignore_value: float | None = left_out
        self.num_channels = num_channels
        self._count = torch.zeros(num_channels or 1, dtype=torch.int64)
        # Rows: the targets' mean, their squared deviations from it, absolute errors, squared errors.
        self._sums = torch.zeros(4, num_channels or 1, dtype=torch.float64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch.

        Parameters
        ----------
        outputs : Tensor
            Predictions of the targets' shape, (B, K, …) of K channels; for one channel also (B, 1, …) and (B, …).
        targets : Tensor
            Numbers of any type. Where they are NaN or ``ignore_value``, predictions may be anything.

        Raises
        ------
        ValueError
            If shapes differ, or there are other channels than K.
        """
        outputs, targets = self._aligned(outputs, targets)
        with torch.no_grad():
            device = outputs.device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            valid = self._valid(targets, dtype)
            truth = torch.where(valid, targets.to(dtype), 0)
            error = torch.where(valid, outputs.to(dtype) - truth, 0)
            over = [dim for dim in range(truth.ndim) if dim != 1]
            count = valid.sum(over, keepdim=True)
            mean = truth.sum(over, keepdim=True) / count.clamp(min=1)
            deviations = torch.where(valid, truth - mean, 0)
            sums = [mean.flatten(), *(part.sum(over) for part in (deviations.square(), error.abs(), error.square()))]
            later = device.type != "cpu"  # from the host a copy need not be waited for
            self._count = self._count.to(device, non_blocking=later)
            self._sums = self._sums.to(dtype).to(device, non_blocking=later)
            self._add(count.flatten(), torch.stack(sums))

    def _aligned(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return both with the channels as dimension 1."""
        alike = outputs.shape == targets.shape
        for one, other in ((outputs, targets), (targets, outputs)):  # as losses of one channel are written
            alike |= one.ndim == other.ndim + 1 and one.shape == (*other.shape[:1], 1, *other.shape[1:])
        if not alike:
            raise ValueError(
                f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape: make them equal"
            )
        if self.num_channels is None or outputs.ndim != targets.ndim or outputs.ndim < 2:
            outputs, targets = outputs.reshape(-1, 1), targets.reshape(-1, 1)
        if outputs.shape[1] != (self.num_channels or 1):
            raise ValueError(
                f"the outputs have {outputs.shape[1]} channels, but the metric has channel_names for "
                f"{self.num_channels}: name each"
            )
        return outputs, targets

    def _valid(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        valid = ~targets.isnan()
        if self.ignore_value is None:
            return valid
        # PyTorch rounds the value as floating-point targets have it, but would compare integers in float32.
        return valid & ((targets if targets.is_floating_point() else targets.to(dtype)) != self.ignore_value)

    def _add(self, count: Tensor, sums: Tensor) -> None:
        """Add the sums of further values."""
        total = self._count + count
        share = count.to(sums.dtype) / total.clamp(min=1)
        apart = sums[0] - self._sums[0]
        both = self._sums + sums
        both[0] = self._sums[0] + apart * share
        both[1] += apart.square() * share * self._count
        self._count, self._sums = total, both

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sums of each channel (K,), on the CPU.

        Returns
        -------
        count, deviations, absolute, squared : Tensor
            Number of targets; their squared deviations from their mean, NaN if those are of rounding alone; absolute
            errors; squared errors. All float64.
        """
        eps = torch.finfo(self._sums.dtype).eps
        count, (mean, deviations, absolute, squared) = self._count.cpu().double(), self._sums.cpu().double()
        constant = deviations <= count * (8 * eps * mean).square()
        return count, deviations.masked_fill(constant, math.nan), absolute, squared

    def reset(self) -> None:
        """Start from zero."""
        self._count, self._sums = torch.zeros_like(self._count), torch.zeros_like(self._sums)

    def reduced(self, total: Callable[[Tensor], Tensor]) -> "RegressionSums":
        """Return the sums of all processes; ``total`` sums a tensor over them."""
        count, (mean, deviations, absolute, squared) = self._count.to(self._sums.dtype), self._sums
        counts, means, absolutes, squares = total(torch.stack([count, count * mean, absolute, squared]))
        means = means / counts.clamp(min=1)
        deviations = total(deviations + count * (mean - means.to(mean.device)).square())
        whole = RegressionSums(self.ignore_value, self.num_channels)
        whole._count, whole._sums = counts.round().long(), torch.stack([means, deviations, absolutes, squares])
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums so far: the live tensors."""
        return {"count": self._count, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from sums that ``state_dict`` gave.

        Raises
        ------
        ValueError
            If they are of other channels.
        """
        if state["sums"].shape != self._sums.shape:
            raise ValueError(
                f"the sums are of {state['sums'].shape[1]} channels, these of {self._sums.shape[1]}: make the metric "
                "with the channel_names that it had"
            )
        self._count, self._sums = state["count"].clone(), state["sums"].clone()

    def absorb(self, state: dict[str, Tensor]) -> None:
        """Add the sums of another process, as its ``state_dict`` gave them."""
        self._add(state["count"].to(self._count.device), state["sums"].to(self._sums))


class RegressionMetric(DerivedMetric):
    """A figure of predicted numbers.

    Parameters
    ----------
    ignore_value : float, optional
        Target value that is no data, and left out: -9999, say. Targets that are NaN always are. Where there is no
        target, the prediction may be anything, NaN too.
    channel_names : sequence of str, optional
        Names of the K channels of outputs and targets (B, K, …). The figure is then the mean over the channels that
        have targets, and beside it each channel has its own: ``mae`` and ``mae/height``. By default all values go into
        one figure.

    Raises
    ------
    TypeError
        If ``ignore_value`` is no number, or ``channel_names`` no sequence.
    ValueError
        If ``channel_names`` is one string, is empty, or has a name twice.

    Notes
    -----
    Figures are float64, from sums over all batches that are divided once; NaN if there were no targets. Metrics with
    the same ``ignore_value`` and number of channels share their sums inside a `MetricCollection`.
    """

    higher_is_better = False
    source: RegressionSums

    def __init__(self, *, ignore_value: float | None = None, channel_names: Sequence[str] | None = None) -> None:
        if channel_names is not None and (
            isinstance(channel_names, str) or not len(set(channel_names)) == len(channel_names) > 0
        ):
            raise ValueError(f"channel_names must be a list of different names, one a channel; got {channel_names!r}")
        self.channel_names: list[str] | None = None if channel_names is None else list(channel_names)
        self.source = RegressionSums(ignore_value, None if channel_names is None else len(channel_names))

    @property
    def key(self) -> Hashable:
        """Channels and ``ignore_value``."""
        return type(self.source), self.source.num_channels, self.source.ignore_value

    def compute(self) -> Tensor:
        """Return the figure, 0-dimensional, float64 on the CPU."""
        return self.compute_each().nanmean()

    def compute_each(self) -> Tensor:
        """Return the figure of each channel (K,), of all values (1,) without ``channel_names``; float64 on the CPU."""
        return self._figures(*self.source.compute())

    def names(self, name: str) -> list[str]:
        """Return the keys of ``figures``."""
        return [name, *(f"{name}/{channel}" for channel in self.channel_names or ())]

    def figures(self, name: str) -> dict[str, float]:
        """Return the figure under its name, and those of named channels as ``name/channel``."""
        of_channels = flat(name, self.compute_each(), self.channel_names) if self.channel_names else {}
        return super().figures(name) | of_channels

    @abstractmethod
    def _figures(self, count: Tensor, deviations: Tensor, absolute: Tensor, squared: Tensor) -> Tensor:
        """Return the figures of sums over targets; 0 / 0 is NaN."""


class MAE(RegressionMetric):
    """Mean absolute error, in the targets' units.

    See `RegressionMetric` for the parameters.
    """

    name = "mae"

    def _figures(self, count: Tensor, deviations: Tensor, absolute: Tensor, squared: Tensor) -> Tensor:
        return absolute / count


class RMSE(RegressionMetric):
    """Root-mean-square error, in the targets' units.

    See `RegressionMetric` for the parameters.

    Examples
    --------
    >>> rmse = RMSE(ignore_value=-9999)
    >>> rmse.update(torch.tensor([1.0, 4.0, 7.0]), torch.tensor([1.0, 2.0, -9999.0]))
    >>> rmse.compute()
    tensor(1.4142, dtype=torch.float64)
    """

    name = "rmse"

    def _figures(self, count: Tensor, deviations: Tensor, absolute: Tensor, squared: Tensor) -> Tensor:
        return (squared / count).sqrt()


class R2(RegressionMetric):
    """Coefficient of determination R²: 1 - Σ(target - prediction)² / Σ(target - mean target)².

    NaN where the targets are all alike (or but one), of which nothing is to be explained. Of channels whose levels
    differ, name the channels: over all values together, the levels alone would be explained variance. See
    `RegressionMetric` for the parameters.
    """

    name = "r2"
    higher_is_better = True

    def _figures(self, count: Tensor, deviations: Tensor, absolute: Tensor, squared: Tensor) -> Tensor:
        return 1 - squared / deviations
