"""Several processes make the map of one, and fail together."""

import numpy as np
import pytest
import torch
from maps import left_behind, pixels
from processes import run, torchrun
from torch import nn

from ununennium.prediction import predict_scene
from ununennium.training.errors import NonFiniteError, ProcessError

SMALL = {"tile": 64, "device": "cpu", "progress": False}


class Network(nn.Sequential):
    """Looks around, and may fail at a forward."""

    def __init__(self, fails_at=None):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.forwards, self.fails_at = 0, fails_at

    def forward(self, images):
        self.forwards += 1
        outputs = super().forward(images / 2000)
        return outputs * torch.nan if self.forwards == self.fails_at else outputs


def share(rank, world, source, destination, options):
    network = Network()
    predict_scene(network, source, destination, distributed=True, **SMALL, **options)
    return network.forwards


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", [{"output": "probabilities", "overlap": 16}, {"overlap": 50}], ids=str)
def test_several_processes_make_the_map_of_one(scene, tmp_path, world, options):
    path = scene(330, 200, empty=[(slice(100, 220), slice(0, 150))])
    options = {**options, "batch_size": 2}
    one = Network()
    expected = pixels(predict_scene(one, path, tmp_path / "one.tif", **SMALL, **options))
    forwards = run(world, share, tmp_path / "out", path, tmp_path / "map.tif", options)
    ours = pixels(tmp_path / "map.tif")
    assert ours.tobytes() == expected.tobytes()
    assert max(forwards) < one.forwards
    assert left_behind(tmp_path) == []


def test_more_processes_than_tile_rows(scene, tmp_path):
    path = scene(40, 90)
    expected = pixels(predict_scene(Network(), path, tmp_path / "one.tif", **SMALL))
    run(3, share, tmp_path / "out", path, tmp_path / "map.tif", {})
    assert (pixels(tmp_path / "map.tif") == expected).all()


def failing(rank, world, source, destination, who):
    network = Network(3 if rank == who else None)
    try:
        predict_scene(network, source, destination, distributed=True, **SMALL)
    except (NonFiniteError, ProcessError) as error:
        return type(error).__name__, str(error), network.forwards
    return None


@pytest.mark.parametrize("who", [0, 1])
def test_one_that_fails_ends_all(scene, tmp_path, who):
    path = scene(2000, 64)
    results = run(2, failing, tmp_path / "out", path, tmp_path / "map.tif", who)
    kind, message, _ = results[who]
    assert kind == "NonFiniteError"
    assert "no finite value" in message
    kind, message, forwards = results[1 - who]
    assert kind == "ProcessError"
    assert f"process {who} could not go on" in message
    assert "no finite value" in message
    assert forwards < 10  # of about 18
    assert not (tmp_path / "map.tif").exists()
    assert left_behind(tmp_path) == []


def refused(rank, world, source, destination):
    try:
        predict_scene(Network(), source if rank == 0 else "nowhere.tif", destination, distributed=True, **SMALL)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_one_that_can_not_begin_ends_all(scene, tmp_path):
    first, second = run(2, refused, tmp_path / "out", scene(), tmp_path / "map.tif")
    assert first.startswith("ProcessError: process 1 could not go on")
    assert second.startswith("FileNotFoundError: nowhere.tif")
    (tmp_path / "map.tif").write_text("mine")
    first, _ = run(2, refused, tmp_path / "again", scene(), tmp_path / "map.tif")
    assert first.startswith("FileExistsError")


def test_torchrun(scene, tmp_path):
    path = scene(200, 100)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom torch import nn\nfrom ununennium.prediction import predict_scene\n"
        "torch.manual_seed(0)\n"
        "predict_scene(nn.Conv2d(3, 4, 1), *sys.argv[1:], tile=64, device='cpu', distributed=True)\n"
    )
    started = torchrun(script, path, tmp_path / "map.tif")
    out, err = started.communicate(timeout=100)
    assert started.returncode == 0, out + err
    torch.manual_seed(0)
    expected = pixels(predict_scene(nn.Conv2d(3, 4, 1), path, tmp_path / "one.tif", **SMALL))
    assert np.array_equal(pixels(tmp_path / "map.tif"), expected)
