"""Plain data as JSON, and the tensors in it as names: nothing that is read runs code."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TAG = "$"


def pack(value: Any, tensors: dict[str, Tensor], at: str) -> Any:
    """Turn plain data into what JSON holds, moving its tensors to ``tensors`` under the path they were found at.

    Parameters
    ----------
    value : Any
        None, bool, int, float, str, list, tuple, set, dict (keys of any of these kinds), NumPy numbers and arrays,
        tensors; nested.
    tensors : dict
        Filled with the tensors.
    at : str
        The path of ``value``, for names and errors.

    Raises
    ------
    TypeError
        For anything else, naming where it is.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {_TAG: "float", "value": repr(value)}
    if kind is list:
        return [pack(v, tensors, f"{at}.{i}") for i, v in enumerate(value)]
    if kind in (dict, OrderedDict) and _TAG not in value and all(type(k) is str for k in value):
        return {k: pack(v, tensors, f"{at}.{k}") for k, v in value.items()}
    if kind in (dict, OrderedDict, Counter):
        items = [[pack(k, tensors, f"{at} (a key)"), pack(v, tensors, f"{at}.{k}")] for k, v in value.items()]
        return {_TAG: "counter" if kind is Counter else "dict", "value": items}
    if kind in (tuple, set, frozenset):
        members = value if kind is tuple else sorted(value, key=repr)
        return {_TAG: kind.__name__, "value": [pack(v, tensors, f"{at}.{i}") for i, v in enumerate(members)]}
    while at in tensors:  # {"a": {"b": …}, "a.b": …}
        at += "'"
    if isinstance(value, Tensor):
        tensors[at] = value.detach()
        return {_TAG: "tensor", "value": at}
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biuf":
        tensors[at] = torch.from_numpy(np.array(value, order="C", dtype=value.dtype.newbyteorder("=")))
        return {_TAG: "array" if isinstance(value, np.ndarray) else "number", "value": at}
    raise TypeError(
        f"{at} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint does not hold: reading it back would run "
        "code. It holds None, bool, int, float, str, list, tuple, set, dict, tensors and NumPy arrays: return these "
        "from state_dict() and build the object again in load_state_dict()."
    )


_BUILDERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "counter": lambda items: Counter(dict(items)),
}


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `pack`, given the tensors by name."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(_TAG)
    if tag is None:
        return {k: unpack(v, tensors) for k, v in value.items()}
    if tag == "tensor":
        return tensors[value["value"]]
    if tag in ("array", "number"):
        array = tensors[value["value"]].numpy()
        return array if tag == "array" else array[()]
    return _BUILDERS[tag](unpack(value["value"], tensors))
