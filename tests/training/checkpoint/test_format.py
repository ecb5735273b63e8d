"""The files of a checkpoint: complete, verified, readable by anyone, harmless."""

import hashlib
import io
import json
import os
import pickle
import random
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ununennium._checkpoint_files import digest_of
from ununennium.training import CheckpointError, EMACallback, Trainer, export_weights
from ununennium.training.checkpoint import Contents, Share, Writer, begin, newest, read, write
from ununennium.training.checkpoint.plain import pack, unpack
from ununennium.training.errors import DamagedCheckpointError


def contents(training=None):
    return Contents({"weight": torch.arange(6.0).reshape(2, 3)}, training or {"a": 1}, {"position": {"epoch": 1}})


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.generic)):
        return type(a) is type(b) and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):  # an OrderedDict comes back as a dict, which keeps its order
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


PLAIN = {
    "none": None, "flags": [True, False],
    "big": 2**100, "text": "Größe", "nan": float("nan"), "inf": -float("inf"),
    "tiny": 5e-324, "tuple": (1, (2, "x"), []), "set": {1, "a"}, "frozen": frozenset({3}),
    "keys": {1: "a", (2, 3): "b"},
    "ordered": OrderedDict(a=1), "counter": Counter({3: 1, 5: 2}), "dollar": {"$": "x", "value": 1},
    "tensor": torch.tensor([1.5, 2.5], dtype=torch.bfloat16), "zero-d": torch.tensor(3),
    "nested": [{"t": torch.ones(2)}],
    "clash": {"a": {"b": torch.zeros(2)}, "a.b": torch.ones(2), 1: torch.full((2,), 2.0), "1": torch.full((2,), 3.0)},
    "array": np.arange(6, dtype=np.uint32).reshape(2, 3), "number": np.float32(0.1), "flag": np.bool_(True),
    "python": random.getstate(), "numpy": np.random.get_state(), "legacy": np.random.get_state(legacy=False),
    "bits": np.random.default_rng(0).bit_generator.state,
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_comes_back_as_it_was(tmp_path, name):
    write(tmp_path / "c", contents({"value": PLAIN[name]}))
    assert same(read(tmp_path / "c").training["value"], PLAIN[name])


def test_what_does_not_fit_is_named_down_to_the_key():
    with pytest.raises(TypeError, match=r"state\.ema\.log\.1 is a pathlib\.[\w.]+, which a checkpoint does not hold"):
        pack({"ema": {"log": [1, Path("/x")]}}, {}, "state")
    assert unpack(pack({"ok": [1]}, {}, "state"), {}) == {"ok": [1]}


@pytest.mark.parametrize(
    ("model", "training"),
    [({"w": torch.ones(2)}, {"bad": object()}), ({"w": torch.eye(2).to_sparse()}, {})],
    ids=["before the first file", "among the files"],
)
def test_nothing_is_left_behind_when_writing_fails(tmp_path, model, training):
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        write(tmp_path / "c", Contents(model, training, {}))
    assert os.listdir(tmp_path) == []


def test_a_name_is_never_reused(tmp_path):
    write(tmp_path / "c", contents())
    with pytest.raises(FileExistsError, match="never reused"):
        write(tmp_path / "c", contents())


def test_anyone_can_read_the_weights(tmp_path):
    write(tmp_path / "c", contents())
    assert torch.equal(load_file(tmp_path / "c" / "model.safetensors")["weight"], contents().model["weight"])
    modes = {p.name: oct(p.stat().st_mode) for p in (tmp_path / "c").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_tied_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    model = {
        "a": base,
        "tied": base,
        "view": base[1:],
        "transposed": base.t(),
        "channels": torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write(tmp_path / "c", Contents(model, {}, {}))
    stored = read(tmp_path / "c").model
    assert all(torch.equal(stored[name], value) for name, value in model.items())


def test_every_flipped_byte_is_found(tmp_path):
    """In every file, at every 37th place and at both ends."""
    write(tmp_path / "c", contents({"value": torch.arange(50)}))
    for file in (tmp_path / "c").iterdir():
        sound = file.read_bytes()
        for place in {*range(0, len(sound), 37), len(sound) - 1}:
            file.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
            with pytest.raises(CheckpointError):
                read(tmp_path / "c")
        file.write_bytes(sound)
    read(tmp_path / "c")


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "training.json", "training.safetensors"])
def test_missing_and_malicious_files_are_refused(tmp_path, name):
    """Trap 25: a pickle in place of each file is refused and never run."""
    write(tmp_path / "c", contents())
    file = tmp_path / "c" / name
    sound = file.read_bytes()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint at|can't be read"):
        read(tmp_path / "c")

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="damaged"):
        read(tmp_path / "c")
    torch.save(Evil(), file)
    with pytest.raises(CheckpointError, match="damaged"):
        read(tmp_path / "c")
    assert not (tmp_path / "executed").exists()
    file.write_bytes(sound)
    read(tmp_path / "c")


class Executes:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


def sign(folder, manifest):
    """Write a manifest with the digest that it would have been written with."""
    manifest = {k: v for k, v in manifest.items() if k != "sha256"}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}, indent=1))


def put(folder, name, data):
    """Put a file in place of another; size and digests are right, as whoever can write the one file makes them."""
    (folder / name).write_bytes(data)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        sign(folder, manifest)


def averaging_trainer():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    batches = [(torch.ones(2, 2), torch.ones(2, 1))]
    options = {"callbacks": [EMACallback(decay=0.5)], "device": "cpu", "progress": False}
    return Trainer(model, optimizer, nn.MSELoss(), batches, **options)


def checkpoint_of_a_run(path, processes):
    """Save a run with averages; as several processes do, each of which writes a part."""
    trainer = averaging_trainer()
    trainer.fit(1)
    if processes == 1:
        return trainer.save(path)
    aside = begin(path)
    held = read(trainer.save(path.with_name("whole")))
    writers = [Writer() for _ in range(processes)]
    for rank, writer in enumerate(writers):
        writer.save(path, held, share=Share(rank, processes, aside))
    for writer in writers:
        writer.wait()
    return path


def in_framing(data):
    """Return bytes as the header of a safetensors file, where JSON is meant to be."""
    return len(data).to_bytes(8, "little") + data


def payloads(folder):
    """Return what runs code for whoever unpickles it, in a file of its own or where a parser looks next."""
    harm = Executes(folder)
    saved = io.BytesIO()
    torch.save(harm, saved)
    old = io.BytesIO()
    torch.save(harm, old, _use_new_zipfile_serialization=False)
    texts = [pickle.dumps(harm, protocol) for protocol in (0, 2, 5)]
    return [*texts, saved.getvalue(), old.getvalue(), *map(in_framing, texts)]


def files_of(processes):
    parts = [""] if processes == 1 else [f".{rank}" for rank in range(processes)]
    sharded = [f"{stem}{part}.safetensors" for stem in ("model", "training", "averaged") for part in parts]
    return [*sharded, "training.json", "manifest.json"]


@pytest.mark.parametrize(
    ("processes", "name"), [(processes, name) for processes in (1, 2) for name in files_of(processes)]
)
def test_a_pickle_is_never_run_though_all_digests_are_right(tmp_path, processes, name):
    """Trap 25: whoever can write a file can write its digest, so that it is the parsers that must be harmless."""
    path = checkpoint_of_a_run(tmp_path / "runs" / "step-00000001-0001", processes)
    assert sorted(os.listdir(path)) == sorted(files_of(processes))
    put(path, name, (path / name).read_bytes())  # the control: so signed, a sound file is taken
    averaging_trainer().load(path)
    assert newest(path.parent)[0] == path
    export_weights(path, tmp_path / "sound.safetensors")
    executed = tmp_path / "executed"
    pickle.loads(payloads(executed)[0])
    executed.rmdir()  # and this is what a payload does
    for payload in payloads(executed):
        put(path, name, payload)
        trainer = averaging_trainer()
        weights = [p.clone() for p in trainer.model.parameters()]
        for load in (trainer.load, trainer.load_weights):
            with pytest.raises(DamagedCheckpointError, match=r"can't be understood|manifest\.json is damaged"):
                load(path)
        assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
        with pytest.raises(DamagedCheckpointError):
            export_weights(path, tmp_path / "weights.safetensors")
        with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError, match="not one of the 1"):
            newest(path.parent)
        assert not executed.exists()
        assert not (tmp_path / "weights.safetensors").exists()


def test_a_newer_format_says_what_to_do(tmp_path):
    write(tmp_path / "c", contents())
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    sign(tmp_path / "c", manifest | {"format": 99})
    with pytest.raises(CheckpointError, match=r"format version 99.*upgrade"):
        read(tmp_path / "c")


def test_a_plain_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*manifest\.json"):
        read(tmp_path)


def test_a_big_endian_array_comes_back_with_its_values(tmp_path):
    write(tmp_path / "c", contents({"value": np.arange(4, dtype=">i4")}))
    assert read(tmp_path / "c").training["value"].tolist() == [0, 1, 2, 3]


def test_a_folder_of_checkpoints_is_told_from_one(tmp_path):
    write(tmp_path / "step-00000001-0001", contents())
    with pytest.raises(CheckpointError, match=r"it is a folder of checkpoints; name one of them, .*last"):
        read(tmp_path)
