"""A folder of checkpoints: one writer, names that rise, which is the newest and which are kept."""

import fcntl
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from ununennium.training import Callback, CheckpointCallback, CheckpointError, Trainer
from ununennium.training.checkpoint import Contents, Folder, newest, read, write
from ununennium.training.checkpoint import format as files

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

OF_VERSION_1 = Path(__file__).with_name("format-1")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """It takes longest by far."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def own(tmp_path):
    folder = Folder(tmp_path)
    folder.open()
    yield folder
    folder.close()


def contents(epoch=1, batch=0, run="r"):
    position = {"epoch": epoch, "batch": batch, "optimizer_steps": epoch}
    return Contents({"w": torch.ones(2)}, {}, {"run": run, "position": position})


def refused(path):
    """Return what another process is told that opens the folder; "" if it may."""
    reader, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Folder(path).open()
        except CheckpointError as error:
            os.write(pipe, str(error).encode())
        finally:
            os._exit(0)
    os.close(pipe)
    with open(reader) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


def test_another_process_is_refused_told_by_whom_and_touches_nothing(tmp_path, own):
    (tmp_path / ".tmp-begun").mkdir()
    remedy = "wait until it has ended or end it, or give this run a folder of its own"
    for _ in range(2):
        assert re.search(
            rf"being written to by another run \(process {os.getpid()} on .+\): {remedy}", refused(tmp_path)
        )
    assert (tmp_path / ".tmp-begun").exists()
    descriptor = own._lock
    own.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert not (tmp_path / ".lock").exists()
    assert refused(tmp_path) == ""


def test_a_lock_whose_file_is_taken_away_by_its_last_owner_is_none(tmp_path, monkeypatch):
    lockf, taken = fcntl.lockf, []

    def slow(descriptor, flags):
        lockf(descriptor, flags)
        if not taken:
            (tmp_path / ".lock").unlink()
            taken.append(True)

    monkeypatch.setattr(fcntl, "lockf", slow)
    folder = Folder(tmp_path)
    folder.open()
    assert "another run" in refused(tmp_path)
    folder.close()


def test_the_lock_goes_with_its_owner_though_children_of_it_live(tmp_path):
    """As the workers of a DataLoader do for a while after kill -9."""
    (opened, tell), (hold, let_go) = os.pipe(), os.pipe()
    owner = os.fork()
    if owner == 0:
        os.close(let_go)
        Folder(tmp_path).open()
        child = os.fork()
        if child == 0:
            os.read(hold, 1)
            os._exit(0)
        os.write(tell, str(child).encode())
        os.read(hold, 1)
        os._exit(0)
    try:
        child = int(os.read(opened, 20))
        assert f"process {owner} on" in refused(tmp_path)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        os.kill(child, 0)  # it lives
        assert refused(tmp_path) == ""
    finally:
        for descriptor in (let_go, hold, opened, tell):
            os.close(descriptor)


def test_names_rise_and_are_never_used_again(tmp_path, own):
    names = [own.new_name(7), own.new_name(7), own.new_name(3)]
    assert names == ["step-00000007-0001", "step-00000007-0002", "step-00000003-0003"]
    write(tmp_path / names[2], contents())
    shutil.rmtree(tmp_path / names[2])
    assert own.new_name(3) == "step-00000003-0004"
    own.open()  # as the next fit does
    assert own.new_name(3) == "step-00000003-0005"
    write(tmp_path / "step-00000001-0008", contents())
    own.close()
    other = Folder(tmp_path)
    other.open()
    assert other.new_name(2) == "step-00000002-0009"
    other.close()


def test_what_a_crash_left_is_taken_away_and_nothing_else(tmp_path):
    kept = tmp_path / "step-00000001-0001"
    write(kept, contents())
    shutil.copytree(kept, tmp_path / ".tmp-step-00000002-0002-aaaaaaaa")
    (tmp_path / ".tmp-mine").write_text("x")
    (tmp_path / ".tmp-best-bbbbbbbb").symlink_to(kept.name)
    (tmp_path / ".tmp-last-cccccccc").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    folder = Folder(tmp_path)
    folder.open()
    folder.close()
    assert {p.name for p in tmp_path.iterdir()} == {kept.name, "notes.txt", ".tmp-mine"}
    read(kept)


@pytest.mark.parametrize("pointer", ["best", "last"])
@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_is_no_pointer_is_not_replaced(tmp_path, pointer, make):
    make(tmp_path / pointer)
    with pytest.raises(FileExistsError, match=rf"{pointer} is no link .* choose another folder"):
        Folder(tmp_path).open()
    assert refused(tmp_path / "other") == ""
    assert [p.name for p in tmp_path.iterdir() if p.name != "other"] == [pointer]


def test_a_folder_that_can_not_be_is_said_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"can't be written to this folder .*choose another"):
        Folder(tmp_path / "file" / "folder").open()


def test_the_newest_is_the_last_that_was_made_not_that_of_the_most_steps(tmp_path):
    """A run that was begun anew in the same folder has fewer steps."""
    for name in ("step-00000009-0001", "step-00000002-0010", "step-00000005-0002"):
        write(tmp_path / name, contents())
    (tmp_path / "step-00000009-0099").symlink_to("step-00000009-0001")
    (tmp_path / "step-00000009-0100").touch()
    assert newest(tmp_path)[0].name == "step-00000002-0010"


def test_what_earlier_versions_made_is_older(tmp_path):
    for name in ("step-00000004-900a195f", "step-00000002-12345678"):  # random, though decimal
        shutil.copytree(OF_VERSION_1, tmp_path / name)
    assert newest(tmp_path)[0].name == "step-00000004-900a195f"
    own = Folder(tmp_path)
    own.open()
    name = own.new_name(1)
    assert name == "step-00000001-0001"
    write(tmp_path / name, contents())
    assert newest(tmp_path)[0].name == name
    own.settle(name, ["best", "last"], (), 1, False)
    own.close()
    assert len(list(tmp_path.glob("step-*"))) == 3


def test_the_newest_of_a_newer_version_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "step-00000001-0001", contents())
    with monkeypatch.context() as newer:
        newer.setattr(files, "FORMAT", 99)
        write(tmp_path / "step-00000002-0002", contents())
    with pytest.raises(CheckpointError, match="upgrade"):
        newest(tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_empty_or_missing_has_no_newest(tmp_path, there):
    if there:
        (tmp_path / "folder").mkdir()
    assert newest(tmp_path / "folder") is None


def test_where_a_pointer_leads_nothing_is_deleted(tmp_path, own):
    """Whoever put it there: nothing else asks for the first one here."""
    for number, pointers in enumerate([["best", "last"], ["last"], ["last"]], start=1):
        name = own.new_name(number)
        write(tmp_path / name, contents(number))
        own.settle(name, pointers, keep=(), num_last=1, epochs=False)
        assert os.readlink(tmp_path / "best") == "step-00000001-0001"
        assert os.readlink(tmp_path / "last") == name
        assert len(list(tmp_path.glob("step-*"))) == min(number, 2)


class Dictate(Callback):
    """Puts given figures into the logs, and looks whether the folder is this run's."""

    log_names = ("figure",)

    def __init__(self, values, folder):
        self.values, self.folder = values, folder

    def on_epoch_end(self, trainer, epoch, logs):
        logs["figure"] = self.values[epoch]
        assert "another run" in refused(self.folder)


def trainer(folder, values, **kwargs):
    model = nn.Linear(2, 1)
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        [(torch.ones(2, 2), torch.ones(2, 1))] * 2,
        callbacks=[Dictate(values, folder), CheckpointCallback(folder, "figure", "min", **kwargs)],
        device="cpu",
        progress=False,
    )


def places(folder):
    """Return (epoch, batch) of each checkpoint, in the order in which they were made."""
    paths = sorted(folder.glob("step-*"), key=lambda p: p.name.split("-")[2])
    positions = [read(path).info["position"] for path in paths]
    return [(position["epoch"], position["batch"]) for position in positions]


@pytest.mark.parametrize(
    ("kwargs", "kept"),
    [
        ({}, [2, 5]),
        ({"keep_last": 3}, [2, 3, 4, 5]),
        ({"keep_best": 2}, [2, 3, 5]),
        ({"keep_best": 3, "keep_last": 2}, [1, 2, 3, 4, 5]),
        ({"keep_best": 9}, [1, 2, 3, 5]),
        ({"save_last": False}, [2]),
        ({"save_last": False, "keep_best": 2}, [2, 3]),
        ({"save_best_only": False}, [1, 2, 3, 4, 5]),
        ({"save_best_only": False, "save_last": False}, [1, 2, 3, 4, 5]),
        ({"every_n_steps": 1}, [2, 5]),
        ({"every_n_steps": 1, "keep_last": 2}, [2, (4, 2), 5]),
        ({"every_n_steps": 1, "save_best_only": False}, [1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("cut", [None, 2, 3])
def test_what_is_kept(tmp_path, kwargs, kept, cut):
    """NaN is never best; a run that is left and goes on keeps the same."""
    values = [3.0, 1.0, 2.0, math.nan, math.nan]
    if cut:
        trainer(tmp_path, values, **kwargs).fit(cut)
    trainer(tmp_path, values, **kwargs).fit(5, resume="auto")
    assert places(tmp_path) == [place if isinstance(place, tuple) else (place, 0) for place in kept]
    assert read(tmp_path / "best").info["position"]["epoch"] == 2
    pointers = {"best", "last"} if kwargs.get("save_last", True) else {"best"}
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("step-")} == pointers
    if "last" in pointers:
        assert read(tmp_path / "last").info["position"]["epoch"] == 5


def test_what_is_not_of_the_run_stays(tmp_path):
    shutil.copytree(OF_VERSION_1, tmp_path / "step-00000004-900a195f")
    (tmp_path / "step-00000001-mine").mkdir()
    trainer(tmp_path, [1.0, 2.0]).fit(2)
    before = {p.name for p in tmp_path.glob("step-*")}
    assert len(before) == 4
    trainer(tmp_path, [3.0, 2.0, 1.0]).fit(3)  # another run, since it was not resumed
    assert before < {p.name for p in tmp_path.glob("step-*")}
    assert len(list(tmp_path.glob("step-*"))) == 5


def test_a_run_that_fails_leaves_the_folder_to_others(tmp_path):
    with pytest.raises(IndexError):
        trainer(tmp_path, [1.0]).fit(2)
    assert refused(tmp_path) == ""
