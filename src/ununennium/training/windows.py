"""Accumulation windows: which batches share an optimizer step, and what each counts for."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ununennium.training.batches import is_on_host, num_samples


def windows(batches: Iterable[Any], size: int) -> Iterator[tuple[Any, bool, bool]]:
    """Group batches into windows of ``size``; the last one may be shorter.

    Parameters
    ----------
    batches : iterable
        Whatever the loader yields. Inside a window it is read one ahead, because that a batch is the last of all shows
        only when no other follows; after a full window nothing has been read ahead.
    size : int
        Batches per window.

    Yields
    ------
    batch, opens, closes
        The batch, whether it is the first of its window, whether it is the last.
    """
    iterator = iter(batches)
    end = object()
    position = 0
    batch = next(iterator, end)
    while batch is not end:
        full = position == size - 1
        following = end if full else next(iterator, end)
        closes = full or following is end
        yield batch, position == 0, closes
        position = 0 if closes else position + 1
        batch = next(iterator, end) if full else following


_FEW = 4096  # class weights are fewer
Count = Callable[[Any, Any, Any], Tensor | float]


def target_counter(loss_fn: Any) -> Count:
    """Return a function that counts what a loss averages over in a batch: ``count(outputs, targets, batch)``.

    Asked in this order: a method ``target_count(outputs, targets)`` of the loss; its ``ignore_index`` (the targets
    that differ from it, each by the weight of its class where the loss has class weights, as PyTorch's cross-entropy
    averages); the number of samples. ``functools.partial`` and ``torch.nn.functional.cross_entropy`` are looked into.

    Raises
    ------
    ValueError
        If the loss sums or does not reduce, so that it is no mean.
    """
    reduction = loss_setting(loss_fn, "reduction")
    if reduction in ("sum", "none"):
        raise ValueError(
            f"the loss has reduction={reduction!r}; the Trainer needs a mean, to weight batches by what they hold: "
            "use reduction='mean'"
        )
    own = loss_setting(loss_fn, "target_count")
    if callable(own):
        return lambda outputs, targets, batch: num_samples(batch) if targets is None else own(outputs, targets)
    ignore_index = loss_setting(loss_fn, "ignore_index")
    if not isinstance(ignore_index, Integral):
        return lambda outputs, targets, batch: num_samples(batch)

    ignore_index = int(ignore_index)
    weighted = loss_setting(loss_fn, "weight") is not None

    def count_valid(outputs: Any, targets: Any, batch: Any) -> Tensor | float:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return num_samples(batch)  # class probabilities: nothing is ignored
        if is_on_host(targets) and not weighted:
            if targets.ndim == 1:
                return targets.numel() - targets.tolist().count(ignore_index)
            return int(np.count_nonzero(targets.numpy() != ignore_index))  # a fraction of what operators take
        labels: Tensor = targets.long()  # before comparing: among uint8 an ignore_index of -100 is 156
        valid = labels.ne(ignore_index)
        weight = loss_setting(loss_fn, "weight") if weighted else None
        if not isinstance(weight, Tensor):
            return valid.sum()
        return (weight.to(labels.device)[torch.where(valid, labels, 0)] * valid).sum()

    return count_valid


def loss_setting(loss_fn: Any, name: str) -> Any:
    """Return a loss's setting: its attribute, or what `functools.partial` gives it; None if it has none."""
    while isinstance(loss_fn, partial):
        if name in loss_fn.keywords:
            return loss_fn.keywords[name]
        loss_fn = loss_fn.func
    if name == "ignore_index" and loss_fn in (F.cross_entropy, F.nll_loss):
        return -100
    return getattr(loss_fn, name, None)


def loss_options(loss_fn: Any) -> dict[str, Any]:
    """Return the options that a loss was made with, as plain data: arguments of its constructor that it keeps.

    Of a `functools.partial` those that it gives. Learnable weights are no option, nor is what is no plain data.
    """
    options: dict[str, Any] = {}
    while isinstance(loss_fn, partial):
        options = {**loss_fn.keywords, **options}
        loss_fn = loss_fn.func
    if isinstance(loss_fn, nn.Module):
        names = inspect.signature(type(loss_fn)).parameters
        options |= {name: getattr(loss_fn, name) for name in names if hasattr(loss_fn, name)}
    plain: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel() <= _FEW:
            plain[name] = value.detach().tolist()
        elif isinstance(value, (bool, int, float, str, type(None))):
            plain[name] = value
    return plain
