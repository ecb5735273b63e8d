"""Targets that a loss would misread in silence."""

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ununennium.losses.pixels import are_probabilities
from ununennium.training.errors import BatchError
from ununennium.training.windows import loss_setting

# Losses that compare number by number; those whose targets are probabilities, and of them those whose outputs are, too;
# those that take classes, and of them those whose outputs are logits.
ELEMENTWISE: tuple[Any, ...] = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
ELEMENTWISE += (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
PROBABILITIES = (nn.BCELoss, F.binary_cross_entropy)
BINARY = (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, *PROBABILITIES)
CROSS_ENTROPY = (nn.CrossEntropyLoss, F.cross_entropy)
OVER_CLASSES = (*CROSS_ENTROPY, nn.NLLLoss, F.nll_loss)


def check_targets(outputs: Any, targets: Any, loss_fn: Any) -> None:
    """Raise if a loss did not complain of targets that it can't have understood.

    Those are: a shape that was broadcast against the outputs', labels outside the classes, values outside 0 … 1 for
    a binary cross-entropy, masks in floating point for a loss over classes, a cross-entropy over a single class or of
    outputs that are probabilities already.

    Raises
    ------
    BatchError
        Naming what differs, and of labels their values and samples.
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.is_floating_point()):
        return
    reason = None
    if is_one_of(loss_fn, ELEMENTWISE + BINARY):
        if targets.shape != outputs.shape:
            reason = (
                f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape, and the loss "
                "broadcasts one against the other: make them equal, with targets.unsqueeze(1), say"
            )
        elif is_one_of(loss_fn, BINARY):
            reason = _outside_probabilities(targets)
    elif outputs.ndim >= 2:
        if outputs.shape[1] == 1 and is_one_of(loss_fn, OVER_CLASSES):
            reason = (
                f"the model gives a single channel (outputs of shape {tuple(outputs.shape)}), of which a cross-entropy "
                "over classes learns nothing: create the model with num_classes=2, or use BCEWithLogitsLoss"
            )
        elif is_one_of(loss_fn, CROSS_ENTROPY) and are_probabilities(outputs):
            reason = (
                "the model's outputs are at least 0 and sum to 1 over the classes, as probabilities do, and a "
                "cross-entropy takes logits, to which it applies the softmax itself: leave it out of the model"
            )
        elif targets.is_floating_point():
            knows_classes = is_one_of(loss_fn, OVER_CLASSES) or loss_setting(loss_fn, "ignore_index") is not None
            if knows_classes and outputs.shape[1] > 1 and targets.shape == per_pixel(outputs):
                reason = (
                    f"targets are {targets.dtype}, but the loss compares {outputs.shape[1]} classes and a class is an "
                    "integer: convert the masks with .long()"
                )
        else:
            reason = outside_classes(outputs, targets, loss_fn)
    if reason is not None:
        raise BatchError(reason)


def outside_classes(outputs: Tensor, targets: Tensor, loss_fn: Any) -> str | None:
    """Describe labels outside the classes, if targets are labels for these outputs and hold such."""
    expected, channels = per_pixel(outputs), outputs.shape[1]
    if targets.shape not in (expected, (expected[0], 1, *expected[1:])):
        return None
    labels = targets.long()  # before comparing: among uint8 an ignore_index of -100 is 156
    classes = max(channels, 2)
    ignore_index = loss_setting(loss_fn, "ignore_index")
    strange = (labels < 0) | (labels >= classes)
    if isinstance(ignore_index, Integral):
        strange &= labels != ignore_index
    if not bool(strange.any()):
        return None
    values = labels[strange].unique().tolist()
    samples = strange.reshape(len(labels), -1).any(1).nonzero()[:, 0].tolist()
    if values == [classes] and int(labels.min()) == 1:
        remedy = "They seem to start at 1: subtract 1"
    elif len(values) == 1:
        remedy = (
            f"If {values[0]} is nodata, give the loss ignore_index={values[0]}; else correct the masks or num_classes"
        )
    else:
        remedy = "Correct the masks or num_classes, or name the value of nodata with the loss's ignore_index"
    if not (is_one_of(loss_fn, OVER_CLASSES) or hasattr(loss_fn, "ignore_index")):
        remedy += ". If they are quantities and no classes, convert them with .float()"
    return (
        f"targets hold the {listed('label', values)}, outside the classes 0 … {classes - 1} of the model's outputs, "
        f"{int(strange.sum())} of {labels.numel()} values, in {listed('sample', samples)} of the batch; the loss has "
        f"ignore_index={ignore_index}. {remedy}"
    )


def _outside_probabilities(targets: Tensor) -> str | None:
    if targets.numel() == 0:
        return None
    low, high = (float(v) for v in targets.double().aminmax())
    if not (low < 0 or high > 1):
        return None
    return (
        f"targets hold values from {low:g} to {high:g}, but a binary cross-entropy takes 0 … 1: make the masks 0 and "
        "1, (masks > 0).float(), say; for nodata use a loss with an ignore_index, DiceLoss, say"
    )


def per_pixel(outputs: Tensor) -> tuple[int, ...]:
    """Return the shape of a class for each pixel (or each sample) of outputs (B, C, …)."""
    return (outputs.shape[0], *outputs.shape[2:])


def compares_numbers(loss_fn: Any) -> bool:
    """Tell whether a loss is known to compare number by number, so that integer targets are no classes."""
    return is_one_of(loss_fn, ELEMENTWISE)


def is_one_of(loss_fn: Any, kinds: tuple[Any, ...]) -> bool:
    """Tell whether a loss is one of these modules or functions, looking into `functools.partial`."""
    while isinstance(loss_fn, partial):
        loss_fn = loss_fn.func
    return any(isinstance(loss_fn, kind) if isinstance(kind, type) else loss_fn is kind for kind in kinds)


def listed(noun: str, values: Sequence[int]) -> str:
    """Name the first ten of some numbers, with a noun in the right number."""
    listed = ", ".join(map(str, values[:10])) + (f" and {len(values) - 10} more" if len(values) > 10 else "")
    return f"{noun}{'s' * (len(values) > 1)} {listed}"
