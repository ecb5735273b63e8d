"""A run that is killed leaves no map, and the next one is as if it had not been."""

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from maps import left_behind, pixels
from torch import nn

from ununennium.prediction import _map, predict_scene

SMALL = {"tile": 64, "overlap": 16, "device": "cpu", "progress": False}


def model(wait=None):
    """Return a pointwise model that calls ``wait`` with each forward's number."""
    torch.manual_seed(0)
    conv, count = nn.Conv2d(3, 4, 1), iter(range(1000))

    def before_forward(module, inputs):
        wait(next(count))

    if wait is not None:
        conv.register_forward_pre_hook(before_forward)
    return conv


def stopped(moment, number, source, destination):
    """Predict in a process of its own, end it by a signal at a moment; return its exit status.

    Parameters
    ----------
    moment : int or {"cog", "replace"}
        A forward's number, after the map's COG was begun, or when it is whole but not in its place.
    """
    reached, say = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(60)

            def here(*args):
                os.write(say, b"!")
                time.sleep(0.5 if number == signal.SIGINT else 50)

            def before(function):
                return lambda *args: (here(), function(*args))[1]

            if moment == "cog":
                _map._check_blocks = before(_map._check_blocks)
            elif moment == "replace":
                os.replace = before(os.replace)
            predict_scene(model(lambda n: n == moment and here()), source, destination, overwrite=True, **SMALL)
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(say)
    assert os.read(reached, 1) == b"!"
    os.close(reached)
    os.kill(child, number)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("moment", [1, 3, "cog", "replace"])
def test_sigkill_at_any_moment_leaves_what_was_there(scene, tmp_path, moment, there):
    path, destination = scene(), tmp_path / "map.tif"
    if there:
        destination.write_text("mine")
    assert stopped(moment, signal.SIGKILL, path, destination) == signal.SIGKILL
    assert (destination.read_text() == "mine") if there else not destination.exists()
    assert len(left_behind(tmp_path)) == 1
    ours = pixels(predict_scene(model(), path, destination, overwrite=there, **SMALL))
    assert left_behind(tmp_path) == []
    assert (ours == pixels(predict_scene(model(), path, tmp_path / "other.tif", **SMALL))).all()


@pytest.mark.parametrize("moment", [1, "cog"])
def test_ctrl_c_ends_a_run_and_leaves_nothing(scene, tmp_path, moment):
    path = scene()
    assert os.waitstatus_to_exitcode(stopped(moment, signal.SIGINT, path, tmp_path / "map.tif")) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.tif"]


def test_a_process_of_its_own_is_killed(scene, tmp_path):
    path, destination = scene(), tmp_path / "map.tif"
    victim = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("victim.py"), path, destination], stdout=subprocess.PIPE, text=True
    )
    with victim:
        for _ in range(4):
            assert victim.stdout.readline() == "batch\n"
        assert len(left_behind(tmp_path)) == 1
        victim.kill()
    assert victim.returncode == -signal.SIGKILL
    assert not destination.exists()
    predict_scene(model(), path, destination, **SMALL)
    assert left_behind(tmp_path) == []


def test_what_another_run_is_making_is_left_alone(scene, tmp_path):
    path, destination = scene(), tmp_path / "map.tif"
    (tmp_path / ".map.tif.making-notours").mkdir()
    (tmp_path / ".other.tif.making-00000000").mkdir()

    def another(number):
        if number == 1:
            predict_scene(model(), path, destination, **SMALL)
            assert len(left_behind(tmp_path)) == 3

    predict_scene(model(another), path, destination, **SMALL)
    assert left_behind(tmp_path) == [".map.tif.making-notours", ".other.tif.making-00000000"]
