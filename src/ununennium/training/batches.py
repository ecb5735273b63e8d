"""What a loader yields: its inputs and targets, its size, its way to the device."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

TARGET_KEYS = ("mask", "label", "target")


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and targets of a batch.

    Parameters
    ----------
    batch : tuple, list or mapping
        ``(inputs, targets)``, or a mapping with ``image`` and one of ``mask``, ``label``, ``target`` (in this order
        of preference), as TorchGeo's datasets yield it.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and "image" in batch:
        for key in TARGET_KEYS:
            if key in batch:
                return batch["image"], batch[key]
    raise TypeError(
        f"a batch must be (inputs, targets) or a mapping with 'image' and 'mask', 'label' or 'target', "
        f"but the loader gave {describe(batch)}. Change what the dataset or collate_fn returns, or, for batches of "
        "another kind, override Trainer.compute_loss(batch)."
    )


def describe(value: Any) -> str:
    """Say in one line what a value is or what a batch looks like, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        return f"{_a(type(value).__name__)} with the keys {', '.join(repr(k) for k in value) or '(none)'}"
    if isinstance(value, (tuple, list)):
        items = [describe(v) for v in value[:4]] + ["…"] * (len(value) > 4)
        return f"{_a(type(value).__name__)} of {len(value)}" + (f" ({'; '.join(items)})" if items else "")
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
    if isinstance(value, type):
        return f"the class {value.__name__} and not an object of it, {value.__name__}(…)"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{_a(_name(value))} {tuple(value.shape)} of {value.dtype}"
    return _a(_name(value))


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def is_on_host(tensor: Tensor) -> bool:
    """Tell whether reading a tensor as numbers waits for no device."""
    return tensor.is_cpu


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in nested tuples, lists and mappings; everything else is passed through as it is.

    Named tuples and mappings keep their type, tuples without tensors are passed through.
    """
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        items = [to_device(v, device) for v in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value  # a shape, say, or an affine transform
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    if isinstance(value, list):
        return [to_device(v, device) for v in value]
    if isinstance(value, Mapping):
        moved = {k: to_device(v, device) for k, v in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return moved
        twin = copy.copy(value)  # a defaultdict, a mapping with attributes
        twin.update(moved)
        return twin
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def num_samples(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its ``image``, or else of the first tensor found in it.

    Raises
    ------
    TypeError
        If there is no tensor with a batch dimension.
    """
    size = _first_length(batch)
    if size is None:
        raise TypeError(
            f"the number of samples can't be told: there is no tensor with a batch dimension in {describe(batch)}. Let "
            "the dataset or collate_fn give tensors."
        )
    return size


def _first_length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    if isinstance(value, Mapping) and "image" in value:  # a transform that comes before it has another length
        items = (value["image"], *items)
    return next((size for size in map(_first_length, items) if size is not None), None)
