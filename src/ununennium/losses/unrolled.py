"""The passes of the Dice loss compiled by PyTorch's inductor: one loop over the pixels each, its classes unrolled.

The number of images is a variable of the kernels, so that a short last batch compiles nothing.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ununennium.kernels import MOST_CHANNELS, PLAIN_INTEGERS, Kernels
from ununennium.losses.pixels import computing_dtype, refuse_strange_labels

_PIXELS = 1 << 14, 1 << 16  # of a piece of an image that is summed by itself: for all threads, and for accuracy


class Unrolled:
    """Compiled passes, made when they are first needed.

    Parameters
    ----------
    *args, **kwargs
        Of ``torch.compile``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kernels = Kernels("DiceLoss", *args, **kwargs)

    def suits(self, logits: Tensor, targets: Tensor) -> bool:
        """Tell whether there is a compiled pass for logits (B, C, N) and these targets."""
        return (
            not self._kernels.broken
            and not targets.is_floating_point()
            and 1 < logits.shape[1] <= MOST_CHANNELS
            and logits.numel() > 0
        )

    def sums(self, logits: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor | None:
        """Do what `pixels.sums` does, or return None if the compiler fails."""
        images, channels, pixels = logits.shape
        key, batch = self._prepared(logits, targets)
        of_pieces = self._kernels.run(_piece_sums, key, *batch, ignore_index, _pieces(pixels))
        if of_pieces is None:
            return None
        totals: Tensor = of_pieces.sum(2)[:, :images].contiguous()
        if logits.device.type != "cpu" or totals[-1].any():
            labels = targets.long()
            labels = labels if ignore_index is None else torch.where(labels == ignore_index, 0, labels)
            refuse_strange_labels(labels, channels, ignore_index)
        return totals[:-1].view(3, channels, images).transpose(1, 2).contiguous()

    def gradient(
        self, logits: Tensor, targets: Tensor, by_true: Tensor, by_all: Tensor, ignore_index: int | None
    ) -> Tensor | None:
        """Do what `pixels.gradient` does, or return None if the compiler fails."""
        key, batch = self._prepared(logits, targets, by_true, by_all)
        result: Tensor | None = self._kernels.run(_gradient, key, *batch, ignore_index, channels_last(batch[0]))
        return None if result is None else result[: len(logits)]

    def _prepared(self, logits: Tensor, targets: Tensor, *by_image: Tensor) -> tuple[tuple[object, ...], list[Tensor]]:
        """Return what the kernels for a batch are known by, and the batch as they take it."""
        if not channels_last(logits):
            logits = logits.contiguous()
        targets = (targets if targets.dtype in PLAIN_INTEGERS else targets.long()).contiguous()
        batch = [one.detach() for one in (logits, targets, *by_image)]
        key = logits.device.type, logits.dtype, targets.dtype, logits.shape[1], channels_last(logits)
        # Kernels for one image are others. They are not made for a last batch of one, which goes in twice instead.
        alone = len(logits) == 1 and not self._kernels.has(_piece_sums, (*key, False))
        if not alone:
            if len(logits) == 1:
                batch = [_twice(one) for one in batch]
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


def _pieces(pixels: int) -> int:
    """Return into how many equal pieces to cut an image: one if there is no such number."""
    least, most = _PIXELS
    return next((n for n in range(-(-pixels // most), pixels // least + 1) if pixels % n == 0), 1)


def _piece_sums(logits: Tensor, targets: Tensor, ignore_index: int | None, pieces: int) -> Tensor:
    """Return (3 C + 1, B, pieces): sums as of `pixels.sums`, and last the number of strange labels."""
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
    return torch.stack([of_pixels.view(len(logits), pieces, -1).sum(2) for of_pixels in every])


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
