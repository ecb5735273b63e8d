"""A folder of checkpoints: who may write to it, which is the newest, which are kept."""

import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ununennium.training.checkpoint.format import ASIDE, Contents, flush, manifest_of, read
from ununennium.training.errors import CheckpointError, DamagedCheckpointError

POINTERS = ("best", "last")

_NAME = re.compile(r"step-(\d+)-(\w+)")
_LEFT = re.compile(rf"{re.escape(ASIDE)}(step-\d+-\w+|best|last)-[0-9a-f]{{8}}")
_LOCK = ".lock"


class Folder:
    """A folder of checkpoints while this process, and no other, writes to it.

    Checkpoints are called ``step-<optimizer steps>-<number>``; numbers rise with every checkpoint that is made in the
    folder and are not used again.

    Parameters
    ----------
    path : Path
        The folder; made when it is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self._lock: int | None = None
        self._number = 0
        self._manifests: dict[str, dict[str, Any]] = {}

    def open(self) -> None:
        """Make the folder, keep other processes from writing to it, and take away what a crash left unfinished.

        Raises
        ------
        CheckpointError
            If another process writes to it.
        OSError
            If it can't be written to.
        FileExistsError
            If there is a file or folder where ``best`` or ``last`` should be.
        """
        for pointer in POINTERS:
            if (self.path / pointer).exists() and not (self.path / pointer).is_symlink():
                raise FileExistsError(
                    f"{self.path / pointer} is no link that leads to a checkpoint, so it can't be moved: "
                    "choose another folder"
                )
        self.close()
        self.path = self.path.absolute()  # wherever the process goes meanwhile
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / _LOCK)
            for left in self.path.glob(f"{ASIDE}*"):
                if _LEFT.fullmatch(left.name):
                    _delete(left)
        except OSError as error:
            raise OSError(
                error.errno,
                f"checkpoints can't be written to this folder ({error.strerror}); choose another",
                str(self.path),
            ) from error
        self._manifests = {}
        for name in _names(self.path):
            with suppress(CheckpointError):  # it is none of ours, and left alone
                self._manifests[name] = manifest_of(self.path / name)
        self._number = max([self._number, *(_order(name)[0] for name in _names(self.path))])

    def close(self) -> None:
        """Let other processes write to it."""
        if self._lock is not None:
            with suppress(OSError):  # the folder may be gone
                (self.path / _LOCK).unlink()
            os.close(self._lock)
            self._lock = None

    def new_name(self, optimizer_steps: int) -> str:
        """Return a name for a checkpoint that was never used before."""
        self._number += 1
        return f"step-{optimizer_steps:08d}-{self._number:04d}"

    def catch_up(self, pointers: Mapping[str, str], run: str) -> None:
        """Move pointers of a run on to where a crash between a commit and its pointers kept them from going."""
        for pointer, name in pointers.items():
            link = self.path / pointer
            behind = not link.is_symlink() or _order(os.readlink(link)) < _order(name)
            if behind and self._manifests.get(name, {}).get("run") == run:
                self._point(pointer, name)

    def settle(self, name: str, pointers: Iterable[str], keep: Collection[str], num_last: int, epochs: bool) -> None:
        """Let pointers lead to a checkpoint that was committed, and delete those of its run that nobody needs.

        Kept are what a pointer leads to, and of the same run what is named, the newest, and on demand all from the end
        of an epoch. Checkpoints of other runs are left alone.

        Parameters
        ----------
        name : str
            The new checkpoint.
        pointers : iterable of str
            Those that move: ``best``, ``last``.
        keep : collection of str
            Checkpoints to keep.
        num_last : int
            How many of the newest to keep.
        epochs : bool
            Whether to keep all from the end of an epoch.
        """
        for pointer in pointers:
            self._point(pointer, name)
        self._manifests[name] = new = manifest_of(self.path / name)
        run = sorted((n for n, m in self._manifests.items() if m.get("run") == new.get("run")), key=_order)
        led_to = {os.readlink(self.path / p) for p in POINTERS if (self.path / p).is_symlink()}
        for old in run[:-num_last]:
            at_end = self._manifests[old]["position"]["batch"] == 0
            if old not in led_to and old not in keep and not (epochs and at_end):
                del self._manifests[old]
                if (self.path / old).is_dir():
                    self._remove(old)

    def _point(self, pointer: str, name: str) -> None:
        """Let a pointer lead to a checkpoint, in one step: there is never no pointer."""
        link = self.path / f"{ASIDE}{pointer}-{secrets.token_hex(4)}"
        os.symlink(name, link, target_is_directory=True)
        os.replace(link, self.path / pointer)
        flush(self.path)

    def _remove(self, name: str) -> None:
        """Delete a checkpoint; it stops being one before its first file goes."""
        aside = self.path / f"{ASIDE}{name}-{secrets.token_hex(4)}"
        os.rename(self.path / name, aside)
        shutil.rmtree(aside)


def newest(path: Path) -> tuple[Path, Contents] | None:
    """Return the newest valid checkpoint of a folder; None if it holds none.

    A damaged one is named in a warning, and the one before it is tried.

    Raises
    ------
    CheckpointError
        If there are some and not one is valid, or one was written by a newer version.
    """
    names = sorted(_names(path), key=_order, reverse=True)
    for name in names:
        try:
            return path / name, read(path / name)
        except DamagedCheckpointError as error:
            warnings.warn(f"{error}; it is passed over for the one before it", stacklevel=3)
    if names:
        raise CheckpointError(
            f"not one of the {len(names)} checkpoints in {path} is valid, and a new run in their place would hide "
            "that: move them away, or use another folder, to start anew"
        )
    return None


def newest_of(folders: Iterable[Path]) -> Path | None:
    """Return the newest valid checkpoint of several folders, the one after most steps; None if there is none."""
    found = [checkpoint for checkpoint in map(newest, folders) if checkpoint is not None]
    return max(found, key=lambda each: each[1].info["position"]["optimizer_steps"])[0] if found else None


def _names(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return [p.name for p in path.iterdir() if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]


def _order(name: str) -> tuple[int, int]:
    """Sort by number, then by step. Names that were given no number (by earlier versions) come first."""
    match = _NAME.fullmatch(name)
    if match is None:
        return 0, 0
    number = match[2]
    return int(number) if number.isdecimal() and len(number) != 8 else 0, int(match[1])


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _locked(path: Path) -> int:
    """Lock a file for this process; the lock goes with the process, and children do not hold it.

    It would go, too, if the process itself opened the file again and closed it: nobody else has business with it.
    """
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise CheckpointError(
                f"{path.parent} is being written to by another run ({owner or 'unknown'}): wait until it has ended or "
                "end it, or give this run a folder of its own"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{path.parent} can't be locked ({error.strerror}): see that no other run writes to it", stacklevel=4
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # its last owner has just taken it away
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor
