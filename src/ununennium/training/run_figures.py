"""The figures of a run: of training and of validation, over metrics that may show only with the first batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ununennium.metrics import Dice, IoU, Metric, MetricCollection
from ununennium.training.figures import Figures, Gather
from ununennium.training.step import BatchResult
from ununennium.training.targets import compares_numbers
from ununennium.training.windows import loss_setting


class RunFigures:
    """Mean loss and metrics of training and of validation, kept apart, so that one may run inside the other.

    Parameters
    ----------
    metrics : sequence or mapping of Metric, or None
        As the Trainer was given them; None is IoU and Dice where they fit, which the first batch tells.
    loss_fn : callable
        Its ``ignore_index`` is that of the default metrics.
    device : torch.device
        Where metrics that keep their state on one device are moved.
    finite_only : bool
        Leave training losses that are NaN or infinite out of the mean.
    compiles : bool
        Compile the metrics that can be.

    Attributes
    ----------
    train, val : Figures
        Those of the pass over the training data and of the last one over the validation data.
    known : bool
        Whether it is known which metrics there are.
    """

    def __init__(
        self,
        metrics: Sequence[Metric] | Mapping[str, Metric] | None,
        loss_fn: Any,
        device: torch.device,
        finite_only: bool,
        compiles: bool = False,
    ) -> None:
        self.known: bool = metrics is not None
        self._given = metrics if metrics is None or isinstance(metrics, Mapping) else list(metrics)
        self._loss_fn = loss_fn
        self._device = device
        self._finite_only, self._compiles = finite_only, compiles
        self._num_classes: int | None = None  # of the default metrics; 0 if they do not fit
        self._make(self._given or [])

    def settle(self, result: BatchResult) -> None:
        """Find out from a first batch which metrics there are."""
        fits = not compares_numbers(self._loss_fn)
        self._settle(num_classes(result.outputs, result.targets) if fits else 0)

    def agree(self, gather: Gather) -> None:
        """Learn from other processes which metrics there are, if this one has seen no batch."""
        found = [classes for classes in gather(self._num_classes) if classes is not None]
        if found and not self.known:
            self._settle(found[0])

    def names(self, validates: bool) -> list[str]:
        """Return the names in the logs of an epoch, as far as they are known."""
        return self.train.names() + (self.val.names() if validates else [])

    def may_give(self, name: str, validates: bool) -> bool:
        """Tell whether an epoch's logs may have a name that ``names`` does not know."""
        return self.train.may_give(name) or (validates and self.val.may_give(name))

    def higher_is_better(self, name: str) -> bool | None:
        """Tell whether more is better for a figure of the logs; None if no metric says so."""
        return self.val.metrics.higher_is_better(name.removeprefix("train_").removeprefix("val_"))

    def state_dict(self) -> dict[str, Any]:
        """Return what the pass over the training data has summed so far, as live tensors in plain data."""
        return {"num_classes": self._num_classes, "train": self.train.state_dict()}

    def after(self, states: Sequence[dict[str, Any]]) -> "RunFigures":
        """Return figures that go on from what ``state_dict`` gave, in one or several processes; these stay as they are.

        Raises
        ------
        ValueError
            If it is of other metrics.
        """
        own = RunFigures(self._given, self._loss_fn, self._device, self._finite_only, self._compiles)
        for number, state in enumerate(states):
            if not own.known and state["num_classes"] is not None:
                own._settle(state["num_classes"])
            (own.train.absorb if number else own.train.load_state_dict)(state["train"], self._device)
        return own

    def _settle(self, classes: int) -> None:
        self.known, self._num_classes = True, classes
        ignore_index = loss_setting(self._loss_fn, "ignore_index")
        defaults = [IoU, Dice] if classes else []
        self._make([metric(classes, ignore_index=ignore_index) for metric in defaults])

    def _make(self, metrics: Sequence[Metric] | Mapping[str, Metric]) -> None:
        train, val = (MetricCollection(metrics).to(self._device) for _ in range(2))
        if self._compiles:
            train.compile()
            val.compile()
        self.train: Figures = Figures("train_", train, self._finite_only)
        self.val: Figures = Figures("val_", val)


def num_classes(outputs: Any, targets: Any) -> int:
    """Return C if outputs are class logits (B, C, …) and targets integer classes (B, …), else 0.

    One channel is two classes: the one and the rest.
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.ndim >= 2):
        return 0
    if targets.is_floating_point() or not outputs.is_floating_point():
        return 0
    fits = targets.shape == (outputs.shape[0], *outputs.shape[2:])
    if not (fits or (outputs.shape[1] == 1 and targets.shape == outputs.shape)):
        return 0
    return max(outputs.shape[1], 2)
