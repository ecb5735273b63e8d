"""What the files of a checkpoint have in common for all that read or write them: names, manifest, whole or absent."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ununennium import __version__

FORMAT, AVERAGING_FORMAT = 2, 3  # the second with averaged weights, which versions before it would pass over
MODEL, TENSORS, TREE, MANIFEST = "model.safetensors", "training.safetensors", "training.json", "manifest.json"
AVERAGED = "averaged.safetensors"
ASIDE = ".tmp-"  # what begins with it is being made or taken away, and of no use to anybody after a crash


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, of another kind, or of another run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not whole, or not there."""


def manifest_of(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest alone, and verify it against its own digest.

    Raises
    ------
    DamagedCheckpointError
        If there is none, or it is damaged.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        if any(folder.glob(f"step-*/{MANIFEST}")):
            why = f"it is a folder of checkpoints; name one of them, {folder / 'last'} (resume='auto' finds the newest)"
        else:
            why = f"a checkpoint is a folder with a {MANIFEST} ({error.strerror})"
        raise DamagedCheckpointError(f"there is no checkpoint at {folder}: {why}") from error
    try:
        manifest: dict[str, Any] = json.loads(raw)
        sound = raw == text_of(manifest)  # one way to write it down: not a space is free
        digest = manifest.pop("sha256")
        sound = sound and digest == digest_of(manifest) and {"format", "files"} <= manifest.keys()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise DamagedCheckpointError(f"{folder / MANIFEST} is damaged")
    return manifest


def readable_manifest_of(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest as `manifest_of` does, of the formats that this version reads.

    Raises
    ------
    DamagedCheckpointError
        If there is none, or it is damaged.
    CheckpointError
        If it was written by a newer version.
    """
    manifest = manifest_of(folder)
    newest = max(FORMAT, AVERAGING_FORMAT)
    if manifest["format"] > newest:
        raise CheckpointError(
            f"{folder} has format version {manifest['format']}, this ununennium ({__version__}) reads up to {newest}: "
            "upgrade ununennium to load it"
        )
    return manifest


def verified(file: Path, expected: Mapping[str, Any]) -> bytes:
    """Read one of a checkpoint's files.

    Parameters
    ----------
    file : Path
    expected : mapping
        What the manifest says of it: ``size``, in bytes, and ``sha256``.

    Raises
    ------
    DamagedCheckpointError
        If it can't be read, or is another.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{file} can't be read: {error}") from error
    if len(data) != expected["size"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise DamagedCheckpointError(f"{file} is damaged: size or SHA-256 differ from the manifest's")
    return data


def text_of(manifest: dict[str, Any]) -> bytes:
    """Return the one way in which a manifest is written down."""
    return json.dumps(manifest, indent=1).encode()


def digest_of(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says, but for its digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def whole_or_absent(destination: Path) -> Iterator[Path]:
    """Yield where to write a file, with the same ending; it takes its place, flushed to disk, if nothing is raised.

    What was there is replaced; the folder is made if need be.
    """
    os.makedirs(destination.parent, exist_ok=True)
    aside = destination.parent / f"{ASIDE}{secrets.token_hex(4)}-{destination.name}"
    try:
        yield aside
        flush(aside)
        os.replace(aside, destination)
    finally:
        aside.unlink(missing_ok=True)
    flush(destination.parent)


def flush(path: Path) -> None:
    """Have the disk hold what a folder lists."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
