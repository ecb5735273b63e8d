"""Tiles along one side of a scene, and what each of them counts for where they overlap."""

import math
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_MULTIPLE = 32  # what most networks need their input's height and width to be divisible by


class Span(NamedTuple):
    """Positions ``start`` … ``stop - 1`` along a side."""

    start: int
    stop: int


class Tiles:
    """Tiles that cover one side of a scene, evenly, the first from its beginning and the last to its end.

    A side that is shorter than a tile is covered by one that reaches beyond it.

    Parameters
    ----------
    length : int
        Of the side, in pixels.
    size : int
        Of a tile, in pixels. A shorter side gets a shorter tile: the next multiple of 32.
    overlap : int
        The least that neighbours share, in pixels; less than ``size``.

    Attributes
    ----------
    size : int
        Of a tile, in pixels.
    starts : list of int
        Where each tile begins.
    """

    def __init__(self, length: int, size: int, overlap: int) -> None:
        self.length = length
        self.size = min(size, math.ceil(length / _MULTIPLE) * _MULTIPLE)
        rest = max(length - self.size, 0)
        steps = math.ceil(rest / (size - overlap))
        self.starts = [i * rest // max(steps, 1) for i in range(steps + 1)]

    def __len__(self) -> int:
        return len(self.starts)

    def finished(self, index: int) -> Span:
        """Return the positions for which a tile is the last that has a share: its beginning up to the next one's."""
        after = self.starts[index + 1] if index + 1 < len(self) else self.length
        return Span(self.starts[index], after)

    @cached_property
    def weights(self) -> Tensor:
        """What each tile counts for at each of its positions, float32 (tiles, size).

        At every position the weights of all tiles sum to one, so that a blend needs no division. A tile's weight
        rises from its edge as a raised cosine over what it shares with its neighbour, and is one at the scene's edges.
        """
        bumps = np.ones((len(self), self.size))
        for index, (start, after) in enumerate(pairwise(self.starts)):
            shared = start + self.size - after
            rise = np.sin(math.pi / 2 * (np.arange(shared) + 0.5) / max(shared, 1)) ** 2
            bumps[index, self.size - shared :] *= rise[::-1]
            bumps[index + 1, :shared] *= rise
        total = np.zeros(self.starts[-1] + self.size)
        for start, bump in zip(self.starts, bumps, strict=True):
            total[start : start + self.size] += bump
        for start, bump in zip(self.starts, bumps, strict=True):
            bump /= total[start : start + self.size]  # where tiles are so close that three of them overlap
        return torch.from_numpy(bumps.astype(np.float32))


def share_of(tiles: Tiles, rank: int, size: int) -> tuple[range, range]:
    """Return which tile rows a process finishes, and which it has to compute for that.

    Parameters
    ----------
    tiles : Tiles
        From top to bottom.
    rank, size : int
        Number of the process, and how many there are.
    """
    first, end = (len(tiles) * r // size for r in (rank, rank + 1))
    reaching = (i for i in range(first) if tiles.starts[i] + tiles.size > tiles.starts[first])
    return range(first, end), range(next(reaching, first) if first < end else end, end)
