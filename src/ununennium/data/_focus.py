"""Where the pixels of each class are: a sample of them, of bounded size, taken in one pass."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ununennium.data._classes import Classes
from ununennium.data.scene import Window

PIXELS_A_CLASS = 10_000


class ClassPixels:
    """A sample of pixels of each class, every pixel of the class as likely in it as any other.

    Parameters
    ----------
    targets : iterable of (int, Window, ndarray)
        Numbers of scenes, windows and their targets, together every pixel once.
    classes : Classes
    wanted : sequence of int, optional
        Targets that are looked for; by default all that there are.

    Attributes
    ----------
    pixels : dict of int to ndarray of int (N, 3)
        By target, at most 10,000 pixels: scene, row, column.

    Notes
    -----
    Each pixel is given a random number, and those with the smallest are kept, so that one pass does and parts can be
    joined. The numbers are drawn from a generator of its own: equal scenes have equal samples.
    """

    def __init__(
        self, targets: Iterable[tuple[int, Window, NDArray[np.int64]]], classes: Classes, wanted: Sequence[int] | None
    ) -> None:
        draws = np.random.Generator(np.random.PCG64(0))
        keys: dict[int, NDArray[np.float64]] = {}
        self.pixels: dict[int, NDArray[np.int64]] = {}
        for scene, window, values in targets:
            flat = values.ravel()
            for target in np.unique(flat).tolist():
                if target == classes.ignore_index or (wanted is not None and target not in wanted):
                    continue
                places = np.flatnonzero(flat == target)
                drawn = draws.random(len(places))
                if target in keys and len(keys[target]) == PIXELS_A_CLASS:
                    smaller = drawn < keys[target].max()
                    places, drawn = places[smaller], drawn[smaller]
                rows, cols = np.divmod(places, window.width)
                found = np.stack([np.full_like(rows, scene), rows + window.row, cols + window.col], axis=1)
                if target in keys:
                    drawn = np.concatenate([keys[target], drawn])
                    found = np.concatenate([self.pixels[target], found])
                if len(drawn) > PIXELS_A_CLASS:
                    kept = np.argpartition(drawn, PIXELS_A_CLASS)[:PIXELS_A_CLASS]
                    drawn, found = drawn[kept], found[kept]
                keys[target], self.pixels[target] = drawn, found
