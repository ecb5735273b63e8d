"""Open raster files: one handle a file, thread and process, kept, bounded in number, never inherited."""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

OPEN_FILES = 128  # handles that a thread keeps; far from the 1,024 files that a process may usually have open
CACHE_BYTES = 256 * 2**20  # of decoded blocks that a process keeps; GDAL's own limit is 5 % of the machine's memory

_quiet = threading.Lock()
_inherited: list[Any] = []  # never closed: their locks and file positions are the parent's


class Grid(NamedTuple):
    """The pixel grid that a file on another one is resampled to, and how.

    Attributes
    ----------
    crs : str
        Coordinate reference system, WKT.
    transform : tuple of 6 floats
        Coefficients a, b, c, d, e, f of the affine transform from (column, row) to coordinates.
    height, width : int
        Pixels.
    resampling : str
        A name in `rasterio.enums.Resampling`.
    alpha : bool
        Whether a last band is added that says what the file has no data for; else its nodata value does.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int
    resampling: str
    alpha: bool


class Version(NamedTuple):
    """What tells a file from one that has been written in its place.

    Attributes
    ----------
    file, size, modified : int
        Inode, bytes, and nanoseconds.
    """

    file: int
    size: int
    modified: int


def version_of(path: str) -> Version | None:
    """Return a file's version; None for what is no file of the system's."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Version(status.st_ino, status.st_size, status.st_mtime_ns)


class _Handles(threading.local):
    def __init__(self) -> None:
        self.process = os.getpid()
        self.files: OrderedDict[tuple[str, Grid | None, Version | None], tuple[Any, Any]] = OrderedDict()


_handles = _Handles()


def open_raster(path: str, grid: Grid | None = None, version: Version | None = None) -> Any:
    """Return this thread's dataset of a file, on its own grid or resampled to another, opened at its first use.

    Parameters
    ----------
    path : str
        A path, or whatever else rasterio opens.
    grid : Grid, optional
        Where the file is to be read on another grid than its own.
    version : Version, optional
        Which one: a handle of another is not used.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    OSError
        If it can't be opened.
    """
    if _handles.process != os.getpid():
        _start_anew()
    files = _handles.files
    key = (path, grid, version)
    if key in files:
        files.move_to_end(key)
        return files[key][0]
    files[key] = opened = _open(path, grid)
    while len(files) > OPEN_FILES:
        for dataset in files.popitem(last=False)[1]:
            dataset.close()
    return opened[0]


def _start_anew() -> None:
    """Forget what a forked process inherited."""
    global _quiet
    _inherited.append(_handles.files)
    _handles.files, _handles.process = OrderedDict(), os.getpid()
    _quiet = threading.Lock()  # another thread of the parent may have held it


def _open(path: str, grid: Grid | None) -> tuple[Any, Any]:
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    _bound_cache()
    if "://" not in path and not path.startswith("/vsi") and not os.path.exists(path):
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        raise FileNotFoundError(f"{path}: there is no such file{where}: correct the path")
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # the scene judges what that means
        try:
            source = rasterio.open(path)
        except rasterio.errors.RasterioIOError as error:
            raise OSError(f"{path}: can't be read as a raster: {error}") from error
        if grid is None:
            return source, source
        has_alpha = any(interpretation.name == "alpha" for interpretation in source.colorinterp)
        warped = WarpedVRT(
            source,
            crs=grid.crs,
            transform=rasterio.Affine(*grid.transform),
            height=grid.height,
            width=grid.width,
            resampling=Resampling[grid.resampling],
            add_alpha=grid.alpha and not has_alpha,
        )
        return warped, source


def _bound_cache() -> None:
    """Bound GDAL's cache of decoded blocks in this process, unless the user did."""
    from rasterio._env import get_gdal_config, set_gdal_config
    from rasterio.env import getenv, hasenv

    if "GDAL_CACHEMAX" in os.environ or (hasenv() and "GDAL_CACHEMAX" in getenv()):
        return
    if int(get_gdal_config("GDAL_CACHEMAX") or 0) > CACHE_BYTES:
        set_gdal_config("GDAL_CACHEMAX", CACHE_BYTES)
