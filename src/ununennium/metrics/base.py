"""What figures have in common that are read from sums which others may be read from, too."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol, Self

from torch import Tensor


class Source(Protocol):
    """Exact sums over batches: a `ConfusionMatrix`, `RegressionSums`."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch."""

    def reset(self) -> None:
        """Start from zero."""

    def reduced(self, total: Callable[[Tensor], Tensor]) -> Self:
        """Return the sums of all processes; ``total`` sums a tensor over them."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums so far: the live tensors."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from sums that ``state_dict`` gave."""

    def absorb(self, state: dict[str, Tensor]) -> None:
        """Add the sums of another process, as its ``state_dict`` gave them."""


class DerivedMetric(ABC):
    """A figure that is read from a source; inside a `MetricCollection`, metrics of one ``key`` share one source.

    Attributes
    ----------
    source : Source
        Where the figure is read from.
    """

    name: str
    higher_is_better: bool
    source: Source

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """What sources must have in common for the figure to be the same over one as over the other."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch; see `ConfusionMatrix.update` and `RegressionSums.update`."""
        self.source.update(outputs, targets)

    @abstractmethod
    def compute(self) -> Tensor:
        """Return the figure, float64 on the CPU."""

    def reset(self) -> None:
        """Start from zero."""
        self.source.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the source's sums so far: the live tensors."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from sums that ``state_dict`` gave; see the source's ``load_state_dict``."""
        self.source.load_state_dict(state)

    def absorb(self, state: dict[str, Tensor]) -> None:
        """Add the sums of another process, as its ``state_dict`` gave them."""
        self.source.absorb(state)

    def reduced(self, total: Callable[[Tensor], Tensor]) -> Self:
        """Return the figure of all processes; ``total`` sums a tensor over them."""
        return self.over(self.source.reduced(total))

    def over(self, source: Source) -> Self:
        """Return the same figure over another source."""
        twin = copy.copy(self)
        twin.source = source
        return twin

    def names(self, name: str) -> list[str]:
        """Return the keys of ``figures``."""
        return [name]

    def figures(self, name: str) -> dict[str, float]:
        """Return what stands in the logs: the figure, and those of classes or channels as ``name/class``."""
        return flat(name, self.compute())


def flat(name: str, value: Any, parts: Iterable[str] | None = None) -> dict[str, float]:
    """Return a number as ``{name: value}``, a vector and a dict with ``name/part`` for each item."""
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in flat(f"{name}/{key}", item).items()}
    if isinstance(value, Tensor) and value.ndim:
        values = value.flatten().tolist()
        return {f"{name}/{part}": float(v) for part, v in zip(parts or range(len(values)), values, strict=True)}
    return {name: float(value)}
