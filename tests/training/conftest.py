"""A small problem in float64: images (C, H, W) with classes and nodata, and a model without randomness."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.losses import pixels
from ununennium.training import figures, windows
from ununennium.training.step import Stepper

IGNORE = 255


@pytest.fixture
def make_model():
    def make(channels: int = 3, classes: int = 4, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, classes, 1)
            return nn.Sequential(*layers).to(dtype)

    return make


@pytest.fixture
def make_data():
    def make(
        samples: int = 20, channels: int = 3, classes: int = 4, size: int = 6, ignored: float = 0.0, seed: int = 0
    ) -> TensorDataset:
        """Images and masks; with ``ignored`` sample i has up to that share of its pixels as nodata, growing with i."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(samples, channels, size, size, generator=generator, dtype=torch.float64)
        masks = torch.randint(0, classes, (samples, size, size), generator=generator)
        share = torch.linspace(0, ignored, samples)[:, None, None]
        masks[torch.rand(masks.shape, generator=generator) < share] = IGNORE
        return TensorDataset(images, masks)

    return make


@pytest.fixture
def loader(make_data):
    return DataLoader(make_data(), batch_size=2)


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Have the CPU stand in for a device that the host must not wait for: nothing is looked at, all stays there."""
    begin = Stepper.begin
    monkeypatch.setattr(Stepper, "begin", lambda self, *p: begin(self, *p) or setattr(self, "looks", False))
    for user in (windows, figures):
        monkeypatch.setattr(user, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(pixels, "_by_class", lambda logits, targets: False)  # what DiceLoss does on a CPU alone
    monkeypatch.setattr(pixels, "refuse_strange_labels", lambda *a: None)
