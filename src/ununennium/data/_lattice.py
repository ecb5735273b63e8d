"""Scenes on one pixel grid: what makes blocks of several scenes, or of one place at several dates, the same blocks."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ununennium.data.scene import Scene, _apply

_TOLERANCE = 0.01  # of a pixel


class Lattice:
    """A pixel grid without end that scenes lie on, and the stretch of it that they take up.

    Parameters
    ----------
    crs : str or None
        WKT.
    transform : tuple of 6 floats
        Of the first pixel.
    shape : tuple of 2 ints
        Rows and columns that scenes take up.
    image : tuple of str, optional
        Files of the one scene that lies here, where it has no georeference to be recognised by.
    """

    def __init__(
        self,
        crs: str | None,
        transform: tuple[float, ...],
        shape: tuple[int, int],
        image: tuple[str, ...] | None = None,
    ) -> None:
        self.crs, self.transform, self.shape, self.image = crs, transform, shape, image

    @classmethod
    def of(cls, scene: Scene) -> "Lattice":
        """Return the lattice of a scene alone."""
        transform = tuple(float(value) for value in tuple(scene.transform)[:6])
        unplaced = scene.crs is None and transform == (1, 0, 0, 0, 1, 0)
        return cls(_wkt(scene), transform, scene.shape, scene.image if unplaced else None)

    def offset(self, scene: Scene) -> tuple[int, int] | None:
        """Return the row and column of a scene's first pixel; None if it is on another grid."""
        if self.image is not None:
            return (0, 0) if (scene.image, scene.shape) == (self.image, self.shape) else None
        if _wkt(scene) != self.crs:
            return None
        a, b, c, d, e, f = self.transform
        other, extent = scene.transform, max(scene.shape)
        pixel = max(abs(a) + abs(b), abs(d) + abs(e))
        drift = max(abs(other.a - a), abs(other.b - b), abs(other.d - d), abs(other.e - e)) * extent
        if drift > _TOLERANCE * pixel:
            return None
        col, row = _apply(~type(other)(a, b, c, d, e, f), (other.c, other.f))
        if max(abs(row - round(row)), abs(col - round(col))) > _TOLERANCE:
            return None
        return round(row), round(col)

    def grow(self, scene: Scene, offset: tuple[int, int]) -> None:
        """Take up a scene too."""
        row, col = min(offset[0], 0), min(offset[1], 0)
        a, b, c, d, e, f = self.transform
        self.transform = (a, b, c + a * col + b * row, d, e, f + d * col + e * row)
        stops = [max(self.shape[axis], offset[axis] + scene.shape[axis]) for axis in range(2)]
        self.shape = (stops[0] - row, stops[1] - col)


def lattices_of(scenes: Iterable[Scene]) -> list[tuple[Lattice, list[Scene]]]:
    """Return the lattices that scenes lie on, with the scenes on each."""
    found: list[tuple[Lattice, list[Scene]]] = []
    for scene in scenes:
        for lattice, members in found:
            offset = lattice.offset(scene)
            if offset is not None:
                lattice.grow(scene, offset)
                members.append(scene)
                break
        else:
            found.append((Lattice.of(scene), [scene]))
    return found


def check_apart(groups: list[tuple[Lattice, list[Scene]]]) -> None:
    """Raise for scenes that overlap and are on different grids, so that no blocks are common to them.

    Raises
    ------
    ValueError
        Naming two such scenes.
    """
    if len(groups) == 1:
        return
    placed = [(number, scene) for number, (_, members) in enumerate(groups) for scene in members if scene.crs]
    boxes = np.array([_geographic_box(scene) for _, scene in placed]).reshape(-1, 4)
    for number, (group, scene) in enumerate(placed):
        left, bottom, right, top = boxes[number]
        near = (boxes[:, 0] < right) & (boxes[:, 2] > left) & (boxes[:, 1] < top) & (boxes[:, 3] > bottom)
        for other in np.flatnonzero(near[:number]).tolist():
            if placed[other][0] != group and (_overlap(scene, placed[other][1]) or _overlap(placed[other][1], scene)):
                raise ValueError(
                    f"{placed[other][1].image[0]} and {scene.image[0]} overlap, but on different pixel grids, so that "
                    "the same ground could be in two parts: resample them to one grid (gdalwarp -tap -tr …), leave "
                    "one out, or split them with allow_overlap=True"
                )


def _wkt(scene: Scene) -> str | None:
    return None if scene.crs is None else str(scene.crs.to_wkt())


def _points(scene: Scene, count: int = 21) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return coordinates of points spread over a scene."""
    height, width = scene.shape
    rows, cols = np.meshgrid(np.linspace(0, height, count), np.linspace(0, width, count), indexing="ij")
    return _apply(scene.transform, (cols.ravel(), rows.ravel()))


def _geographic_box(scene: Scene) -> tuple[float, float, float, float]:
    """Return west, south, east and north; without end in a local coordinate system, which has no place on Earth."""
    from rasterio.warp import transform

    if not _is_on_earth(scene):
        return -math.inf, -math.inf, math.inf, math.inf
    lons, lats = transform(scene.crs, "EPSG:4326", *_points(scene))
    return min(lons), min(lats), max(lons), max(lats)


def _is_on_earth(scene: Scene) -> bool:
    return scene.crs is not None and bool(scene.crs.is_geographic or scene.crs.is_projected)


def _overlap(scene: Scene, other: Scene) -> bool:
    """Tell whether a point of a scene lies inside another, farther than a pixel from its edge."""
    from rasterio.warp import transform

    if scene.crs != other.crs and not (_is_on_earth(scene) and _is_on_earth(other)):
        return False
    points = _points(scene)
    xs, ys = points if scene.crs == other.crs else map(np.asarray, transform(scene.crs, other.crs, *points))
    cols, rows = _apply(~other.transform, (xs, ys))
    height, width = other.shape
    inside = (cols > 1) & (cols < width - 1) & (rows > 1) & (rows < height - 1)
    return bool(np.any(inside))
