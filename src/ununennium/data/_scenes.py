"""Scenes gone through once, in strips."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ununennium.data._classes import Classes
from ununennium.data.scene import Scene, Window


def as_scenes(scenes: Scene | Sequence[Scene]) -> tuple[Scene, ...]:
    """Return scenes as a tuple.

    Raises
    ------
    ValueError
        If there are none, or some have labels and others do not.
    """
    found = (scenes,) if isinstance(scenes, Scene) else tuple(scenes)
    if not found:
        raise ValueError("there is no scene: pass one or several, as Scene(image, label)")
    for scene in found:
        if not isinstance(scene, Scene):
            raise TypeError(f"scenes must be of type Scene, got {scene!r}: write Scene(image, label)")
        if (scene.label is None) != (found[0].label is None):
            with_label, without = sorted((scene, found[0]), key=lambda each: each.label is None)
            raise ValueError(f"{with_label} has a label, and {without} has none: give all a label, or none")
    return found


def targets_in(scene: Scene, classes: Classes, bands: Sequence[int]) -> Iterator[tuple[Window, NDArray[np.int64]]]:
    """Yield windows that cover a scene, and their targets: ``ignore_index`` where a chip of these bands has it.

    Without labels every pixel that has data is given a target that is not ``ignore_index``.
    """
    for window in scene._strips():
        if scene.label is None:
            other = int(classes.ignore_index == 0)
            targets = np.full((window.height, window.width), other, np.int64)
        else:
            targets = classes.encode(*scene.read_label(window), scene, window)
        if not scene._is_complete:
            targets[~scene.read(window, bands)[1]] = classes.ignore_index
        yield window, targets
