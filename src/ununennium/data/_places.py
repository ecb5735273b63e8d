"""Where windows may lie: everywhere in a scene, or in the blocks of one part of a spatial split. Integers only."""

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ununennium.data.scene import Window

Ints = NDArray[np.int64]


class Blocks:
    """The blocks that a scene lies in, and which of them are of one part.

    Parameters
    ----------
    parts : ndarray of int (rows of blocks, columns of blocks)
        The number of each block's part, -1 where no scene is.
    part : int
        The part that is meant.
    block, buffer : int
        Side of a block, and the distance that windows of different parts keep, pixels.
    row, col : int
        Where the scene's first pixel lies, counted from the first block's.

    Notes
    -----
    A window is of the part if every block that it touches is, and if it touches no block of a later part when it is
    made larger by the buffer on all sides. So of two windows of different parts the one of the earlier part keeps the
    distance from the blocks that the other lies in. Blocks touched are counted in tables of sums over rectangles.
    """

    def __init__(self, parts: NDArray[np.int16], part: int, block: int, buffer: int, row: int, col: int) -> None:
        self.is_own: NDArray[np.bool_] = parts == part
        self.is_later: NDArray[np.bool_] = parts > part
        self.block = block
        self.buffer = buffer
        self.row = row
        self.col = col
        self._foreign_sums, self._later_sums = _sums(~self.is_own), _sums(self.is_later)

    def without_buffer(self) -> "Blocks":
        """Return the same blocks with windows allowed up to their edges."""
        other = copy.copy(self)
        other.buffer = 0
        return other

    def allow(self, rows: Ints, row_stops: Ints, cols: Ints, col_stops: Ints) -> NDArray[np.bool_]:
        """Tell which windows, given by arrays that broadcast, are of the part."""
        foreign = _within(self._foreign_sums, *self._touched(rows, row_stops, cols, col_stops, 0))
        later = _within(self._later_sums, *self._touched(rows, row_stops, cols, col_stops, self.buffer))
        allowed: NDArray[np.bool_] = (foreign == 0) & (later == 0)
        return allowed

    def _touched(self, rows: Ints, row_stops: Ints, cols: Ints, col_stops: Ints, margin: int) -> tuple[Ints, ...]:
        """Return the first and last row and column of the blocks that windows touch with a margin."""
        last_row, last_col = self.is_own.shape[0] - 1, self.is_own.shape[1] - 1
        return (
            ((rows + (self.row - margin)) // self.block).clip(0, last_row),
            ((row_stops + (self.row + margin - 1)) // self.block).clip(0, last_row),
            ((cols + (self.col - margin)) // self.block).clip(0, last_col),
            ((col_stops + (self.col + margin - 1)) // self.block).clip(0, last_col),
        )

    def breaks(self, size: int, last: int, axis: int) -> Ints:
        """Return the positions from 0 to ``last`` at which a window of a size begins to touch other blocks."""
        edges = np.arange(1, self.is_own.shape[axis]) * self.block - (self.row, self.col)[axis]
        reach = (0, size - 1, -self.buffer, size - 1 + self.buffer)
        found = np.concatenate([[0], *(edges - distance for distance in reach)])
        return np.unique(found[(found >= 0) & (found <= last)])

    def extents(self, shape: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        """Return what is to be covered in each block of the part: rows from, to, columns from, to, in the scene.

        Where the next block in a row or column is of a later part, the buffer is left out.
        """
        extents = []
        height, width = self.is_own.shape
        for i, j in np.argwhere(self.is_own).tolist():
            top = i * self.block - self.row + (self.buffer if i > 0 and self.is_later[i - 1, j] else 0)
            left = j * self.block - self.col + (self.buffer if j > 0 and self.is_later[i, j - 1] else 0)
            bottom, right = shape
            if i + 1 < height:
                bottom = min(bottom, (i + 1) * self.block - self.row - (self.buffer if self.is_later[i + 1, j] else 0))
            if j + 1 < width:
                right = min(right, (j + 1) * self.block - self.col - (self.buffer if self.is_later[i, j + 1] else 0))
            extents.append((max(top, 0), bottom, max(left, 0), right))
        return extents


class Places:
    """All positions of windows of one size in one scene, as rectangles of positions that are alike.

    Parameters
    ----------
    shape : tuple of 2 ints
        Of the scene.
    size : tuple of 2 ints
        Of the windows. Along an axis where the scene is smaller there is one position, 0.
    blocks : Blocks, optional
        What confines them.

    Attributes
    ----------
    count : int
        Positions.
    """

    def __init__(self, shape: tuple[int, int], size: tuple[int, int], blocks: Blocks | None) -> None:
        self.shape, self.size, self.blocks = shape, size, blocks
        last = tuple(max(extent - side, 0) for extent, side in zip(shape, size, strict=True))
        zero = np.zeros(1, np.int64)
        self._rows = zero if blocks is None else blocks.breaks(size[0], last[0], 0)
        self._cols = zero if blocks is None else blocks.breaks(size[1], last[1], 1)
        self._row_stops = np.append(self._rows[1:], last[0] + 1)
        self._col_stops = np.append(self._cols[1:], last[1] + 1)
        self._allowed = self.allow(self._rows[:, None], self._cols[None, :])
        counts = np.where(self._allowed, np.outer(self._row_stops - self._rows, self._col_stops - self._cols), 0)
        self._cells = np.flatnonzero(counts)
        self._cumulated = np.cumsum(counts.ravel()[self._cells])
        self.count = int(counts.sum())

    def allow(self, rows: Ints, cols: Ints) -> NDArray[np.bool_]:
        """Tell which positions, given by arrays that broadcast, are among them."""
        if self.blocks is None:
            return np.ones(np.broadcast_shapes(rows.shape, cols.shape), np.bool_)
        row_stops = np.minimum(rows + self.size[0], self.shape[0])
        return self.blocks.allow(rows, row_stops, cols, np.minimum(cols + self.size[1], self.shape[1]))

    def at(self, number: int) -> tuple[int, int]:
        """Return the position with a number from 0 to count - 1."""
        place = int(np.searchsorted(self._cumulated, number, side="right"))
        i, j = divmod(int(self._cells[place]), len(self._cols))
        number -= int(self._cumulated[place - 1]) if place else 0
        down, right = divmod(number, int(self._col_stops[j] - self._cols[j]))
        return int(self._rows[i]) + down, int(self._cols[j]) + right

    def around(self, row: int, col: int) -> "Around":
        """Return the positions at which a window contains a pixel."""
        rows, row_counts = _overlap(self._rows, self._row_stops, row - self.size[0] + 1, row + 1)
        cols, col_counts = _overlap(self._cols, self._col_stops, col - self.size[1] + 1, col + 1)
        return Around(rows, cols, col_counts, np.cumsum(np.outer(row_counts, col_counts) * self._allowed))

    def covered(self, window: Window) -> NDArray[np.bool_] | None:
        """Return which pixels of a window any position's window holds; None where all are."""
        if self.blocks is None:
            return None
        mask = np.zeros((window.height, window.width), np.bool_)
        i, j = np.nonzero(self._allowed)
        rectangles = (
            self._rows[i] - window.row,
            self._row_stops[i] - 1 + self.size[0] - window.row,
            self._cols[j] - window.col,
            self._col_stops[j] - 1 + self.size[1] - window.col,
        )
        paint(mask, *rectangles)
        return mask

    def grid(self, stride: tuple[int, int]) -> Ints:
        """Return the positions (N, 2) of a regular grid over the scene, or in each block; the last of each row and
        column is shifted to end at the edge.
        """  # noqa: D205
        extents = [(0, self.shape[0], 0, self.shape[1])] if self.blocks is None else self.blocks.extents(self.shape)
        found = []
        for top, bottom, left, right in extents:
            rows = _starts(top, bottom, self.size[0], stride[0], self.shape[0])
            cols = _starts(left, right, self.size[1], stride[1], self.shape[1])
            found.append(np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2))
        positions = np.unique(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=0)
        return positions[self.allow(positions[:, 0], positions[:, 1])]


@dataclass(frozen=True)
class Around:
    """Positions around a pixel, numbered."""

    rows: Ints
    cols: Ints
    col_counts: Ints
    cumulated: Ints

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.cumulated[-1])

    def at(self, number: int) -> tuple[int, int]:
        """Return the position with a number from 0 to count - 1."""
        place = int(np.searchsorted(self.cumulated, number, side="right"))
        i, j = divmod(place, len(self.cols))
        number -= int(self.cumulated[place - 1]) if place else 0
        down, right = divmod(number, int(self.col_counts[j]))
        return int(self.rows[i]) + down, int(self.cols[j]) + right


def paint(mask: NDArray[np.bool_], tops: Ints, bottoms: Ints, lefts: Ints, rights: Ints) -> None:
    """Set rectangles of a mask, which may reach beyond it, to True."""
    height, width = mask.shape
    seen = (tops < height) & (bottoms > 0) & (lefts < width) & (rights > 0)
    clipped = (tops[seen].clip(0), bottoms[seen], lefts[seen].clip(0), rights[seen])
    for top, bottom, left, right in zip(*(edge.tolist() for edge in clipped), strict=True):
        mask[top:bottom, left:right] = True


def _starts(start: int, stop: int, size: int, stride: int, extent: int) -> Ints:
    """Return where windows begin that cover a stretch of an axis."""
    if extent <= size:
        return np.zeros(1, np.int64)
    if stop - start < size:
        return np.empty(0, np.int64)
    return np.unique(np.append(np.arange(start, stop - size + 1, stride), stop - size)).astype(np.int64)


def _overlap(starts: Ints, stops: Ints, start: int, stop: int) -> tuple[Ints, Ints]:
    """Return where stretches overlap another, and how far."""
    firsts = np.maximum(starts, start)
    return firsts, (np.minimum(stops, stop) - firsts).clip(0)


def _sums(flags: NDArray[np.bool_]) -> Ints:
    """Return the sums over all rectangles that begin at (0, 0), with a row and column of zeros before them."""
    sums = np.zeros((flags.shape[0] + 1, flags.shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(flags, axis=0), axis=1, out=sums[1:, 1:])
    return sums


def _within(sums: Ints, first_row: Ints, last_row: Ints, first_col: Ints, last_col: Ints) -> Ints:
    """Return sums over rectangles of which first and last rows and columns are given."""
    above, left = sums[first_row, last_col + 1], sums[last_row + 1, first_col]
    counts: Ints = sums[last_row + 1, last_col + 1] - above - left + sums[first_row, first_col]
    return counts
