"""Figures of classification and segmentation that are read from a confusion matrix."""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Literal

from torch import Tensor

from ununennium.metrics.base import DerivedMetric, flat
from ununennium.metrics.confusion import ConfusionMatrix

Average = Literal["macro", "micro", "weighted", "none"]


class ConfusionMetric(DerivedMetric):
    """A figure that is read from a confusion matrix.

    Parameters
    ----------
    num_classes : int
        Number of classes C. A model with one logit a pixel has two.
    ignore_index : int, optional
        Target value that is left out.
    class_names : sequence of str, optional
        Names of the C classes, used where figures per class are named.

    Raises
    ------
    TypeError
        If ``num_classes`` or ``ignore_index`` is no integer.
    ValueError
        If ``num_classes`` is less than 2, or ``class_names`` are not as many different names.

    Notes
    -----
    Figures are float64. What would be 0 / 0 is NaN: every figure, if nothing was counted. An ``ignore_index`` within
    0 … C-1 leaves out the pixels of that class; where it is predicted at other pixels, it is a class like any other
    (as scikit-learn has it on the valid pixels).
    """

    higher_is_better = True
    source: ConfusionMatrix

    def __init__(
        self, num_classes: int, *, ignore_index: int | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        self.source = ConfusionMatrix(num_classes, ignore_index)
        alone = isinstance(class_names, str)  # one name, and not one a letter
        if class_names is not None and (alone or not len(set(class_names)) == len(class_names) == num_classes):
            raise ValueError(
                f"class_names must be {num_classes} different names, one a class, as num_classes={num_classes}; "
                f"got {class_names!r}"
            )
        self.class_names: list[str] | None = None if class_names is None else list(class_names)

    @property
    def confusion(self) -> ConfusionMatrix:
        """The confusion matrix."""
        return self.source

    @property
    def key(self) -> Hashable:
        """Classes and ``ignore_index``."""
        return type(self.source), self.source.num_classes, self.source.ignore_index

    def compute(self) -> Tensor:
        """Return the figure, 0-dimensional, float64 on the CPU.

        Raises
        ------
        ValueError
            If targets lay outside the classes.
        """
        return self._figure(self.source.compute().double())

    def figures(self, name: str) -> dict[str, float]:
        """Return the figure under its name; a figure per class as ``name/class``."""
        return flat(name, self.compute(), self.class_names)

    @abstractmethod
    def _figure(self, matrix: Tensor) -> Tensor:
        """Return the figure of a matrix (C, C) whose rows are true classes."""


class ClassMetric(ConfusionMetric):
    """A figure of each class that is read from a confusion matrix, and their mean.

    Parameters
    ----------
    num_classes : int
        Number of classes C. A model with one logit a pixel has two.
    ignore_index : int, optional
        Target value that is left out.
    average : {"macro", "micro", "weighted", "none"}, default "macro"
        Mean over the classes that occur; one figure from the sums over classes; mean weighted by the classes' shares
        of the targets; or a figure per class.
    class_names : sequence of str, optional
        Names of the C classes, used where figures per class are named.
    per_class : bool, default False
        Give in the logs, beside the mean, the figure of each class: ``iou`` and ``iou/forest``.

    Raises
    ------
    TypeError
        If ``num_classes`` or ``ignore_index`` is no integer.
    ValueError
        If ``num_classes`` is less than 2, ``class_names`` are not as many different names, there is no such
        ``average``, or ``per_class`` is asked for with ``average="none"``, which has no mean for it to stand beside.

    Notes
    -----
    A class that neither target nor prediction holds is NaN, and left out of the mean. One that only one of them holds
    is 0 whatever the figure, as scikit-learn has it with ``zero_division=0``: means of one matrix are over the same
    classes. An ``ignore_index`` within 0 … C-1 leaves out the pixels of that class; where it is predicted at other
    pixels, it is a class like any other (as scikit-learn has it on the valid pixels).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int | None = None,
        average: Average = "macro",
        class_names: Sequence[str] | None = None,
        per_class: bool = False,
    ) -> None:
        if average not in ("macro", "micro", "weighted", "none"):
            raise ValueError(f'average must be "weighted", "macro", "micro" or "none", got {average!r}')
        if per_class and average == "none":
            raise ValueError('average="none" gives the classes without their mean: leave per_class or average out')
        super().__init__(num_classes, ignore_index=ignore_index, class_names=class_names)
        self.average: Average = average
        self.per_class = per_class

    def compute(self) -> Tensor:
        """Return the figure, float64 on the CPU: 0-dimensional, or (C,) with ``average="none"``.

        Raises
        ------
        ValueError
            If targets lay outside the classes.
        """
        return super().compute()

    def compute_each(self) -> Tensor:
        """Return the figure of each class (C,), whatever the average, float64 on the CPU.

        Raises
        ------
        ValueError
            If targets lay outside the classes.
        """
        return self._figures(*_margins(self.source.compute().double()))

    def names(self, name: str) -> list[str]:
        """Return the keys of ``figures``."""
        each = [f"{name}/{part}" for part in self.class_names or range(self.source.num_classes)]
        return each if self.average == "none" else [name, *each] if self.per_class else [name]

    def figures(self, name: str) -> dict[str, float]:
        """Return the figure under its name, and those of the classes, if they are wanted, as ``name/class``."""
        figures = super().figures(name)
        return figures | flat(name, self.compute_each(), self.class_names) if self.per_class else figures

    def _figure(self, matrix: Tensor) -> Tensor:
        correct, true, predicted = _margins(matrix)
        if self.average == "micro":
            return self._figures(correct.sum(), true.sum(), predicted.sum())
        figures = self._figures(correct, true, predicted)
        if self.average == "macro":
            return figures.nanmean()
        return (figures * true).nansum() / true.sum() if self.average == "weighted" else figures

    @abstractmethod
    def _figures(self, correct: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
        """Return the figures of true positives, targets and predictions; 0 / 0 is NaN."""


class IoU(ClassMetric):
    """Intersection over union, the Jaccard index: TP / (TP + FP + FN).

    Weighted by the classes' shares (``average="weighted"``) it is the frequency-weighted IoU. See `ClassMetric` for
    the parameters.

    References
    ----------
    P. Jaccard (1912), The distribution of the flora in the alpine zone, New Phytologist 11(2).

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


class Dice(ClassMetric):
    """Dice coefficient, the F1 score: 2 TP / (2 TP + FP + FN).

    See `ClassMetric` for the parameters.

    References
    ----------
    L. R. Dice (1945), Measures of the amount of ecologic association between species, Ecology 26(3).
    """

    name = "dice"

    def _figures(self, correct: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
        return 2 * correct / (true + predicted)


class F1(Dice):
    """F1 score, the harmonic mean of precision and recall: `Dice` under its other name.

    See `ClassMetric` for the parameters.

    References
    ----------
    C. J. van Rijsbergen (1979), Information Retrieval, second edition, Butterworths (of its measure E, 1 - F1).
    """

    name = "f1"


class Precision(ClassMetric):
    """Precision, in map accuracy the user's accuracy: TP / (TP + FP).

    See `ClassMetric` for the parameters.

    References
    ----------
    R. G. Congalton (1991), A review of assessing the accuracy of classifications of remotely sensed data, Remote
    Sensing of Environment 37(1).
    """

    name = "precision"

    def _figures(self, correct: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
        return correct / predicted.where(predicted > 0, true)


class Recall(ClassMetric):
    """Recall, in map accuracy the producer's accuracy: TP / (TP + FN).

    See `ClassMetric` for the parameters. Its mean counts a class that is predicted and nowhere true, with 0;
    `AverageAccuracy` does not.

    References
    ----------
    R. G. Congalton (1991), A review of assessing the accuracy of classifications of remotely sensed data, Remote
    Sensing of Environment 37(1).
    """

    name = "recall"

    def _figures(self, correct: Tensor, true: Tensor, predicted: Tensor) -> Tensor:
        return correct / true.where(true > 0, predicted)


class OverallAccuracy(ConfusionMetric):
    """Overall accuracy, OA: the share of the pixels (or samples) that are classified right.

    See `ConfusionMetric` for the parameters.

    References
    ----------
    R. G. Congalton (1991), A review of assessing the accuracy of classifications of remotely sensed data, Remote
    Sensing of Environment 37(1).
    """

    name = "oa"

    def _figure(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal().sum() / matrix.sum()


class AverageAccuracy(ConfusionMetric):
    """Average accuracy, AA, the balanced accuracy: mean over the classes that targets hold of the share found.

    That is the mean of the producer's accuracies. See `ConfusionMetric` for the parameters.

    References
    ----------
    R. G. Congalton (1991), A review of assessing the accuracy of classifications of remotely sensed data, Remote
    Sensing of Environment 37(1) (the producer's accuracy).
    """

    name = "aa"

    def _figure(self, matrix: Tensor) -> Tensor:
        return (matrix.diagonal() / matrix.sum(1)).nanmean()


class CohenKappa(ConfusionMetric):
    """Cohen's kappa: (po - pe) / (1 - pe), with the accuracy po and that of chance pe.

    The accuracy of chance is what predictions would have that were independent of the targets, with the same shares of
    the classes. NaN if targets and predictions are all of one class. See `ConfusionMetric` for the parameters.

    References
    ----------
    J. Cohen (1960), A coefficient of agreement for nominal scales, Educational and Psychological Measurement 20(1).
    """

    name = "kappa"

    def _figure(self, matrix: Tensor) -> Tensor:
        correct, true, predicted = _margins(matrix / matrix.sum())
        chance = (true * predicted).sum()
        return (correct.sum() - chance) / (1 - chance)


def class_figures(confusion: ConfusionMatrix) -> dict[str, Tensor]:
    """Return what there is to say of each class.

    Returns
    -------
    dict of str to Tensor
        ``iou``, ``dice``, ``precision``, ``recall``, float64 (C,), and ``support``, the targets of each class, int64.

    Raises
    ------
    ValueError
        If targets lay outside the classes.
    """
    kinds: tuple[type[ClassMetric], ...] = (IoU, Dice, Precision, Recall)
    figures = {kind.name: kind(confusion.num_classes).over(confusion).compute_each() for kind in kinds}
    return figures | {"support": confusion.compute().sum(1)}


def _margins(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return true positives, targets and predictions of each class."""
    return matrix.diagonal(), matrix.sum(1), matrix.sum(0)
