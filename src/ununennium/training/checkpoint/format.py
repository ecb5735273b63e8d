"""The files of a checkpoint: how they are committed, and how they are verified."""

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ununennium import __version__
from ununennium._checkpoint_files import (
    ASIDE,
    AVERAGED,
    AVERAGING_FORMAT,
    FORMAT,
    MANIFEST,
    MODEL,
    TENSORS,
    TREE,
    CheckpointError,
    DamagedCheckpointError,
    digest_of,
    flush,
    manifest_of,
    readable_manifest_of,
    text_of,
    verified,
    whole_or_absent,
)
from ununennium.training.checkpoint.plain import unpack
from ununennium.training.checkpoint.shards import assemble

__all__ = [  # with what it has from below, so that those who write and read checkpoints find it in one place
    "ASIDE",
    "AVERAGED",
    "MODEL",
    "TENSORS",
    "TREE",
    "Contents",
    "begin",
    "chosen",
    "commit",
    "export_weights",
    "flush",
    "give_up",
    "manifest_of",
    "read",
    "shard_name",
    "whole_or_absent",
    "write_files",
]

_OWN_KEYS = ("format", "versions", "files", "sha256")
_CHUNK = 1 << 22


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes
    ----------
    model : dict of str to Tensor
        Parameters and buffers by canonical name.
    training : dict
        Plain data with tensors: everything else.
    info : dict
        What the manifest says without the rest being read: run, position and figures.
    parameters : frozenset of str
        Which names of the model are parameters, and not buffers; empty in what was read.
    averaged : dict of str to Tensor
        Averages of the same, from a callback that keeps some. What ``info`` says of them: their callback, and whether
        they are the ones that are meant by default.
    """

    model: dict[str, Tensor]
    training: dict[str, Any]
    info: dict[str, Any]
    parameters: frozenset[str] = frozenset()
    averaged: dict[str, Tensor] = field(default_factory=dict)


def begin(path: Path) -> Path:
    """Make the folder beside ``path`` in which its files are written.

    Raises
    ------
    FileExistsError
        If there is something at ``path`` already.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already, and a checkpoint's name is never reused: choose another")
    os.makedirs(path.parent, exist_ok=True)
    aside = path.parent / f"{ASIDE}{path.name}-{secrets.token_hex(4)}"
    os.mkdir(aside)
    return aside


def write_files(aside: Path, files: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    """Write files, given as bytes-like parts, flushed to disk; return what the manifest says of them."""
    return {name: _write(aside / name, parts) for name, parts in files.items()}


def commit(aside: Path, path: Path, described: dict[str, Any], info: dict[str, Any]) -> None:
    """Make a checkpoint of the files that were written aside: the manifest, and one rename to its place.

    Parameters
    ----------
    aside, path : Path
        The folder of the files, and where it goes.
    described : dict
        What `write_files` gave for them.
    info : dict
        Plain JSON for the manifest.
    """
    manifest = {
        "format": AVERAGING_FORMAT if "averaged" in info else FORMAT,
        **info,
        "versions": {
            "ununennium": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "files": described,
    }
    manifest["sha256"] = digest_of(manifest)
    _write(aside / MANIFEST, [text_of(manifest)])
    flush(aside)
    os.rename(aside, path)
    flush(path.parent)


def give_up(aside: Path) -> None:
    """Leave nothing behind of files that will not be committed."""
    shutil.rmtree(aside, ignore_errors=True)


def read(path: str | Path) -> Contents:
    """Read a checkpoint, or the one that a link points at, and verify every file.

    Raises
    ------
    DamagedCheckpointError
        If there is none, or it is damaged, naming the file.
    CheckpointError
        If it was written by a newer version.
    """
    folder = Path(path).expanduser().resolve()
    manifest = readable_manifest_of(folder)
    files = {name: verified(folder / name, expected) for name, expected in manifest["files"].items()}
    info = {k: v for k, v in manifest.items() if k not in _OWN_KEYS}
    try:
        training = unpack(json.loads(files[TREE]), assemble(_those_of(files, TENSORS)))
        model, averaged = assemble(_those_of(files, MODEL)), assemble(_those_of(files, AVERAGED))
        contents = Contents(model, training, unpack(info, {}), averaged=averaged)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{folder} is not whole: {error}") from error
    except Exception as error:  # its digests are right, and yet nobody can have written it with this package
        raise DamagedCheckpointError(f"{folder} can't be understood: {type(error).__name__}: {error}") from error
    return _from_1(contents) if manifest["format"] == 1 else contents


def chosen(contents: Contents, averaged: bool | None = None) -> Contents:
    """Return contents whose model has the averaged weights, or the raw ones; by default those that are meant.

    Raises
    ------
    CheckpointError
        If averaged weights are asked for, and there are none.
    """
    if averaged is None:
        averaged = bool(contents.averaged) and contents.info["averaged"]["default"]
    if averaged and not contents.averaged:
        raise CheckpointError(
            "the checkpoint holds no averaged weights, as its run kept none by then: leave averaged out, or train with "
            "an EMACallback"
        )
    return replace(contents, model=contents.averaged) if averaged else contents


def export_weights(path: str | Path, destination: str | Path, *, averaged: bool | None = None) -> Path:
    """Write a checkpoint's weights, sharded or not, to one safetensors file, whole or not at all.

    Parameters
    ----------
    path : str or Path
        A checkpoint, or a link to one.
    destination : str or Path
        The file; its folder is made if need be.
    averaged : bool, optional
        Whether to take averaged weights, or the raw ones. By default those with which the run was validated.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileExistsError
        If it exists.
    CheckpointError
        If the checkpoint is damaged, or holds no averaged weights and they are asked for.
    """
    from safetensors.torch import save

    destination = Path(destination).expanduser()
    if destination.exists():
        raise FileExistsError(f"{destination} exists: name another file, or remove it")
    contents = chosen(read(path), averaged)
    about = {"model": json.dumps(contents.info["model"])} if "model" in contents.info else None
    data = save(contents.model, about)  # create_model(weights=…) finds the bands there
    with whole_or_absent(destination) as aside:
        aside.write_bytes(data)
    return destination


def _write(path: Path, parts: Iterable[Any]) -> dict[str, Any]:
    """Write a new file, flush it, and return its size and digest."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _CHUNK):
                chunk = view[start : start + _CHUNK]
                digest.update(chunk)
                size += len(chunk)
                while chunk:  # a full disk first writes less than it was given, and raises only then
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def shard_name(file: str, rank: int) -> str:
    """Return the name of one process's part of a file."""
    return file.replace(".", f".{rank}.")


def _those_of(files: dict[str, bytes], name: str) -> list[bytes]:
    stem, ending = name.split(".")
    return [data for file, data in files.items() if file.split(".")[0] == stem and file.endswith(ending)]


def _from_1(contents: Contents) -> Contents:
    """Bring a checkpoint of format 1 to today's: those from inside an epoch start it anew."""
    training = contents.training
    training["state"] |= {"batch": 0}
    training |= {"settings": {}, "figures": None, "loader": None}
    for _, memory in training["callbacks"]:
        if "kept" in memory:  # CheckpointCallback
            best = memory["kept"].get("best")
            memory |= {"bests": [] if best is None else [(memory["best"], best)], "pointers": memory["kept"]}
    return contents
