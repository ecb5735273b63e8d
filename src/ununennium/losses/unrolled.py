"""The passes of the Dice loss compiled by PyTorch's inductor: one loop over the pixels each, its classes unrolled.

The number of images is a variable of the kernels, so that a short last batch compiles nothing.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ununennium.kernels import MOST_CHANNELS, Kernels, plain
from ununennium.losses.pixels import computing_dtype, loss_of_sums, refuse_strange_labels


class Unrolled:
    """Compiled passes, made when they are first needed.

    Parameters
    ----------
    *args, **kwargs
        Of ``torch.compile``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kernels = Kernels("DiceLoss", *args, **kwargs)

    def _suits(self, logits: Tensor, targets: Tensor) -> bool:
        """Tell whether there is a compiled pass for logits (B, C, N) and these targets."""
        return (
            not self._kernels.broken
            and not targets.is_floating_point()
            and 1 < logits.shape[1] <= MOST_CHANNELS
            and logits.numel() > 0
        )

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        ignore_index: int | None,
        smooth: float,
        per_image: bool,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Do what `pixels.sums` and `pixels.loss_of_sums` do, or return None where there is no compiled pass."""
        if not self._suits(logits, targets):
            return None
        images, channels = logits.shape[:2]
        key, batch = self._prepared(_loss, logits, targets)
        result = self._kernels.run(_loss, key, *batch, weight, ignore_index, smooth, per_image)
        if result is None:
            return None
        found, sums, strange = result
        if logits.device.type != "cpu" or strange:
            labels = targets.long()
            labels = labels if ignore_index is None else torch.where(labels == ignore_index, 0, labels)
            refuse_strange_labels(labels, channels, ignore_index)
        if len(batch[0]) == images:
            loss, by_true, by_all = found
            return loss, by_true, by_all
        return loss_of_sums(sums[:, :images], weight, smooth, per_image)

    def gradient(
        self, logits: Tensor, targets: Tensor, by_true: Tensor, by_all: Tensor, ignore_index: int | None
    ) -> Tensor | None:
        """Do what `pixels.gradient` does, or return None where there is no compiled pass."""
        if not self._suits(logits, targets):
            return None
        key, batch = self._prepared(_gradient, logits, targets, by_true, by_all)
        result: Tensor | None = self._kernels.run(_gradient, key, *batch, ignore_index, channels_last(batch[0]))
        return None if result is None else result[: len(logits)]

    def _prepared(
        self, kernel: Callable[..., Any], logits: Tensor, targets: Tensor, *by_image: Tensor
    ) -> tuple[tuple[object, ...], list[Tensor]]:
        """Return what a kernel for a batch is known by, and the batch as it takes it."""
        if not channels_last(logits):
            logits = logits.contiguous()
        targets = plain(targets).contiguous()
        batch = [one.detach() for one in (logits, targets, *by_image)]  # a view would be compiled with its base
        key = logits.device.type, logits.dtype, targets.dtype, logits.shape[1], channels_last(logits)
        # Kernels for one image are others. They are not made for a last batch of one, which goes in twice instead.
        alone = len(logits) == 1 and not self._kernels.has(_loss, (*key, False))
        if not alone:
            if len(logits) == 1:
                batch = [_twice(one) for one in batch]
            if not self._kernels.has(kernel, (*key, alone)):
                for one in batch:
                    torch._dynamo.maybe_mark_dynamic(one, 0)
        return (*key, alone), batch


def channels_last(logits: Tensor) -> bool:
    """Tell whether the channels of (B, C, N) come last in memory, without gaps."""
    return logits.shape[2] > 1 and logits.transpose(1, 2).is_contiguous()


def _twice(one: Tensor) -> Tensor:
    """Return a batch of one twice, in the same memory format."""
    if one.ndim == 3 and channels_last(one):
        return torch.cat([one.transpose(1, 2)] * 2).transpose(1, 2)
    return torch.cat([one, one])


def _loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    smooth: float,
    per_image: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Return what `pixels.loss_of_sums` gives, the sums (3, B, C), and the number of strange labels."""
    labels, valid = _labels(targets, logits.shape[1], ignore_index)
    probabilities = _probabilities(logits, valid)
    one, none = probabilities[0].new_ones(()), probabilities[0].new_zeros(())
    is_class = [labels == c for c in range(len(probabilities))]
    every = [
        *(torch.where(own, p, none) for p, own in zip(probabilities, is_class, strict=True)),
        *probabilities,
        *(torch.where(own, one, none) for own in is_class),
        torch.where((labels < 0) | (labels == len(probabilities)), one, none),
    ]
    totals = torch.stack([of_pixels.sum(1) for of_pixels in every])  # as a cascade, by inductor
    sums = totals[:-1].view(3, len(probabilities), -1).transpose(1, 2).contiguous()
    return loss_of_sums(sums, weight, smooth, per_image), sums, totals[-1].sum()


def _gradient(
    logits: Tensor,
    targets: Tensor,
    by_true: Tensor,
    by_all: Tensor,
    ignore_index: int | None,
    last: bool,
) -> Tensor:
    """Return the gradient of `pixels.gradient`, with the channels last in memory or not."""
    labels, valid = _labels(targets, logits.shape[1], ignore_index)
    probabilities = _probabilities(logits, valid)
    slopes = [
        every.unsqueeze(1) + torch.where(labels == c, true.unsqueeze(1), 0)
        for c, (true, every) in enumerate(zip(by_true.unbind(1), by_all.unbind(1), strict=True))
    ]
    mean = reduce(torch.add, [p * s for p, s in zip(probabilities, slopes, strict=True)])
    rows = [(p * (s - mean)).to(logits.dtype) for p, s in zip(probabilities, slopes, strict=True)]
    return torch.stack(rows, 2).transpose(1, 2) if last else torch.stack(rows, 1)


def _labels(targets: Tensor, classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """Return int32 labels, -1 or C where they are strange and C + 1 where ignored, and where they are valid."""
    labels = targets.long()
    narrow = labels.clamp(-1, classes)  # in 64 bits: else 2³² + 1 would become 1
    if ignore_index is None:
        return narrow.int(), None
    narrow = torch.where(labels == ignore_index, classes + 1, narrow).int()
    return narrow, narrow <= classes


def _probabilities(logits: Tensor, valid: Tensor | None) -> list[Tensor]:
    rows = [row.to(computing_dtype(logits)) for row in logits.unbind(1)]
    if valid is not None:  # before softmax, so that not even NaN gets out of an ignored pixel
        rows = [_where(valid, row) for row in rows]
    highest = reduce(torch.maximum, rows)
    powers = [(row - highest).exp() for row in rows]
    share = 1 / reduce(torch.add, powers)
    if valid is not None:
        share = torch.where(valid, share, 0)
    return [power * share for power in powers]


def _where(valid: Tensor, row: Tensor) -> Tensor:
    """Return a row, 0 where not valid."""
    if row.stride(1) != 1:
        return torch.where(valid, row, 0)
    bits = torch.int64 if row.dtype == torch.float64 else torch.int32
    return (row.view(bits) & -valid.to(bits)).view(row.dtype)  # half as dear, where inductor makes vectors of it
