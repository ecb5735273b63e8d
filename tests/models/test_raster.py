import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ununennium.models import RasterModel, create_model, register_model
from ununennium.palette import palette

BANDS = ["B2", "B3", "B8"]


def make(network=None, **settings):
    settings = {"mean": [10.0, 20.0, 30.0], "std": [2.0, 4.0, 8.0], "class_names": ["water", "forest"]} | settings
    return RasterModel(nn.Identity() if network is None else network, BANDS, **settings)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.float32, torch.float64])
def test_the_network_gets_normalised_float32_of_rasters_of_any_type(dtype):
    low, high = (0, 255) if dtype == torch.uint8 else (0, 32767)
    values = np.random.default_rng(0).integers(low, high, (2, 3, 4, 5))
    if dtype == torch.uint16:
        values[0, 0, 0, 0] = 65535
    elif dtype != torch.uint8:
        values[0, 0, 0, 0] = -32768
    got = make()(torch.from_numpy(values).to(dtype))
    mean, std = (np.array(x).reshape(3, 1, 1) for x in ([10.0, 20.0, 30.0], [2.0, 4.0, 8.0]))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), (values - mean) / std, rtol=1e-6, atol=1e-6)


def test_without_statistics_values_are_given_as_they_are():
    images = torch.randint(0, 65535, (1, 3, 2, 2)).to(torch.uint16)
    got = make(mean=None, std=None)(images)
    assert torch.equal(got, images.to(torch.float32))


def test_what_the_network_returns_is_returned():
    class Two(nn.Module):
        def forward(self, images):
            return {"logits": images.sum(1), "features": images}

    got = make(Two())(torch.ones(1, 3, 2, 2))
    assert got.keys() == {"logits", "features"}


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4, 4), (3, 4, 4), (2, 2, 3, 4, 4)])
def test_images_of_other_bands_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\) for the bands B2, B3, B8, got \(\d"):
        make()(torch.zeros(shape))


def test_statistics_are_buffers_and_training_leaves_them():
    model = make(nn.Conv2d(3, 2, 1))
    assert set(model.state_dict()) == {"mean", "std", "network.weight", "network.bias"}
    assert {name for name, _ in model.named_parameters()} == {"network.weight", "network.bias"}
    assert model.mean.dtype == model.std.dtype == torch.float32


def test_statistics_are_copied():
    mean = torch.tensor([1.0, 2.0, 3.0])
    model = make(mean=mean)
    mean += 1
    assert model.mean.tolist() == [1, 2, 3]


@pytest.mark.parametrize("given", [[1, 2, 3], (1.0, 2.0, 3.0), torch.tensor([1, 2, 3]), np.array([1.0, 2.0, 3.0])])
def test_statistics_come_in_many_shapes(given):
    model = make(mean=given, std=given)
    assert model.mean.tolist() == model.std.tolist() == [1, 2, 3]


def test_classes_have_values_and_colours_of_their_own():
    model = make()
    assert model.class_values == (0, 1)
    assert model.colors == tuple(palette(2))
    model = make(class_values=[10, 40], colors=["#0000ff", "#00ff00"], ignore_index=7, fill=-1)
    assert (model.class_values, model.colors) == ((10, 40), ("#0000ff", "#00ff00"))
    assert (model.ignore_index, model.fill) == (7, -1.0)
    without = make(class_names=None)
    assert (without.class_names, without.class_values, without.colors) == (None, (), ())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mean": None}, ValueError, "mean is missing: give both mean and std"),
        ({"std": None}, ValueError, "std is missing: give both mean and std"),
        ({"mean": [1.0, 2.0]}, ValueError, r"mean has shape \(2,\) for 3 bands: give one for each"),
        ({"std": [[1.0, 2.0, 3.0]]}, ValueError, r"std has shape \(1, 3\) for 3 bands: give one for each"),
        ({"std": [1.0, 0.0, 1.0]}, ValueError, "std must be finite and positive"),
        ({"std": [1.0, -1.0, 1.0]}, ValueError, "std must be finite and positive"),
        ({"std": [1.0, math.nan, 1.0]}, ValueError, "std must be finite and positive"),
        ({"mean": [1.0, math.inf, 1.0]}, ValueError, "mean must be finite, but is {'B3': inf}"),
        ({"class_values": [1]}, ValueError, "class_values has 1 entries for 2 class_names: give one for each"),
        ({"class_values": [3, 3]}, ValueError, r"class_values must be another for each class, got \[3, 3\]"),
        ({"class_names": None, "class_values": [1]}, ValueError, "class_values has 1 entries for 0 class_names"),
        ({"colors": ["#000000"]}, ValueError, "colors has 1 entries for 2 class_names: give one for each"),
        ({"colors": ["#000000", "red"]}, ValueError, "'red' is no colour: write it as \"#rrggbb\""),
        (
            {"class_names": ["a", "b"], "class_values": [1.9, 3]},
            TypeError,
            r"value in class_values must be .* got 1\.9",
        ),
        ({"ignore_index": 254.9}, TypeError, r"ignore_index must be an integer, got 254\.9"),
        ({"class_names": "water"}, TypeError, "class_names must be a sequence of names, got 'water'"),
    ],
)
def test_settings_that_do_not_fit(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("bands", "error", "message"),
    [
        (["B2", "B3", "B2"], ValueError, "bands must name each band once, and at least one"),
        ([], ValueError, "bands must name each band once, and at least one"),
        ("VV", TypeError, "bands must be a sequence of names, got 'VV'"),
    ],
)
def test_bands_that_are_none(bands, error, message):
    with pytest.raises(error, match=message):
        RasterModel(nn.Identity(), bands)


def test_the_config_and_the_state_make_the_model_again():
    network = create_model("unet_resnet18", 3, 2, decoder_channels=(16, 8, 8, 8, 4))
    model = make(network, class_values=[10, 40], ignore_index=99, fill=-3.5)
    config = json.loads(json.dumps(model.model_config))
    assert config == model.model_config
    again = RasterModel.from_config(config)
    again.load_state_dict(model.state_dict())
    assert again.model_config == model.model_config
    assert (again.bands, again.class_names) == (("B2", "B3", "B8"), ("water", "forest"))
    assert (again.class_values, again.ignore_index, again.fill) == ((10, 40), 99, -3.5)
    images = torch.randint(0, 4000, (1, 3, 32, 32)).to(torch.uint16)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_the_config_is_a_copy():
    model = make(create_model("unet_resnet18", 3, 2))
    config = model.model_config
    config["network"]["num_classes"] = 99
    config["bands"].append("B9")
    assert model.model_config["network"]["num_classes"] == 2
    assert model.bands == ("B2", "B3", "B8")


def test_a_network_from_elsewhere_has_to_be_given():
    model = make(nn.Conv2d(3, 2, 1))
    config = model.model_config
    assert config["network"] is None
    with pytest.raises(ValueError, match=r"not made by create_model.*pass it, or register"):
        RasterModel.from_config(config)
    given = RasterModel.from_config(config, nn.Conv2d(3, 2, 1))
    given.load_state_dict(model.state_dict())
    assert torch.equal(given(torch.ones(1, 3, 2, 2)), model(torch.ones(1, 3, 2, 2)))


def test_a_registered_network_is_made_again(monkeypatch):
    from ununennium.models import _registry

    monkeypatch.setattr(_registry, "_factories", {})
    register_model("head", lambda in_channels, num_classes, weights: nn.Conv2d(in_channels, num_classes, 1))
    config = make(create_model("head", 3, 2)).model_config
    assert isinstance(RasterModel.from_config(config).network, nn.Conv2d)
    monkeypatch.setattr(_registry, "_factories", {})
    with pytest.raises(ValueError, match="Unknown model 'head'"):
        RasterModel.from_config(config)


def test_from_config_leaves_the_config_alone():
    config = make(nn.Conv2d(3, 2, 1)).model_config
    before = copy.deepcopy(config)
    RasterModel.from_config(config, nn.Conv2d(3, 2, 1))
    assert config == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_can_be_copied(duplicate):
    model = make(create_model("test_resnet", 3, 2)).eval()
    again = duplicate(model)
    assert again.model_config == model.model_config
    assert torch.equal(again(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)))
