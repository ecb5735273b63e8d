"""A model from its checkpoint, and a map from it."""

import pytest
import torch
from maps import by_hand, pixels
from torch import nn

from ununennium.models import RasterModel, create_model, register_model
from ununennium.prediction import load_model, predict_scene
from ununennium.training import CheckpointCallback, Trainer, checkpoint
from ununennium.training.errors import CheckpointError


@pytest.fixture
def saved(tmp_path):
    """Write a checkpoint of a model, as a run would; return the link ``best`` to it."""

    def save(model, config):
        info = {"position": {"epoch": 1, "batch": 0, "optimizer_steps": 1}, "figures": {}, "run": "r"}
        info |= {} if config is None else {"model": config}
        parameters = frozenset(name for name, _ in model.named_parameters())
        contents = checkpoint.Contents(dict(model.state_dict()), {"extra": {}}, info, parameters)
        checkpoint.write(tmp_path / "checkpoints" / "step-00000001-0001", contents)
        (tmp_path / "checkpoints" / "best").symlink_to("step-00000001-0001")
        return tmp_path / "checkpoints" / "best"

    return save


@pytest.fixture(autouse=True)
def pointwise():
    def make(in_channels, num_classes, weights=None, **kwargs):
        network = nn.Conv2d(in_channels, num_classes, 1)
        network.model_config = {"name": "test_pointwise", "in_channels": in_channels, "num_classes": num_classes}
        return network

    register_model("test_pointwise", make, overwrite=True)


def test_a_map_needs_nothing_but_the_checkpoint(saved, scene, raster_model, tmp_path):
    model, path = raster_model(create_model("test_pointwise", 3, 4), fill=3.0, ignore_index=77), scene()
    best = saved(model, model.model_config)
    options = {"tile": 64, "progress": False, "device": "cpu"}
    ours = pixels(predict_scene(str(best), path, tmp_path / "a.tif", **options))
    assert (ours == pixels(predict_scene(model, path, tmp_path / "b.tif", **options))).all()
    again = load_model(best)
    assert isinstance(again, RasterModel)
    assert not any(module.training for module in again.modules())
    assert (again.bands, again.fill, again.ignore_index) == (model.bands, 3.0, 77)
    assert torch.equal(again.mean, model.mean)


def test_the_checkpoint_of_a_run_predicts_what_the_trained_model_does(scene, raster_model, tmp_path):
    model, path = raster_model(create_model("test_pointwise", 3, 4)), scene(64, 64)
    samples = [(torch.rand(3, 8, 8) * 4000, torch.randint(0, 4, (8, 8))) for _ in range(4)]
    loader = torch.utils.data.DataLoader(samples, 2)
    save = CheckpointCallback(tmp_path / "checkpoints")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Trainer(model, optimizer, nn.CrossEntropyLoss(), loader, loader, [save], device="cpu", progress=False).fit(1)
    options = {"output": "logits", "progress": False, "device": "cpu"}
    ours = pixels(predict_scene(tmp_path / "checkpoints" / "best", path, tmp_path / "map.tif", **options))
    model.to(memory_format=torch.contiguous_format)  # as it is loaded: trained, it has the channels last
    assert (ours == by_hand(model, path)).all()


def test_a_bare_model_of_create_model_is_made_anew(saved):
    model = create_model("test_pointwise", 3, 4)
    again = load_model(saved(model, {"class": "Conv2d", **model.model_config}))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_network_of_ones_own_is_passed(saved, raster_model):
    model = raster_model()
    best = saved(model, model.model_config)
    with pytest.raises(ValueError, match=r"the network was not made by create_model.*pass it"):
        load_model(best)
    again = load_model(best, nn.Conv2d(3, 4, 1))
    assert torch.equal(again.network.weight, model.network.weight)
    assert again.class_names == model.class_names


def test_a_checkpoint_that_does_not_tell_its_model_says_what_to_do(saved):
    model = nn.Conv2d(3, 4, 1)
    best = saved(model, None)
    with pytest.raises(CheckpointError, match=r"does not tell how its model is made: make the network yourself"):
        load_model(best)
    assert torch.equal(load_model(best, nn.Conv2d(3, 4, 1)).weight, model.weight)
    with pytest.raises(CheckpointError, match="is of another model"):
        load_model(best, nn.Conv2d(3, 5, 1))


def test_no_checkpoint_is_named_before_any_work(scene, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nothing"):
        predict_scene(tmp_path / "nothing", scene(), tmp_path / "map.tif")
