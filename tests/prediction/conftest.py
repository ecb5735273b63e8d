"""Small real GeoTIFFs, and models for them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from maps import BANDS, GRID
from torch import nn

from ununennium.models import RasterModel

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))  # processes.py


@pytest.fixture
def scene(tmp_path):
    """Write a scene of random uint16 values, three bands of them; return its path."""

    def write(height=150, width=190, name="scene.tif", empty=(), dtype="uint16", nodata=0, bands=BANDS, seed=0):
        values = np.random.default_rng(seed).integers(1, 4000, (len(bands), height, width)).astype(dtype)
        for rows, columns in empty:
            values[:, rows, columns] = nodata
        profile = {"driver": "GTiff", "height": height, "width": width, "count": len(bands), "dtype": dtype}
        grid = {"crs": "EPSG:32633", "transform": GRID, "nodata": nodata}
        with rasterio.open(tmp_path / name, "w", **profile, **grid) as dataset:
            dataset.write(values)
            dataset.descriptions = bands
        return tmp_path / name

    return write


@pytest.fixture
def raster_model():
    def make(network=None, classes=4, **options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Conv2d(3, classes, 1) if network is None else network
        names = {"class_names": [f"class {i}" for i in range(classes)], **options}
        return RasterModel(network, BANDS, [2000.0] * 3, [1000.0] * 3, **names)

    return make
