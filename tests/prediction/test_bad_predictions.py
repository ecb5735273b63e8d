"""What can't be predicted, said before any work where that is possible, and with nothing left behind."""

import os
import resource
import shutil
import threading
import time
from collections import namedtuple

import pytest
import torch
from maps import left_behind, pixels
from processes import run
from torch import nn

from ununennium.data import Scene
from ununennium.prediction import _map, predict_scene
from ununennium.training.errors import NonFiniteError

SMALL = {"tile": 64, "overlap": 16, "device": "cpu", "progress": False}


class Counting(nn.Conv2d):
    """A pointwise model that counts its forwards, and may change what it gives."""

    def __init__(self, change=lambda outputs: outputs):
        torch.manual_seed(0)
        super().__init__(3, 4, 1)
        self.change, self.forwards = change, 0

    def forward(self, images):
        self.forwards += 1
        return self.change(super().forward(images))


def refused(tmp_path, error, match, model, source, forwards=0, **options):
    with pytest.raises(error, match=match):
        predict_scene(model, source, tmp_path / "map.tif", **{**SMALL, **options})
    assert model.forwards <= forwards
    assert not (tmp_path / "map.tif").exists()
    assert left_behind(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ununennium")]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"output": "class"}, "output must be 'classes' or 'probabilities' or 'logits', got 'class'"),
        ({"overlap": 64}, "overlap=64 must be less than tile=64: leave it out for an eighth of it"),
        ({"overlap": -1}, "overlap must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not on this machine"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be"),
        ({"bands": ["B2", "B3", "B99"]}, r"takes the bands B2, B3, B99, and .* has B2, B3, B8A .*Scene\(path, bands="),
    ],
)
def test_arguments(scene, tmp_path, options, match):
    refused(tmp_path, ValueError, match, Counting(), scene(), **options)


def test_bands_that_a_raster_model_needs(scene, raster_model, tmp_path):
    with pytest.raises(ValueError, match=r"takes the bands B2, B3, B8A, and .* has red, green, blue .*Scene"):
        predict_scene(raster_model(), scene(bands=("red", "green", "blue")), tmp_path / "map.tif", **SMALL)
    with pytest.raises(ValueError, match="bands names 2 bands, B2, B3, and the model takes 3, B2, B3, B8A: name one"):
        predict_scene(raster_model(), scene(), tmp_path / "map.tif", bands=["B2", "B3"], **SMALL)


def test_a_destination_that_is_there_is_replaced_only_when_asked(scene, tmp_path):
    path, model = scene(), Counting()
    (tmp_path / "map.tif").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists already: choose another name, or replace it .overwrite"):
        predict_scene(model, path, tmp_path / "map.tif", **SMALL)
    assert model.forwards == 0
    assert (tmp_path / "map.tif").read_text() == "mine"
    predict_scene(model, path, tmp_path / "map.tif", overwrite=True, **SMALL)
    assert pixels(tmp_path / "map.tif").shape == (1, 150, 190)
    with pytest.raises(ValueError, match="is the source itself"):
        predict_scene(model, path, path, overwrite=True, **SMALL)
    with pytest.raises(IsADirectoryError, match=r"is a folder: name a file in it"):
        predict_scene(model, path, tmp_path, **SMALL)


def test_a_failed_run_leaves_the_map_that_was_there(scene, tmp_path):
    (tmp_path / "map.tif").write_text("mine")
    with pytest.raises(NonFiniteError):
        predict_scene(Counting(lambda o: o * torch.nan), scene(), tmp_path / "map.tif", overwrite=True, **SMALL)
    assert (tmp_path / "map.tif").read_text() == "mine"
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "options", "error", "match"),
    [
        (lambda o: [o], {}, TypeError, r"the model gives .*list.*needs one tensor \(B, classes, H, W\)"),
        (lambda o: o[..., ::2, ::2], {}, ValueError, r"for images \(1, 3, 64, 64\) the model gives \(1, 4, 32, 32\)"),
        (lambda o: o.mean((2, 3)), {}, ValueError, r"the model gives \(1, 4\)"),
        (lambda o: o[:, :1], {}, ValueError, 'one value a pixel, .* use output="logits"'),
    ],
)
def test_outputs_that_are_no_map(scene, tmp_path, change, options, error, match):
    refused(tmp_path, error, match, Counting(change), scene(), forwards=1, **options)


def test_outputs_that_are_not_the_models_classes(scene, raster_model, tmp_path):
    with pytest.raises(ValueError, match="the model gives 4 values a pixel, and has 5 class_names: name as many"):
        predict_scene(raster_model(nn.Conv2d(3, 4, 1), classes=5), scene(), tmp_path / "map.tif", **SMALL)
    with pytest.raises(
        ValueError, match="holds values from 0 to 65535, and class_values has -3: give the class a value"
    ):
        predict_scene(raster_model(class_values=[0, 1, 2, -3]), scene(), tmp_path / "map.tif", **SMALL)


@pytest.mark.parametrize("output", ["classes", "probabilities", "logits"])
def test_nan_where_there_is_data_is_an_error_that_names_the_pixel(scene, tmp_path, output):
    path = scene(empty=[(slice(10, 20), slice(10, 20))])

    def spoil(outputs):
        outputs = outputs.clone()
        outputs[-1, :, 15, 15] = torch.nan
        return outputs

    first_alone = {"tile": 512, "output": output}  # the spoilt pixel has no data
    predict_scene(Counting(spoil), path, tmp_path / "fine.tif", **SMALL | first_alone)
    match = (
        "no finite value at row 15, column 57 of the scene"  # the second tile begins at column 42, and is spoilt at 15
    )
    refused(tmp_path, NonFiniteError, match, Counting(spoil), path, 99, output=output, batch_size=2)


def test_a_damaged_source_is_an_error_that_names_it(scene, tmp_path):
    path = scene(400, 400)
    source = Scene(path)
    os.truncate(path, os.path.getsize(path) // 2)
    model = Counting()
    refused(tmp_path, OSError, r"scene.tif", model, source, 99)


def test_an_error_in_writing_ends_the_run_at_once(scene, tmp_path, monkeypatch):
    path, model = scene(64, 64 + 48 * 40), Counting(lambda outputs: time.sleep(0.05) or outputs)

    def fail(*args):
        raise OSError("gone")

    monkeypatch.setattr(os, "pwrite", fail)
    refused(tmp_path, OSError, "gone", model, path, forwards=5, batch_size=1)


def test_a_disk_without_room_is_found_before_any_work(scene, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(tmp_path, OSError, "no room for the map .*make room", Counting(), scene(), forwards=1)


def size_of_map(rank, world, source, destination):
    return os.path.getsize(predict_scene(Counting(), source, destination, output="logits", **SMALL))


def limited(rank, world, size, source, destination, late):
    """Predict where no file can grow beyond a size, from the beginning or when the map is made of its pixels."""
    write = _map._write_cog

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def write_limited(*args):
        limit()
        write(*args)

    if late:
        _map._write_cog = write_limited
    else:
        limit()
    try:
        predict_scene(Counting(), source, destination, output="logits", **SMALL)
    except OSError as error:
        return str(error)
    return None


@pytest.mark.parametrize("late", [False, True])
def test_a_disk_that_fills_up_is_an_error_and_no_map(scene, tmp_path, late):
    path = scene(600, 600)  # with an overview
    # In a process of its own, too: a thread that has just ended may still hold a lock of GDAL's, and a fork keeps it.
    needed = run(1, size_of_map, tmp_path / "out", path, tmp_path / "whole.tif")[0]
    for size in [0.01, 0.3, 0.9, 1 - 100 / needed] if late else [0.5]:
        message = run(1, limited, tmp_path / "out", int(size * needed), path, tmp_path / "map.tif", late)[0]
        assert message is not None
        assert "room" in message
        assert not (tmp_path / "map.tif").exists()
        assert left_behind(tmp_path) == []


def test_reading_and_writing_go_on_while_the_model_computes(scene, tmp_path):
    path, spans = scene(64, 64 + 48 * 7), []

    class Slow(Scene):
        def read(self, *args):
            start = time.monotonic()
            time.sleep(0.1)
            spans.append((start, time.monotonic()))
            return super().read(*args)

    computing = []

    def compute(outputs):
        start = time.monotonic()
        time.sleep(0.1)
        computing.append((start, time.monotonic()))
        return outputs

    predict_scene(Counting(compute), Slow(path), tmp_path / "map.tif", batch_size=1, **SMALL)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in spans for b in computing)
    assert both > 0.4  # of 0.8 s each
