"""What maps hold, what they should, and what a run leaves behind."""

from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import Affine
from torch import nn

GRID = Affine(10, 0, 500_000, 0, -10, 5_000_000)
BANDS = ("B2", "B3", "B8A")


def pixels(path):
    with rasterio.open(path) as dataset:
        return dataset.read()


def by_hand(model, path, padded=None):
    """Return what a model gives for a whole scene at once."""
    image = torch.from_numpy(pixels(path).astype(np.float32))[None]
    if padded is not None:
        image = nn.functional.pad(image, (0, padded[1] - image.shape[3], 0, padded[0] - image.shape[2]))
    with torch.no_grad():
        return model.eval()(image)[0].numpy()


def left_behind(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name.startswith("."))
