"""Several metrics over the same batches."""

import copy
import itertools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ununennium.metrics.base import DerivedMetric, Source, flat
from ununennium.metrics.confusion import ConfusionMatrix


@runtime_checkable
class Metric(Protocol):
    """What a metric must have. Any torchmetrics metric does."""

    def update(self, outputs: Any, targets: Any, /) -> None:
        """Take in one batch."""

    def compute(self) -> Any:
        """Return the figure of all batches since the last reset: a number, a vector, or a dict of them."""

    def reset(self) -> None:
        """Forget all batches."""


class MetricCollection:
    """Named metrics over the same batches; those that need the same confusion matrix, or the same sums, share them.

    Parameters
    ----------
    metrics : iterable of Metric, or mapping of str to Metric
        Metrics of a list are named by their ``name`` or else by their class (``MeanSquaredError`` is
        ``mean_squared_error``). They are copied: the caller's objects stay as they are.

    Raises
    ------
    TypeError
        If something is not a metric.
    ValueError
        If two metrics have the same name.
    """

    def __init__(self, metrics: Iterable[Metric] | Mapping[str, Metric]) -> None:
        named = list(metrics.items()) if isinstance(metrics, Mapping) else [(_name(m), m) for m in metrics]
        self._metrics: dict[str, Metric] = {}
        shared: dict[Hashable, Source] = {}
        self._sources: list[Metric | Source] = []
        for name, metric in named:
            if isinstance(metric, type) or not isinstance(metric, Metric):
                raise TypeError(
                    f"metric {name!r} is {metric!r}, and must be an object with update, compute and reset, such as "
                    "IoU(num_classes=3)"
                )
            if name in self._metrics:
                raise ValueError(
                    f'two metrics are called {name!r}: pass a dict to name them, metrics={{"{name}": …, "{name}_2": …}}'
                )
            metric = self._metrics[name] = copy.deepcopy(metric)
            if not isinstance(metric, DerivedMetric) or type(metric).update is not DerivedMetric.update:
                self._sources.append(metric)  # it counts in its own way
                continue
            if metric.key not in shared:
                shared[metric.key] = metric.source
                self._sources.append(metric.source)
            metric.source = shared[metric.key]
        self._whole: dict[int, Any] = {}  # what was summed over all processes at the last compute

    def __len__(self) -> int:
        return len(self._metrics)

    def items(self) -> Iterable[tuple[str, Metric]]:
        """Return names and metrics."""
        return self._metrics.items()

    def names(self) -> list[str]:
        """Return the names that ``compute`` gives, as far as they are known before: of ours, all."""
        names = []
        for name, metric in self._metrics.items():
            names += metric.names(name) if isinstance(metric, DerivedMetric) else [name]
        return names

    def may_give(self, name: str) -> bool:
        """Tell whether ``compute`` may give a name that ``names`` can't know: ``name/part`` of another's metric."""
        return any(name.startswith(f"{own}/") for own, m in self._metrics.items() if not isinstance(m, DerivedMetric))

    def higher_is_better(self, name: str) -> bool | None:
        """Tell whether more is better for one of the names of ``compute``; None if the metric does not say."""
        owners = [own for own in self._metrics if name == own or name.startswith(f"{own}/")]
        return getattr(self._metrics[max(owners, key=len)], "higher_is_better", None) if owners else None

    @torch.no_grad()
    def update(self, outputs: Any, targets: Any) -> None:
        """Show one batch to every metric."""
        for source in self._sources:
            source.update(outputs, targets)

    def compute(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return every figure as a float; vectors and dicts as ``name/class`` or ``name/key``.

        Parameters
        ----------
        total : callable, optional
            Sums a tensor over several processes, so that figures are those of all. Metrics of torchmetrics ask the
            process group themselves; others have a method ``reduced(total)`` that returns the metric of all.

        Raises
        ------
        ValueError
            If a metric of classes has seen targets or predictions outside its classes; and what a metric that is not
            of this package raises.
        """
        whole: dict[int, Any] = {}
        if total is not None:
            whole = {id(s): s.reduced(total) for s in self._sources if hasattr(s, "reduced")}
        self._whole = whole
        figures: dict[str, float] = {}
        for name, metric in self._metrics.items():
            over_all: Any = whole.get(id(metric), metric)
            if isinstance(metric, DerivedMetric) and id(metric.source) in whole:
                over_all = metric.over(whole[id(metric.source)])
            if isinstance(over_all, DerivedMetric):
                figures |= over_all.figures(name)
            else:
                figures |= flat(name, over_all.compute(), getattr(metric, "class_names", None))
        return figures

    @property
    def confusion(self) -> ConfusionMatrix | None:
        """The first confusion matrix that a metric is read from, of all processes as of the last ``compute``."""
        own = next((s for s in self._sources if isinstance(s, ConfusionMatrix)), None)
        return self._whole.get(id(own), own)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, if a metric knows them."""
        known: Iterable[list[str] | None] = (getattr(m, "class_names", None) for m in self._metrics.values())
        return next((names for names in known if names), None)

    def check_reducible(self) -> None:
        """Raise for a metric whose figure can't be that of several processes.

        Raises
        ------
        TypeError
            Naming the metric, and what it lacks.
        """
        for source in self._sources:
            parts = source.modules() if isinstance(source, nn.Module) else ()
            if not hasattr(source, "reduced") and not any(hasattr(part, "sync") for part in parts):
                raise TypeError(
                    f"{type(source).__name__} can't be computed over several processes: give it a method "
                    "reduced(total) that returns the metric of all, where total(tensor) sums a tensor over them"
                )

    def compile(self) -> None:
        """Compile the counting of confusion matrices; see `ConfusionMatrix.compile`."""
        for source in self._sources:
            if isinstance(source, ConfusionMatrix):
                source.compile()

    def reset(self) -> None:
        """Reset every metric."""
        for source in self._sources:
            source.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what the metrics have counted so far: the live tensors, in plain data.

        Of a metric with neither ``state_dict`` nor PyTorch modules in it these are its attributes.

        Raises
        ------
        TypeError
            If what a metric has counted is no plain data, or in slots; the message names the metric.
        """
        return {"names": list(self._metrics), "states": [_state_of(source) for source in self._sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises
        ------
        ValueError
            If it is of other metrics.
        """
        if state["names"] != list(self._metrics) or len(state["states"]) != len(self._sources):
            raise ValueError(
                f"the counts are of the metrics {state['names']}, these are {list(self._metrics)}: pass the same"
            )
        for source, of_source in zip(self._sources, state["states"], strict=True):
            _take_over(source, of_source)

    def absorb(self, state: dict[str, Any]) -> None:
        """Add what another process has counted.

        Raises
        ------
        ValueError
            If there is a metric without a method ``absorb``: how its states add up nobody knows.
        """
        for source, of_source in zip(self._sources, state["states"], strict=True):
            if not hasattr(source, "absorb"):
                raise ValueError(
                    f"what several processes have counted for {type(source).__name__} can't be put together without a "
                    "method absorb(state), which adds what another's state_dict gave"
                )
            source.absorb(of_source)

    def to(self, device: torch.device) -> "MetricCollection":
        """Move metrics that keep their state on one device (torchmetrics); ours follow the batches."""
        for source in self._sources:
            if hasattr(source, "to"):
                source.to(device)
        return self


def _state_of(source: Any) -> dict[str, Any]:
    """Return what a metric remembers; torchmetrics keeps its sums out of ``state_dict`` unless told otherwise."""
    if isinstance(source, nn.Module):
        parts: list[Any] = [part for part in source.modules() if hasattr(part, "persistent")]
        for part in parts:
            part.persistent(True)
        updates = [getattr(part, "_update_count", 0) for part in parts]
        return {"module": dict(source.state_dict()), "updates": updates}
    kind = type(source)
    remedy = "give it state_dict and load_state_dict, which hand over what it has counted as plain data"
    if hasattr(source, "state_dict"):
        state, where = dict(source.state_dict()), f"in the state_dict of the metric {kind.__name__}"
    elif not hasattr(source, "__dict__") or any(vars(each).get("__slots__") for each in kind.__mro__):
        raise TypeError(
            f"the metric {kind.__name__} has __slots__, of which nobody knows what it has counted: {remedy}"
        )
    else:
        state, where = dict(vars(source)), f"of the metric {kind.__name__}"
    for name, value in state.items():
        if (strange := _strange_in(value)) is not None:
            raise TypeError(f"{name!r} {where} is or holds a {strange}, which no checkpoint does: {remedy}")
    return state


def _strange_in(value: Any) -> str | None:
    """Return the type of something that is no plain data, as checkpoints hold it; None if all is."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str) or isinstance(value, Tensor):
        return None
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biuf":
        return None
    if kind in (list, tuple, set, frozenset):
        return next(filter(None, map(_strange_in, value)), None)
    if kind in (dict, OrderedDict, Counter):
        return next(filter(None, map(_strange_in, itertools.chain(value, value.values()))), None)
    return f"{kind.__module__}.{kind.__qualname__}"


def _take_over(source: Any, state: dict[str, Any]) -> None:
    if isinstance(source, nn.Module):
        parts = [part for part in source.modules() if hasattr(part, "persistent")]
        source.load_state_dict(state["module"])
        for part, updates in zip(parts, state["updates"], strict=True):
            part._update_count = updates  # else torchmetrics takes the metric for one that was never updated
    elif hasattr(source, "load_state_dict"):
        source.load_state_dict(state)
    else:
        vars(source).update(state)


def _name(metric: Any) -> str:
    name = getattr(metric, "name", None)
    if isinstance(name, str):
        return name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(metric).__name__).lower()
