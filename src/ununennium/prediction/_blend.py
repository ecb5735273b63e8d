"""Tiles blended into a scene, of which only what tiles share is ever held."""

import torch
from torch import Tensor

from ununennium.prediction._tiles import Tiles


class Blend:
    """Sums weighted tiles, given row by row from left to right, and hands out what no later tile has a share in.

    Held are a strip on the right of the last tile, and one as wide as the scene for the next row.

    Parameters
    ----------
    rows, columns : Tiles
        From top to bottom and from left to right.
    first : int
        The first tile row that will be given.
    device : torch.device
        Where tiles are.
    """

    def __init__(self, rows: Tiles, columns: Tiles, first: int, device: torch.device) -> None:
        self._rows, self._columns, self._first = rows, columns, first
        self._row_weights, self._column_weights = rows.weights.to(device), columns.weights.to(device)
        self._right: Tensor | None = None
        self._below: Tensor | None = None  # sums of the rows that the last tile row shares with the next

    def add(self, row: int, column: int, tile: Tensor | None) -> Tensor | None:
        """Add a tile, and return the pixels that it finishes.

        Parameters
        ----------
        row, column : int
            Which tile.
        tile : Tensor or None
            Its values (K, size, size); None if it has no pixel with data, and so nothing to share.

        Returns
        -------
        Tensor or None
            The pixels (K, height, width) of ``rows.finished(row)`` and ``columns.finished(column)``.
        """
        (top, bottom), (left, right) = self._rows.finished(row), self._columns.finished(column)
        right_before, self._right = self._right, None
        if tile is None:  # what is held for its pixels is for none
            return None
        total = tile * (self._row_weights[row, :, None] * self._column_weights[column])
        if column and right_before is not None:
            total[:, :, : right_before.shape[2]] += right_before
        height, width = bottom - top, right - left
        if column + 1 < len(self._columns):
            self._right = total[:, :, width:].clone()
        total = total[:, :, :width]
        if len(self._rows) > 1:
            self._carry(row, total, left, right, height)
        return total[:, :height]

    def _carry(self, row: int, total: Tensor, left: int, right: int, height: int) -> None:
        """Take over what the row above left in these columns, and leave what this one shares with the next."""
        starts, size = self._rows.starts, self._rows.size
        if self._below is None:
            most = max(starts[i] + size - starts[i + 1] for i in range(len(starts) - 1))
            self._below = total.new_zeros(len(total), most, self._columns.length)
        if row > self._first:
            above = starts[row - 1] + size - starts[row]
            total[:, :above] += self._below[:, :above, left:right]
        if row + 1 < len(starts):
            below = size - height
            self._below[:, :below, left:right] = total[:, height:]
