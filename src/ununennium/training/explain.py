"""Why a batch failed: found by trying it again with what is suspected put right."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ununennium.training.batches import describe, split_batch, to_device
from ununennium.training.checks import check_loss
from ununennium.training.errors import BatchError, NonFiniteError
from ununennium.training.modes import modes_restored
from ununennium.training.random_state import RandomState
from ununennium.training.targets import (
    BINARY,
    ELEMENTWISE,
    OVER_CLASSES,
    check_targets,
    is_one_of,
    listed,
    outside_classes,
    per_pixel,
)
from ununennium.training.windows import loss_setting


def explain(error: Exception, batch: Any, model: nn.Module, loss_fn: Any, device: torch.device) -> BatchError | None:
    """Look for the reason why a batch failed in the model or the loss; None if it does not show.

    The batch goes through model and loss once more, in eval mode and without gradients. If that fails alike, it is
    tried with what is suspected put right: only what helps is named as the reason. Modes, weights, gradients and the
    global random generators stay as they are.

    Parameters
    ----------
    error : Exception
        What was raised.
    batch : Any
        The batch as the loader gave it.
    model, loss_fn, device
        What it went through.
    """
    if isinstance(error, (BatchError, NonFiniteError, MemoryError, torch.OutOfMemoryError)):
        return None
    try:
        inputs, targets = split_batch(batch)
        if "CUDA error" in str(error):  # after an assertion on the device nothing more can be asked of it
            reason = _after_assertion(error, targets, loss_fn)
        else:
            with torch.no_grad(), RandomState.capture().put_back(), modes_restored(model):
                reason = _reason(error, inputs, targets, model.eval(), loss_fn, device)
    except BatchError as found:
        return found
    except Exception:  # what fails is the user's, and is raised as it is
        return None
    return None if reason is None else BatchError(reason)


Function = Callable[..., Any]


def _reason(
    error: Exception, inputs: Any, targets: Any, model: nn.Module, loss_fn: Any, device: torch.device
) -> str | None:
    outputs, failure = _attempt(model, to_device(inputs, device))
    if failure is not None:
        return _wrong_inputs(failure, inputs, targets, model, device) if type(failure) is type(error) else None
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn)  # it may count its calls
    targets = to_device(targets, device)
    loss, failure = _attempt(loss_fn, outputs, targets)
    if failure is None:
        if isinstance(error, (TypeError, AttributeError)) or "scalar" in str(error) or "grad_output" in str(error):
            check_loss(loss)
        if "does not have a grad_fn" in str(error):
            return (
                "the loss does not depend on the model's parameters: an argmax, .detach(), .item(), a detour through "
                "NumPy or torch.no_grad() in the model or the loss cuts the gradient off"
            )
        return None
    if type(failure) is not type(error):
        return None
    if not isinstance(outputs, Tensor):
        if not isinstance(error, (TypeError, AttributeError, KeyError)):
            return None
        return (
            f"the model returns {describe(outputs)}, which the loss can't use ({_first_line(error)}): let the model "
            "return one tensor, or override Trainer.compute_loss(batch) to pick what is compared"
        )
    if not isinstance(targets, Tensor):
        return (
            f"targets are {describe(targets)}: let the dataset or collate_fn give a tensor" if _array(targets) else None
        )
    if (
        isinstance(inputs, Tensor)
        and inputs.ndim == outputs.ndim == 3
        and any(isinstance(m, nn.Conv2d) for m in model.modules())
    ):
        return _unbatched(inputs)
    return _wrong_targets(inputs, outputs, targets, loss_fn)


def _wrong_inputs(failure: Exception, inputs: Any, targets: Any, model: nn.Module, device: torch.device) -> str | None:
    """Tell why the model can't take its inputs."""
    if not isinstance(inputs, Tensor):
        if _array(inputs):
            return f"inputs are {describe(inputs)}: let the dataset or collate_fn give a tensor, torch.from_numpy(…)"
        if isinstance(inputs, (Mapping, tuple, list)) and describe(inputs) == describe(targets):
            return (
                f"the batch is a list of 2 samples, each {describe(inputs)}, that were not put together: let the "
                "collate_fn stack them (DataLoader's default does)"
            )
        return None
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None and inputs.dtype != parameter.dtype:
        converted = inputs.to(parameter.dtype)
        _, second = _attempt(model, converted.to(device))
        if second is None:
            return _wrong_type(inputs, parameter.dtype)
        inputs, failure = converted, second
    reason = _wrong_channels(str(failure), inputs)
    if reason is not None or inputs.ndim < 2:
        return reason
    if inputs.ndim == 3 and _attempt(model, inputs[None].to(device))[1] is None:
        return _unbatched(inputs)
    height, width = inputs.shape[-2:]
    missing = -height % 32, -width % 32
    if any(missing) and inputs.ndim >= 4:
        padded = F.pad(inputs, (0, missing[1], 0, missing[0]))
        if _attempt(model, padded.to(device))[1] is None:
            return (
                f"the model can't take inputs of {height} x {width} pixels ({_first_line(failure)}), but "
                f"{height + missing[0]} x {width + missing[1]} it can: pad or crop images and masks to multiples of 32"
            )
    return None


def _wrong_type(inputs: Tensor, dtype: torch.dtype) -> str:
    found = f"inputs are {inputs.dtype}, but the model's weights are {dtype}: "
    if inputs.dtype == torch.uint8:
        return found + "convert and scale the images, image.float() / 255, say"
    if not inputs.is_floating_point():
        return found + "convert and scale the images, image.float() / 10000 for Sentinel-2 reflectances, say"
    if inputs.dtype == torch.float64:
        return found + "float64 is NumPy's default; convert the images with .float()"
    return found + f"convert the images with .to({dtype}), or the model with .to({inputs.dtype})"


def _wrong_channels(message: str, inputs: Tensor) -> str | None:
    """Read from PyTorch's message whether a layer wants other channels than the inputs themselves have."""
    found = re.search(r"expected input(\[[\d, ]+\]) to have (\d+) channels", message)
    if found is not None and found[1] in (str(list(inputs.shape)), str([1, *inputs.shape])):
        axis, wanted = (1 if found[1] == str(list(inputs.shape)) else 0), int(found[2])
    else:
        found = re.search(r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x", message)
        if found is None or (inputs.shape[:-1].numel(), inputs.shape[-1]) != (int(found[1]), int(found[2])):
            return None
        axis, wanted = inputs.ndim - 1, int(found[3])
    shape = tuple(inputs.shape)
    if inputs.ndim == 4 and inputs.shape[-1] == wanted:
        return (
            f"inputs have shape {shape}, with the channels last, but the model takes (batch, {wanted}, height, width): "
            "permute the images, image.permute(2, 0, 1) for each"
        )
    return (
        f"inputs have {shape[axis]} channels (shape {shape}), but the model takes {wanted}: choose {wanted} bands, or "
        f"create the model with in_channels={shape[axis]}"
    )


def _unbatched(inputs: Tensor) -> str:
    return (
        f"inputs have shape {tuple(inputs.shape)}, without a batch dimension: give the loader a batch_size (a "
        "DataLoader with batch_size=None yields single samples)"
    )


def _wrong_targets(inputs: Any, outputs: Tensor, targets: Tensor, loss_fn: Function) -> str | None:
    """Tell why a loss can't take its targets, by giving it better ones."""
    reason = None
    if not is_one_of(loss_fn, ELEMENTWISE + BINARY) and outputs.ndim >= 2:
        reason = _wrong_classes(inputs, outputs, targets, loss_fn)
    if reason is None and not is_one_of(loss_fn, OVER_CLASSES):
        reason = _wrong_numbers(outputs, targets, loss_fn)
    return reason


def _wrong_classes(inputs: Any, outputs: Tensor, targets: Tensor, loss_fn: Function) -> str | None:
    expected, channels = per_pixel(outputs), outputs.shape[1]
    if channels == 1 and is_one_of(loss_fn, OVER_CLASSES):
        check_targets(outputs, targets, loss_fn)
    classes, remedy = targets, "targets"
    if targets.ndim == outputs.ndim and targets.shape[1] == 1:
        classes, remedy = classes.squeeze(1), f"{remedy}.squeeze(1)"
    elif channels > 1 and targets.shape == outputs.shape:
        classes, remedy = classes.argmax(1), f"{remedy}.argmax(1)"
    elif channels > 1 and targets.shape == (*expected, channels):
        classes, remedy = classes.argmax(-1), f"{remedy}.argmax(-1)"
    if classes.dtype != torch.int64:
        classes, remedy = classes.long(), f"{remedy}.long()"
    if _attempt(loss_fn, outputs, classes.new_zeros(expected))[1] is not None:
        return None  # it takes no classes
    if classes.shape != expected:
        return _wrong_size(inputs, outputs, classes)
    reason = outside_classes(outputs, classes, loss_fn)
    if reason is not None:
        return reason
    if remedy == "targets" or _attempt(loss_fn, outputs, classes)[1] is not None:
        return None
    return (
        f"targets have shape {tuple(targets.shape)} and type {targets.dtype}, but the loss takes classes: integers "
        f"(torch.int64) of shape {expected} for outputs of shape {tuple(outputs.shape)}. Convert the masks with "
        f"{remedy}"
    )


def _wrong_numbers(outputs: Tensor, targets: Tensor, loss_fn: Function) -> str | None:
    numbers, remedy = targets, "targets"
    if targets.shape != outputs.shape and targets.shape == per_pixel(outputs) and outputs.shape[1] == 1:
        numbers, remedy = numbers.unsqueeze(1), f"{remedy}.unsqueeze(1)"
    elif targets.ndim == outputs.ndim + 1 and targets.shape[1] == 1:
        numbers, remedy = numbers.squeeze(1), f"{remedy}.squeeze(1)"
    if numbers.dtype != outputs.dtype:
        numbers = numbers.to(outputs.dtype)
        remedy += ".float()" if outputs.dtype == torch.float32 else f".to({outputs.dtype})"
    fits = numbers.shape == outputs.shape
    if _attempt(loss_fn, outputs, numbers if fits else torch.zeros_like(outputs))[1] is not None:
        return None
    if not fits:
        return (
            f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)} differ, but the loss "
            "compares them number by number: give both the same shape"
            + (", or use CrossEntropyLoss if targets are classes" if targets.shape == per_pixel(outputs) else "")
        )
    return (
        f"targets have shape {tuple(targets.shape)} and type {targets.dtype}, but the loss compares them number by "
        f"number with outputs of shape {tuple(outputs.shape)} and type {outputs.dtype}: convert the targets "
        f"with {remedy}"
    )


def _wrong_size(inputs: Any, outputs: Tensor, classes: Tensor) -> str:
    expected = per_pixel(outputs)
    found = (
        f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(classes.shape)} differ in size: targets "
        f"must be {expected}. "
    )
    if classes.ndim != len(expected):
        return found + "One is for each pixel and one for each sample: use another model, or other targets"
    if len(classes) != len(outputs):
        return found + "Let the dataset or collate_fn give as many targets as inputs"
    if isinstance(inputs, Tensor) and inputs.shape[2:] == classes.shape[1:]:
        return found + (
            "The model makes its inputs smaller or larger: bring its outputs back to their size with "
            "torch.nn.functional.interpolate, or pad its convolutions"
        )
    return found + "Crop or resize images and masks alike (masks with nearest neighbour)"


def _after_assertion(error: Exception, targets: Any, loss_fn: Any) -> str | None:
    if "device-side assert" not in str(error) or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    return (
        "the device stopped at an assertion, in a loss mostly a label outside the classes, in this batch or just "
        f"before it. This batch holds the {listed('label', targets.long().unique().tolist())}; the loss has "
        f"ignore_index={loss_setting(loss_fn, 'ignore_index')}. Correct the masks, num_classes or "
        'ignore_index, and start the process anew; with device="cpu" the sample is named'
    )


def _array(value: Any) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, Tensor)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200].rstrip('. ')}"


def _attempt(function: Function, *arguments: Any, **options: Any) -> tuple[Any, Exception | None]:
    try:
        return function(*arguments, **options), None
    except Exception as error:
        return None, error
