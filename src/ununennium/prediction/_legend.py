"""What a map's values mean: the model's classes, or numbers as they are."""

from typing import Any

import numpy as np
from torch import nn

from ununennium.models import RasterModel
from ununennium.palette import palette, rgb
from ununennium.prediction._map import Legend
from ununennium.prediction._model import Output

_MOST = 65535  # the largest value that a map of classes holds


def class_values(model: nn.Module, channels: int) -> list[int]:
    """Return the value that each class has in a map.

    Raises
    ------
    ValueError
        If a map can't hold one.
    """
    named = isinstance(model, RasterModel) and model.class_names is not None
    values = list(model.class_values) if isinstance(model, RasterModel) and named else list(range(channels))
    for value in values:
        if not 0 <= value <= _MOST:
            raise ValueError(
                f"a map of classes holds values from 0 to {_MOST}, and class_values has {value}: give the class a "
                'value that it holds, or predict "probabilities"'
            )
    return values


def legend_of(
    model: nn.Module, output: Output, channels: int, crs: Any, transform: Any
) -> tuple[np.dtype[Any], Legend]:
    """Return the type of a map's values, and what the map says of them.

    Parameters
    ----------
    model : nn.Module
        A `RasterModel` names its classes.
    output : {"classes", "probabilities", "logits"}
    channels : int
        What the model gives a pixel.
    crs, transform
        Of the source.
    """
    names = model.class_names if isinstance(model, RasterModel) else None
    if output != "classes":
        descriptions = names if names is not None and len(names) == channels else ()
        return np.dtype(np.float32), Legend(crs, transform, float("nan"), None, {}, descriptions)
    values = class_values(model, channels)
    colors = model.colors if isinstance(model, RasterModel) and names is not None else palette(channels)
    ignored = [model.ignore_index] if isinstance(model, RasterModel) else []
    largest = 255 if len(values) < 256 and max(values) < 256 else _MOST
    free = (v for v in (*ignored, *range(largest, -1, -1)) if 0 <= v <= largest and v not in values)
    legend = Legend(
        crs,
        transform,
        next(free),
        dict(zip(values, map(rgb, colors), strict=True)),
        {} if names is None else dict(zip(values, names, strict=True)),
        (),
    )
    return np.dtype(np.uint8 if largest == 255 else np.uint16), legend
