"""The confusion matrix: exact counts on the device of the predictions."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor

_UINT8, _INT16 = 255, 32767
_PIXELS = 1 << 15  # of a tile, which with its classes fits the cache


def _highest(outputs: Tensor) -> Tensor:
    """Return the first channel with the highest value, uint8, of logits (B, C, …) on the CPU.

    What ``outputs.max(1).indices`` gives, NaN being the highest, in a fraction of its time: a running maximum over the
    channels, tile by tile, whichever of the two comes last in memory.
    """
    images, channels = outputs.shape[:2]
    flat = outputs.reshape(images, channels, -1)
    pixels = flat.shape[2]
    result = torch.zeros((images, pixels), dtype=torch.uint8)
    most = min(_PIXELS, pixels)
    is_last = channels > 1 and flat.stride(1) == 1
    room = outputs.new_empty((channels if is_last else 0, most))
    best, higher = outputs.new_empty(most), torch.empty(most, dtype=torch.uint8)
    for image, found in zip(flat, result, strict=True):
        for start in range(0, pixels, most):
            tile, index = image[:, start : start + most], found[start : start + most]
            size = len(index)
            if is_last:
                tile = room[:, :size].copy_(tile)
            top, above = best[:size].copy_(tile[0]), higher[:size]
            for channel in range(1, channels):
                torch.gt(tile[channel], top, out=above.view(torch.bool))
                torch.maximum(top, tile[channel], out=top)
                torch.maximum(index, above.mul_(channel), out=index)
            if top.isnan().any():
                index.copy_(tile.max(0).indices)
    return result.reshape(images, *outputs.shape[2:])


class ConfusionMatrix:
    """Exact counts of (true class, predicted class) pairs, kept on the device of the predictions.

    Parameters
    ----------
    num_classes : int
        Number of classes C, at least 2.
    ignore_index : int, optional
        Target value that is left out, inside or outside 0 … C-1.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        self.num_classes: int = operator.index(num_classes)
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (one class is two: it and the rest), got {num_classes!r}")
        self.ignore_index: int | None = None if ignore_index is None else operator.index(ignore_index)
        # Rows: below 0, the classes, above C-1. Columns: the classes, outside. So that a wrong label or prediction
        # costs a row or a column and not a synchronisation.
        self._counts = torch.zeros((self.num_classes + 2) * (self.num_classes + 1), dtype=torch.int64)
        self._ignored = torch.zeros((), dtype=torch.int64)

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
        predictions = self._predictions(outputs, targets)
        labels = targets.long()  # before comparing: among uint8 an ignore_index of -100 is 156
        labels = labels.reshape(predictions.shape)
        classes = self.num_classes
        with torch.no_grad():
            if self._counts.device != labels.device:
                self._counts, self._ignored = self._counts.to(labels.device), self._ignored.to(labels.device)
            if self.ignore_index is not None and not 0 <= self.ignore_index < classes:
                self._ignored += (labels == self.ignore_index).sum()
            rows = labels.clamp(-1, classes).add_(1)
            if len(self._counts) <= _INT16:
                rows = rows.short()  # a quarter of the memory to go through
            cells = rows.mul_(classes + 1).add_(predictions).flatten()
            if cells.device.type == "cpu":
                self._counts += torch.bincount(cells, minlength=len(self._counts))
            else:  # bincount reads its size back from the device
                self._counts.scatter_add_(0, cells, torch.ones_like(cells))

    def _predictions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            raise ValueError(f"targets are {targets.dtype}, but classes are integers: convert the mask with .long()")
        if not outputs.is_floating_point():
            if outputs.shape != targets.shape:
                raise ValueError(
                    f"integer predictions {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape"
                )
            predictions = outputs.long()
            outside = (predictions < 0) | (predictions >= self.num_classes)
            return torch.where(outside, self.num_classes, predictions)
        shape = (outputs.shape[0], *outputs.shape[2:])
        channels = outputs.shape[1] if outputs.ndim > 1 else 0
        if targets.shape != shape and not (channels == 1 and targets.shape == outputs.shape):
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} need targets of shape {shape}, got {tuple(targets.shape)}"
            )
        if channels == 1 and self.num_classes == 2:
            return (outputs[:, 0] > 0).long()
        if channels != self.num_classes:
            raise ValueError(
                f"the outputs have {channels} channels, but the metric was made for num_classes={self.num_classes}"
            )
        if outputs.is_cpu and channels <= _UINT8:
            return _highest(outputs.detach())
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
