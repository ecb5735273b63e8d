"""The one rule of what is better."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ununennium.training.errors import CheckpointError

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

Mode = Literal["auto", "min", "max"]


def is_better(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Tell whether a figure improves on the best so far.

    Parameters
    ----------
    value : float
        The new figure; NaN is never better.
    best : float or None
        The best so far; None if there is none.
    mode : {"min", "max"}
        Which direction is better.
    min_delta : float
        What it must be better by; an improvement of exactly ``min_delta`` is none, as in Keras.
    """
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def best_epoch(records: Iterable[tuple[int, Mapping[str, float]]], monitor: str, mode: str) -> tuple[int, float] | None:
    """Return the epoch that is the best by a figure, the first of equals, and its value; None if none has the figure.

    Parameters
    ----------
    records : iterable of (int, mapping)
        Numbers and figures of finished epochs.
    monitor : str
        The figure.
    mode : {"min", "max"}
        Which direction is better.
    """
    best: tuple[int, float] | None = None
    for epoch, logs in records:
        value = float(logs.get(monitor, math.nan))
        if is_better(value, None if best is None else best[1], mode):
            best = epoch, value
    return best


def monitored(callback: Any, logs: Mapping[str, float]) -> float:
    """Return the figure that a callback monitors.

    Raises
    ------
    ValueError
        If the logs don't have it.
    """
    if callback.monitor not in logs:
        raise not_in_logs(callback, logs)
    return logs[callback.monitor]


def not_in_logs(callback: Any, names: Iterable[str]) -> ValueError:
    """Return the error of a callback that monitors none of these names."""
    names = sorted(names)
    close = difflib.get_close_matches(callback.monitor, names, n=1)
    hint = f"Is {close[0]!r} meant?" if close else "Monitor one of these, or pass metrics=[…]"
    return ValueError(
        f"{type(callback).__name__} monitors {callback.monitor!r}, which is not in the logs; these are: {names}. {hint}"
    )


def check_mode(mode: str) -> None:
    """Raise unless ``mode`` is one of the three."""
    if mode not in ("auto", "min", "max"):
        raise ValueError(f'mode must be "auto", "min" or "max", got {mode!r}')


def check_monitor(callback: Any, state: Mapping[str, Any]) -> None:
    """Raise if what a callback remembers is the best of another figure."""
    there = state.get("monitor", callback.monitor)
    if there != callback.monitor:
        raise CheckpointError(
            f"the checkpoint's {type(callback).__name__} monitored {there!r}, this one {callback.monitor!r}, which its "
            "best can't be compared with: monitor the same, or take the weights alone with Trainer.load_weights"
        )


def resolve_mode(mode: str, monitor: str, trainer: Trainer) -> str:
    """Return "min" or "max"; "auto" is "max" for a metric that says higher is better, else "min"."""
    if mode != "auto":
        return mode
    return "max" if trainer.higher_is_better(monitor) else "min"
