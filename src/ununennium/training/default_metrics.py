"""The metrics of a run that names none."""

from typing import Any

from torch import Tensor

from ununennium.metrics import Dice, IoU, Metric


def default_metrics(outputs: Any, targets: Any, ignore_index: int | None) -> list[Metric]:
    """Return IoU and Dice if outputs are class logits (B, C, …) and targets integer classes (B, …), else none.

    One channel is two classes: the one and the rest.
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.ndim >= 2):
        return []
    if targets.is_floating_point() or not outputs.is_floating_point():
        return []
    classes = max(outputs.shape[1], 2)
    fits = targets.shape == (outputs.shape[0], *outputs.shape[2:])
    if not (fits or (outputs.shape[1] == 1 and targets.shape == outputs.shape)):
        return []
    return [IoU(classes, ignore_index=ignore_index), Dice(classes, ignore_index=ignore_index)]
