"""Rasters that tests write, as small as they can be."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from ununennium.data import _files

UTM33 = "EPSG:32633"


@pytest.fixture
def raster(tmp_path):
    """Return a function that writes a GeoTIFF (C, H, W) or (H, W) and gives its path."""

    def write(
        name,
        values,
        *,
        origin=(500_000.0, 5_000_000.0),
        pixel=10.0,
        crs=UTM33,
        nodata=None,
        bands=None,
        mask=None,
        alpha=None,
        tile=None,
        transform=None,
    ) -> Path:
        values = values[None] if values.ndim == 2 else values
        if alpha is not None:
            values = np.concatenate([values, alpha[None].astype(values.dtype)])
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        profile = {"tiled": True, "blockxsize": tile, "blockysize": tile} if tile else {}
        transform = transform or rasterio.Affine(pixel, 0, origin[0], 0, -pixel, origin[1])
        with (
            warnings.catch_warnings(action="ignore", category=rasterio.errors.NotGeoreferencedWarning),
            rasterio.open(
                path,
                "w",
                driver="GTiff",
                height=values.shape[1],
                width=values.shape[2],
                count=len(values),
                dtype=values.dtype,
                crs=crs,
                transform=transform,
                nodata=nodata,
                **profile,
            ) as file,
        ):
            if alpha is not None:
                file.colorinterp = [ColorInterp.gray, *[ColorInterp.undefined] * (len(values) - 2), ColorInterp.alpha]
            for number, band in enumerate(bands or (), start=1):
                file.set_band_description(number, band)
            file.write(values)
            if mask is not None:
                file.write_mask(mask)
        return path

    yield write
    _close_rasters()


@pytest.fixture
def close_rasters():
    """Return what closes the files that a thread has open, so that the next read opens them anew."""
    return _close_rasters


def _close_rasters():
    while _files._handles.files:
        for dataset in _files._handles.files.popitem()[1]:
            dataset.close()


@pytest.fixture
def draws():
    return np.random.default_rng(0)
