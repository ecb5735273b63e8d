"""Figures of classification and segmentation that are read from a confusion matrix."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from ununennium.metrics.confusion import ConfusionMatrix

Average = Literal["macro", "micro", "none"]


class ConfusionMetric(ABC):
    """A figure per class that is read from a confusion matrix.

    Parameters
    ----------
    num_classes : int
        Number of classes C. A model with one logit a pixel has two.
    ignore_index : int, optional
        Target value that is left out.
    average : {"macro", "micro", "none"}, default "macro"
        Mean over the classes that occur; one figure from the sums over classes; or a figure per class.
    class_names : sequence of str, optional
        Names of the C classes, used where figures per class are named.

    Notes
    -----
    A class that neither target nor prediction holds is NaN, and left out of the mean. An ``ignore_index`` within
    0 … C-1 leaves out the pixels of that class; where it is predicted at other pixels, it is a class like any other
    (as scikit-learn has it on the valid pixels).
    """

    name: str
    higher_is_better = True

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int | None = None,
        average: Average = "macro",
        class_names: Sequence[str] | None = None,
    ) -> None:
        if average not in ("macro", "micro", "none"):
            raise ValueError(f'average must be "macro", "micro" or "none", got {average!r}')
        if class_names is not None and not len(set(class_names)) == len(class_names) == num_classes:
            raise ValueError(
                f"class_names must be {num_classes} different names, one a class, as num_classes={num_classes}; "
                f"got {list(class_names)}"
            )
        self.confusion = ConfusionMatrix(num_classes, ignore_index)
        self.average: Average = average
        self.class_names = None if class_names is None else list(class_names)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count one batch: logits (B, C, …) and classes (B, …); see `ConfusionMatrix.update`."""
        self.confusion.update(outputs, targets)

    def compute(self) -> Tensor:
        """Return the figure, float64 on the CPU: 0-dimensional, or (C,) with ``average="none"``.

        Raises
        ------
        ValueError
            If targets lay outside the classes.
        """
        matrix = self.confusion.compute().double()
        correct = matrix.diagonal()
        true, predicted = matrix.sum(1), matrix.sum(0)
        if self.average == "micro":
            correct, true, predicted = correct.sum(), true.sum(), predicted.sum()
        figures = self._figures(correct, true, predicted)  # 0 / 0 is NaN
        return figures.nanmean() if self.average == "macro" else figures

    def reset(self) -> None:
        """Start counting from zero."""
        self.confusion.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts so far: the live tensors."""
        return self.confusion.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from counts that ``state_dict`` gave; see `ConfusionMatrix.load_state_dict`."""
        self.confusion.load_state_dict(state)

    def reduced(self, total: Callable[[Tensor], Tensor]) -> "ConfusionMetric":
        """Return the figure of all processes; ``total`` sums a tensor over them."""
        return self.over(self.confusion.reduced(total))

    def over(self, confusion: ConfusionMatrix) -> "ConfusionMetric":
        """Return the same figure over another matrix."""
        twin = copy.copy(self)
        twin.confusion = confusion
        return twin

    @abstractmethod
    def _figures(self, correct: Tensor, true: Tensor, predicted: Tensor) -> Tensor: ...


class IoU(ConfusionMetric):
    """Intersection over union, the Jaccard index: TP / (TP + FP + FN).

    See `ConfusionMetric` for the parameters.

    Examples
    --------
    >>> iou = IoU(num_classes=3, ignore_index=255)
    >>> iou.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 255]]))
    >>> iou.compute()
    tensor(1., dtype=torch.float64)
    """

    name = "iou"

    def _figures(self, correct: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
        return correct / (true + predicted - correct)


class Dice(ConfusionMetric):
    """Dice coefficient, the F1 score: 2 TP / (2 TP + FP + FN).

    See `ConfusionMetric` for the parameters.
    """

    name = "dice"

    def _figures(self, correct: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
        return 2 * correct / (true + predicted)
