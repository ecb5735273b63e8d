"""The confusion matrix: exact counts on the device of the predictions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ununennium._arguments import integer
from ununennium.kernels import MOST_CHANNELS, Kernels, plain

_UINT8, _INT16 = 255, 32767
_NARROW = (_UINT8, torch.uint8), (_INT16, torch.int16)
_FEW = 1 << 16  # elements, for which PyTorch's own maximum is the quickest
_FEW_PIXELS = 1 << 12  # of an image, for which a call of a kernel takes longer than it saves
_ELEMENTS = 1 << 19  # of a tile, which fits the cache


def _highest(outputs: Tensor) -> Tensor:
    """Return the first channel with the highest value, uint8, of logits (B, C, …) on the CPU, C at most 255.

    What ``outputs.max(1).indices`` gives, NaN being the highest, in a fraction of its time: where a channel equals the
    highest value it counts C less its number, and the greatest count is the first such channel's. All of that in the
    type of the logits, as only there PyTorch's comparison works on vectors.
    """
    channels = outputs.shape[1]
    found = torch.empty(outputs.numel() // channels, dtype=torch.uint8)
    weights = torch.arange(channels, 0, -1, dtype=outputs.dtype).unsqueeze(1)
    room = outputs.new_empty(max(_ELEMENTS, channels))
    start = 0
    for tile in _tiles(outputs, max(_ELEMENTS // channels, 1)):
        rows = counts = room[: tile.numel()].view(tile.shape)
        if tile.stride(0) == 1:  # channels last: turned round, which is quickest channel by channel
            torch.stack(tile.unbind(0), out=rows)
        else:
            rows = tile
        torch.eq(rows, rows.amax(0), out=counts)
        index = found[start : start + counts[0].numel()]
        index.copy_(counts.flatten(1).mul_(weights).amax(0))
        if not index.all():  # NaN equals nothing
            index.copy_(channels - tile.flatten(1).max(0).indices)
        start += len(index)
    return found.neg_().add_(channels).reshape(outputs.shape[0], *outputs.shape[2:])


def _tiles(outputs: Tensor, most: int) -> Iterator[Tensor]:
    """Yield (C, …) of at most so many pixels, in their order: parts of an image, or several small ones."""
    rows = outputs.movedim(1, -1)
    if rows.is_contiguous():
        yield from rows.reshape(-1, outputs.shape[1]).t().split(most, 1)
        return
    images = outputs.flatten(2) if outputs.ndim > 2 else outputs.unsqueeze(2)
    pixels = images.shape[2]
    if pixels >= most:
        for image in images:
            yield from image.split(most, 1)
    elif pixels:
        yield from images.transpose(0, 1).split(most // pixels, 1)


def _cells(rows: Tensor, labels: Tensor, ignored: int | None, is_small: bool) -> Tensor:
    """Return the cells of a confusion matrix (N,) that has a last row of ignored pixels, from logits (C, N)."""
    classes = len(rows)
    top, index = rows[0], torch.zeros_like(labels, dtype=torch.int32)
    for channel in range(1, classes):
        row = rows[channel]
        higher = (row > top) | ((row != row) & (top == top))  # NaN is the highest
        top, index = torch.where(higher, row, top), torch.where(higher, channel, index)
    wide = labels.long()
    line = wide.clamp(-1, classes) + 1
    if ignored is not None:
        line = torch.where(wide == ignored, classes + 2, line)
    return (line.int() * (classes + 1) + index).to(torch.uint8 if is_small else torch.int16)


class ConfusionMatrix:
    """Exact counts of (true class, predicted class) pairs, kept on the device of the predictions.

    Parameters
    ----------
    num_classes : int
        Number of classes C, at least 2.
    ignore_index : int, optional
        Target value that is left out, inside or outside 0 … C-1.

    Raises
    ------
    TypeError
        If one of them is no integer.
    ValueError
        If ``num_classes`` is less than 2.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        self.num_classes: int = integer("num_classes", num_classes)
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (one class is two: it and the rest), got {num_classes!r}")
        self.ignore_index: int | None = None if ignore_index is None else integer("ignore_index", ignore_index)
        # Rows: below 0, the classes, above C-1. Columns: the classes, outside. So that a wrong label or prediction
        # costs a row or a column and not a synchronisation.
        self._counts = torch.zeros((self.num_classes + 2) * (self.num_classes + 1), dtype=torch.int64)
        self._ignored = torch.zeros((), dtype=torch.int64)
        self._kernels: Kernels | None = None

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count one batch.

        Parameters
        ----------
        outputs : Tensor
            Logits or probabilities (B, C, …); for two classes also one logit (B, 1, …), above 0
            for class 1; or integer predictions of the targets' shape.
        targets : Tensor
            Integer classes (B, …) of any integer type or bool; for one logit also (B, 1, …).

        Raises
        ------
        ValueError
            If shapes don't fit or the outputs have another number of classes.
        """
        self._check(outputs, targets)
        with torch.no_grad():
            if self._counts.device != targets.device:
                self._counts, self._ignored = self._counts.to(targets.device), self._ignored.to(targets.device)
            if not self._count_compiled(outputs, targets):
                self._count(self._predictions(outputs), targets)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the way from logits to counts in place: two to four times quicker on a CPU once compiled.

        The counts are the same. It is compiled with the first batches, which takes seconds; a new batch size compiles
        nothing, a second size of images once more. Images of few pixels, more than 32 classes and what is not on the
        CPU are counted without; so is everything, after a warning, where the compiler fails.

        Parameters
        ----------
        *args, **kwargs
            Of ``torch.compile``.
        """
        self._kernels = Kernels("ConfusionMatrix", *args, **kwargs)

    def _count(self, predictions: Tensor, targets: Tensor) -> None:
        labels = targets.long()  # before comparing: among uint8 an ignore_index of -100 is 156
        labels = labels.reshape(predictions.shape)
        classes = self.num_classes
        ignored = self._ignored_outside
        if ignored is not None:
            self._ignored += (labels == ignored).sum()
        rows = labels.clamp(-1, classes).add_(1)
        narrow = next((kind for most, kind in _NARROW if len(self._counts) <= most), torch.int64)
        rows = rows.to(narrow)  # an eighth or a quarter of the memory to go through
        cells = rows.mul_(classes + 1).add_(predictions.to(narrow)).flatten()
        if cells.device.type == "cpu":
            self._counts += torch.bincount(cells, minlength=len(self._counts))
        else:  # bincount reads its size back from the device
            cells = cells.long()
            self._counts.scatter_add_(0, cells, torch.ones_like(cells))

    def _count_compiled(self, outputs: Tensor, targets: Tensor) -> bool:
        """Count with a compiled kernel, image by image, and tell whether there is one."""
        if (
            self._kernels is None
            or self._kernels.broken
            or not (outputs.is_cpu and outputs.is_floating_point())
            or not 1 < outputs.shape[1] <= MOST_CHANNELS
            or outputs.shape[2:].numel() < _FEW_PIXELS
        ):
            return False
        images = outputs.detach().reshape(*outputs.shape[:2], -1)
        classes, size = self.num_classes, len(self._counts)
        with_ignored = size + classes + 1  # a row more, of ignored pixels
        ignored = self._ignored_outside
        labels = plain(targets).reshape(len(images), -1)
        key = outputs.dtype, labels.dtype, images.stride(1) == 1
        counts = torch.zeros(with_ignored, dtype=torch.int64)
        for image, of_image in zip(images, labels, strict=True):
            cells = self._kernels.run(_cells, key, image, of_image, ignored, with_ignored <= _UINT8)
            if cells is None:
                return False
            counts += torch.bincount(cells, minlength=with_ignored)
        if ignored is not None:
            left_out = counts[size:]
            row = 0 if ignored < 0 else (classes + 1) * (classes + 1)
            counts[row : row + classes + 1] += left_out
            self._ignored += left_out.sum()
        self._counts += counts[:size]
        return True

    @property
    def _ignored_outside(self) -> int | None:
        """``ignore_index``, if that is no class."""
        return None if self.ignore_index in range(self.num_classes) else self.ignore_index

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point():
            raise ValueError(f"targets are {targets.dtype}, but classes are integers: convert the mask with .long()")
        if not outputs.is_floating_point():
            if outputs.shape != targets.shape:
                raise ValueError(
                    f"integer predictions {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape: "
                    "give a class for each pixel in both"
                )
            return
        shape = (outputs.shape[0], *outputs.shape[2:])
        channels = outputs.shape[1] if outputs.ndim > 1 else 0
        if targets.shape != shape and not (channels == 1 and targets.shape == outputs.shape):
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} need targets of shape {shape}, got {tuple(targets.shape)}: "
                "give a class for each pixel, as masks.squeeze(1) or masks.argmax(1) does"
            )
        if channels != self.num_classes and not (channels == 1 and self.num_classes == 2):
            raise ValueError(
                f"the outputs have {channels} channels, but the metric was made for num_classes={self.num_classes}: "
                "make it, or the model, with as many classes as the other"
            )

    def _predictions(self, outputs: Tensor) -> Tensor:
        if not outputs.is_floating_point():
            predictions = outputs.long()
            outside = (predictions < 0) | (predictions >= self.num_classes)
            return torch.where(outside, self.num_classes, predictions)
        channels = outputs.shape[1]
        if channels == 1:
            return (outputs[:, 0] > 0).long()
        if outputs.is_cpu and channels <= _UINT8 and outputs.numel() > _FEW:
            return _highest(outputs)
        return outputs.max(1).indices  # argmax over dimension 1 is several times slower on a CPU

    def compute(self) -> Tensor:
        """Return the matrix.

        Returns
        -------
        Tensor
            Counts (C, C), int64 on the CPU; rows are true classes, columns predicted ones.

        Raises
        ------
        ValueError
            If targets lay outside 0 … C-1 and were not ``ignore_index``, or integer predictions did at valid pixels.
        """
        table = self._counts.cpu().reshape(self.num_classes + 2, self.num_classes + 1)
        strange = int(table[0].sum() + table[-1].sum() - self._ignored.cpu())
        if strange:
            raise ValueError(
                f"{strange} targets lie outside the classes 0 … {self.num_classes - 1} and are not "
                f"ignore_index={self.ignore_index}: correct the labels, num_classes or ignore_index"
            )
        matrix = table[1:-1].clone()
        if self.ignore_index is not None and 0 <= self.ignore_index < self.num_classes:
            matrix[self.ignore_index] = 0
        wrong = int(matrix[:, -1].sum())
        if wrong:
            raise ValueError(
                f"{wrong} predictions at valid pixels lie outside the classes 0 … {self.num_classes - 1}: correct the "
                "predictions or num_classes"
            )
        return matrix[:, :-1]

    def reset(self) -> None:
        """Start counting from zero."""
        self._counts.zero_()
        self._ignored.zero_()

    def reduced(self, total: Callable[[Tensor], Tensor]) -> "ConfusionMatrix":
        """Return the matrix of all processes; ``total`` sums a tensor over them."""
        whole = ConfusionMatrix(self.num_classes, self.ignore_index)
        whole._counts, whole._ignored = total(self._counts), total(self._ignored)
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts so far: the live tensors."""
        return {"counts": self._counts, "ignored": self._ignored}

    def absorb(self, state: dict[str, Tensor]) -> None:
        """Add the counts of another process, as its ``state_dict`` gave them."""
        self._counts = self._counts + state["counts"].to(self._counts.device)
        self._ignored = self._ignored + state["ignored"].to(self._ignored.device)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from counts that ``state_dict`` gave.

        Raises
        ------
        ValueError
            If they are of another number of classes.
        """
        if state["counts"].shape != self._counts.shape:
            raise ValueError(
                f"the counts are not of num_classes={self.num_classes}: make the metric with the number of classes "
                "that they were counted with"
            )
        self._counts, self._ignored = state["counts"].clone(), state["ignored"].clone()
