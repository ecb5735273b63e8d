"""Writing behind the run's back: what was saved is the moment of the call, and what fails is heard of."""

import errno
import os
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ununennium.training import CheckpointError, NonFiniteError
from ununennium.training.checkpoint import Contents, Writer, read, write, writer

MODEL, TRAINING = "model.safetensors", "training.safetensors"


def contents(value=1.0, size=1000):
    return Contents({"w": torch.full((size,), value)}, {"m": torch.full((3,), value)}, {"position": {"epoch": 1}})


@pytest.fixture
def held(monkeypatch):
    """Writing threads wait until this event is set."""
    event, commit = threading.Event(), writer.commit

    def wait(*args):
        event.wait()
        commit(*args)

    monkeypatch.setattr(writer, "commit", wait)
    yield event
    event.set()


def failing(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(writer, "commit", fail)


def bits(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8).tolist()


def test_what_was_saved_may_change_as_soon_as_save_returns(tmp_path, held):
    """Trap 23."""
    model = {"w": torch.arange(2_000_000.0), "running": torch.ones(5, dtype=torch.float64)}
    training = {"moment": torch.ones(1000), "array": np.arange(5), "log": [1, {"a": 2}]}
    info = {"figures": {"loss": 1.0}, "position": {"epoch": 1}}
    saving = Writer()
    saving.save(tmp_path / "c", Contents(model, training, info))
    assert not (tmp_path / "c").exists()  # it has not begun
    for tensor in (*model.values(), training["moment"]):
        tensor.fill_(-7)
    training["array"][:] = -7
    training["log"][1]["a"] = -7
    training["log"].append(-7)
    info["figures"]["loss"] = -7
    held.set()
    saving.wait()
    stored = read(tmp_path / "c")
    assert torch.equal(stored.model["w"], torch.arange(2_000_000.0))
    assert torch.equal(stored.model["running"], torch.ones(5, dtype=torch.float64))
    assert torch.equal(stored.training["moment"], torch.ones(1000))
    assert stored.training["array"].tolist() == [0, 1, 2, 3, 4]
    assert stored.training["log"] == [1, {"a": 2}]
    assert stored.info == {"figures": {"loss": 1.0}, "position": {"epoch": 1}}


def test_one_is_written_at_a_time_and_none_spoils_another(tmp_path, monkeypatch):
    commit, running, seen = writer.commit, [], []

    def slow(aside, path, described, info):
        running.append(path)
        seen.append(len(running))
        time.sleep(0.02)
        commit(aside, path, described, info)
        running.remove(path)

    monkeypatch.setattr(writer, "commit", slow)
    saving = Writer()
    for number in range(5):
        saving.save(tmp_path / f"{number}", contents(float(number)))
    saving.wait()
    assert seen == [1] * 5
    for number in range(5):
        stored = read(tmp_path / f"{number}")
        assert stored.model["w"].unique().tolist() == stored.training["m"].unique().tolist() == [number]


def test_one_buffer_serves_all_until_it_is_released(tmp_path):
    saving = Writer()
    saving.reserve(contents())
    place, size = saving._buffer.data_ptr(), len(saving._buffer)
    assert size > 0
    for number, elements in enumerate([1000, 1000, 10]):
        saving.save(tmp_path / f"{number}", contents(float(number), elements))
        assert (saving._buffer.data_ptr(), len(saving._buffer)) == (place, size)
    saving.save(tmp_path / "larger", contents(9.0, 5000))
    assert len(saving._buffer) > size
    saving.release()  # though it may be writing
    assert len(saving._buffer) == 0
    saving.wait()
    assert read(tmp_path / "larger").model["w"].unique().tolist() == [9.0]
    assert read(tmp_path / "2").model["w"].tolist() == [2.0] * 10


@pytest.mark.parametrize("ask", ["check", "wait", "save"])
def test_a_write_that_fails_is_heard_of_once_with_its_path_and_a_remedy(tmp_path, monkeypatch, ask):
    cause = OSError(errno.ENOSPC, "No space left on device")
    saving = Writer()
    with monkeypatch.context() as full:
        failing(full, cause)
        saving.save(tmp_path / "c", contents())
        saving._thread.join()
    message = rf"{tmp_path}/c could not be written \(No space left on device\); .* stay as they are\. Make room"
    with pytest.raises(CheckpointError, match=message) as raised:
        saving.save(tmp_path / "next", contents()) if ask == "save" else getattr(saving, ask)()
    assert raised.value.__cause__ is cause
    assert not (tmp_path / "next").exists()
    saving.check()
    saving.save(tmp_path / "c", contents())
    saving.wait()
    read(tmp_path / "c")


def test_what_no_room_would_help_has_another_remedy(tmp_path, monkeypatch):
    failing(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(CheckpointError, match=r"\(Permission denied\); .* See that this folder can be written to"):
        write(tmp_path / "c", contents())


def test_an_error_of_another_kind_comes_as_it_is(tmp_path, monkeypatch):
    error = RuntimeError("odd")
    failing(monkeypatch, error)
    with pytest.raises(RuntimeError) as raised:
        write(tmp_path / "c", contents())
    assert raised.value is error


def test_done_is_called_in_the_thread_when_it_is_on_disk(tmp_path):
    calls = []
    saving = Writer()
    for name in ("a", "b"):
        path = tmp_path / name
        saving.save(path, contents(), lambda e, p=path: calls.append((e, p.exists(), threading.current_thread())))
    saving.wait()
    assert [call[:2] for call in calls] == [(None, True)] * 2
    assert threading.main_thread() not in [thread for *_, thread in calls]


class Impatient(Writer):
    """Asks for an error the moment that there is one, as a training loop may."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "_error" and value is not None:
            with suppress(CheckpointError):
                self.check()


@pytest.mark.parametrize("kind", [Writer, Impatient])
def test_done_is_told_the_error_whoever_asks_for_it_meanwhile(tmp_path, monkeypatch, kind):
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    told = []
    saving = kind()
    saving.save(tmp_path / "c", contents(), told.append)
    with suppress(CheckpointError):
        saving.wait()
    assert [type(error) for error in told] == [CheckpointError]


def test_an_error_of_done_is_heard_of_too(tmp_path):
    def done(error):
        raise OSError(errno.EROFS, "Read-only file system")

    saving = Writer()
    saving.save(tmp_path / "c", contents(), done)
    with pytest.raises(CheckpointError, match=rf"{tmp_path} could not be written \(Read-only file system\)"):
        saving.wait()


def test_a_name_that_exists_is_refused_at_once(tmp_path):
    write(tmp_path / "c", contents(1.0))
    saving = Writer()
    with pytest.raises(FileExistsError, match="never reused"):
        saving.save(tmp_path / "c", contents(2.0))
    saving.wait()
    assert read(tmp_path / "c").model["w"].unique().tolist() == [1.0]


@pytest.mark.parametrize("file", [MODEL, TRAINING])
def test_safetensors_reads_every_type_and_shape(tmp_path, file):
    """All in one file, so that each must begin where it may."""
    shapes = [(), (0,), (3,), (2, 0), (1, 5)]
    tensors = {
        f"{dtype} {shape}": (torch.rand(shape) * 9).to(dtype) for shape in shapes for dtype in reversed(writer._NAMES)
    }
    held = Contents(tensors, {}, {}) if file == MODEL else Contents({"w": torch.ones(1)}, tensors, {})
    write(tmp_path / "c", held)
    stored = load_file(tmp_path / "c" / file)
    assert len(stored) == len(tensors) == 5 * 16
    for name, value in tensors.items():
        there = stored[name if file == MODEL else f"training.{name}"]
        assert (there.dtype, there.shape, bits(there)) == (value.dtype, value.shape, bits(value)), name
    again = read(tmp_path / "c")
    again = again.model if file == MODEL else again.training
    assert all(bits(again[name]) == bits(value) for name, value in tensors.items())


def test_safetensors_reads_tensors_however_they_lie_in_memory(tmp_path):
    base = torch.arange(48.0).reshape(4, 12)
    model = {
        "base": base,
        "tied": base,
        "rows": base[1:3],
        "columns": base[:, ::5],
        "transposed": base.t(),
        "expanded": torch.arange(3.0).expand(5, 3),
        "channels_last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "conjugate": torch.rand(4, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.rand(3, 3)),
    }
    write(tmp_path / "c", Contents(model, {}, {}))
    stored = load_file(tmp_path / "c" / MODEL)
    assert stored.keys() == model.keys()
    assert all(torch.equal(stored[name], value) for name, value in model.items())


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), r"torch\.sparse_coo tensor of torch\.float32"),
        (torch.ones(2, dtype=torch.complex128), r"tensor of torch\.complex128"),
    ],
    ids=["sparse", "complex128"],
)
@pytest.mark.parametrize("place", ["w", "training.w"])
def test_tensors_that_the_files_do_not_hold_are_refused_by_name(tmp_path, tensor, kind, place):
    sound = {"sound": torch.ones(1)}
    held = Contents({"w": tensor}, sound, {}) if place == "w" else Contents(sound, {"w": tensor}, {})
    saving = Writer()
    with pytest.raises(TypeError, match=rf"^{place} is a .*{kind}, which .* keep it dense"):
        saving.save(tmp_path / "c", held)
    assert os.listdir(tmp_path) == []
    saving.save(tmp_path / "c", contents())
    saving.wait()
    read(tmp_path / "c")


INF, NAN = torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, torch.nan])


def optimizer(value):
    return {"optimizer": {"state": {"p": {"exp_avg": value}}}}


@pytest.mark.parametrize(
    ("model", "training", "named"),
    [
        ({"p": INF}, {}, "p"),
        ({"p": NAN}, {}, "p"),
        ({"p": NAN.bfloat16()}, {}, "p"),
        ({"p": NAN.to(torch.float8_e5m2)}, {}, "p"),
        ({"p": NAN.to(torch.complex64)}, {}, "p"),
        ({"buffer": NAN}, {}, "buffer"),
        ({}, optimizer(NAN), r"optimizer\.state\.p\.exp_avg"),
    ],
)
def test_what_is_not_finite_is_not_written(tmp_path, model, training, named):
    told = []
    saving = Writer()
    held = Contents({"p": torch.ones(2), **model}, training, {}, parameters=frozenset({"p"}))
    saving.save(tmp_path / "c", held, told.append)
    with pytest.raises(NonFiniteError, match=rf"^{named} holds NaN or infinite values") as raised:
        saving.wait()
    assert told == [raised.value]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("model", "training"),
    [({"mask": INF}, {}), ({}, {"callbacks": NAN}), ({}, optimizer(INF)), ({"count": torch.tensor(3)}, {})],
    ids=["attention mask", "callback", "optimizer", "integer"],
)
def test_what_may_be_infinite_is_written(tmp_path, model, training):
    held = Contents({"p": torch.ones(2), **model}, training, {}, parameters=frozenset({"p"}))
    write(tmp_path / "c", held)
    stored = read(tmp_path / "c")
    assert all(torch.equal(stored.model[name], value) for name, value in model.items())
