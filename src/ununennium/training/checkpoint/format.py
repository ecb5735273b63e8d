"""The files of a checkpoint, how they are committed, and how they are verified."""

import hashlib
import json
import os
import platform
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ununennium import __version__
from ununennium.training.checkpoint.plain import pack, unpack
from ununennium.training.errors import CheckpointError

FORMAT = 1
MODEL, TENSORS, TREE, MANIFEST = "model.safetensors", "training.safetensors", "training.json", "manifest.json"


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
        What the manifest says for people: position and figures.
    """

    model: dict[str, Tensor]
    training: dict[str, Any]
    info: dict[str, Any]


def new_name(optimizer_steps: int) -> str:
    """Return a name for a checkpoint of this optimizer step, which sorts by it and was never used before."""
    return f"step-{optimizer_steps:08d}-{secrets.token_hex(4)}"


def write(path: Path, contents: Contents) -> None:
    """Write a checkpoint: aside, flushed to disk, and committed by one rename.

    Raises
    ------
    FileExistsError
        If there is something at ``path`` already.
    TypeError
        If the training state holds what the format does not, naming where.
    """
    from safetensors.torch import save_file  # imported where it is used: `import ununennium.training` stays quick

    if path.exists():
        raise FileExistsError(f"{path} exists already; a checkpoint's name is never reused")
    tensors: dict[str, Tensor] = {}
    tree = pack(contents.training, tensors, "training")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        save_file(_separate(contents.model), aside / MODEL)
        save_file(_separate(tensors), aside / TENSORS)
        (aside / TREE).write_text(json.dumps(tree), encoding="utf-8")
        for name in (MODEL, TENSORS):  # safetensors makes files that only their owner can read
            (aside / name).chmod((aside / TREE).stat().st_mode)
        manifest = {
            "format": FORMAT,
            **pack(contents.info, {}, "info"),
            "versions": {
                "ununennium": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            "files": {name: _describe(aside / name) for name in (MODEL, TENSORS, TREE)},
        }
        manifest["sha256"] = _digest_of(manifest)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (MODEL, TENSORS, TREE, MANIFEST):
            _flush(aside / name)
        _flush(aside)
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _flush(path.parent)


def read(path: str | Path) -> Contents:
    """Read a checkpoint, or the one that a link points at, and verify every file.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged, naming the file.
    """
    from safetensors.torch import load

    folder = Path(path).resolve()
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"there is no checkpoint at {path}: a checkpoint is a folder with a {MANIFEST}")
    manifest = _manifest(folder)
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} has format version {manifest['format']}, this ununennium ({__version__}) reads up to {FORMAT}: "
            "upgrade ununennium to load it"
        )
    files: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder / name} can't be read: {error}") from error
        if len(data) != expected["size"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{folder / name} is damaged: size or SHA-256 differ from the manifest's")
        files[name] = data
    info = {k: v for k, v in manifest.items() if k not in ("format", "versions", "files", "sha256")}
    training = unpack(json.loads(files[TREE]), load(files[TENSORS]))
    return Contents(load(files[MODEL]), training, unpack(info, {}))


def point(directory: Path, pointer: str, name: str) -> None:
    """Let ``directory/pointer`` lead to the checkpoint ``name``, in one step: there is never no pointer."""
    link = directory / f".{pointer}.{secrets.token_hex(4)}"
    link.symlink_to(name, target_is_directory=True)
    os.replace(link, directory / pointer)
    _flush(directory)


def remove(path: Path) -> None:
    """Delete a checkpoint; it stops being one before its first file goes."""
    aside = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    path.rename(aside)
    shutil.rmtree(aside)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        digest = manifest.pop("sha256")
        sound = digest == _digest_of(manifest) and {"format", "files"} <= manifest.keys()
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{folder / MANIFEST} is damaged")
    return manifest


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor contiguous memory of its own on the host: safetensors holds no tied or strided ones."""
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != host.numel() * host.element_size():
            host = host.clone()
        taken.add(host.untyped_storage().data_ptr())
        separate[name] = host
    return separate


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
