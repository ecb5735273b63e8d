"""Writing behind the run's back: a copy is taken in an instant, a thread brings it to disk."""

import errno
import json
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ununennium.training.checkpoint.format import (
    AVERAGED,
    MODEL,
    TENSORS,
    TREE,
    Contents,
    begin,
    commit,
    give_up,
    shard_name,
    write_files,
)
from ununennium.training.checkpoint.plain import pack
from ununennium.training.checkpoint.shards import Piece, metadata, piece_of
from ununennium.training.errors import CheckpointError, NonFiniteError

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_OF_NUMPY = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64,
}  # fmt: skip
_ALIGNED = 16  # bytes: no element is larger
_LONGEST = 600.0  # seconds that a process may take before it begins to write its part


class Share(NamedTuple):
    """One process's part in writing a checkpoint, and the folder where the parts meet."""

    rank: int
    size: int
    aside: Path

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold a lock that goes with this process, by which process 0 sees whether it lives."""
        sign = self._sign_of(self.rank)
        begun = sign.with_suffix(".begun")
        try:
            descriptor = os.open(begun, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # which the files will meet, too, and tell
            yield
            return
        try:
            if _lock(descriptor):
                os.rename(begun, sign)  # with the lock on it
            yield
        finally:
            os.close(descriptor)

    def is_lost(self, rank: int, waited: float) -> bool:
        """Tell whether another process has ended while it wrote its part, or did not begin for so many seconds."""
        try:
            descriptor = os.open(self._sign_of(rank), os.O_RDWR)
        except OSError:
            return waited > _LONGEST and not self._sign_of(rank).with_suffix(".begun").exists()
        try:
            return _lock(descriptor)
        finally:
            os.close(descriptor)

    def _sign_of(self, rank: int) -> Path:
        return self.aside / f".{rank}.works"

    def tell(self, message: dict[str, Any]) -> None:
        """Tell process 0 what was written; nobody reads half of it."""
        with suppress(OSError):  # the folder is gone: process 0 has given up
            part = self.aside / f".{self.rank}.part"
            part.write_text(json.dumps(message), encoding="utf-8")
            os.replace(part, self.aside / f".{self.rank}.told")

    def told_by(self, rank: int) -> dict[str, Any] | None:
        """Return what another process has told, and take its message away; None if it has not yet."""
        path = self.aside / f".{rank}.told"
        try:
            message: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        path.unlink()
        for sign in (self._sign_of(rank), self._sign_of(rank).with_suffix(".begun")):
            sign.unlink(missing_ok=True)
        return message


def _lock(descriptor: int) -> bool:
    """Lock an open file, unless somebody has it, or files can't be locked here."""
    try:
        import fcntl  # not everywhere

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ImportError):
        return False
    return True


_Place = tuple[int, int, torch.dtype, torch.Size]  # in the buffer: first byte, end, type, shape
_Places = dict[str, _Place]

Done = Callable[[BaseException | None], None]


class Writer:
    """Writes checkpoints one at a time, each from a copy in one buffer that serves again and again.

    What was saved may change as soon as `save` has returned. An error of the writing thread is raised by the next
    `check`, `save` or `wait`.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._patience = math.inf

    def reserve(self, contents: Contents, rank: int = 0) -> None:
        """Have the buffer ready for contents of this size, its pages touched, so that no later save has to wait."""
        tensors: dict[str, Tensor] = {}
        pack(contents.training, tensors, "training")
        self._make_room(*_pieces_of(contents, tensors, rank).values())

    def save(self, path: Path, contents: Contents, done: Done | None = None, share: Share | None = None) -> None:
        """Copy the contents, after a write that is still under way, and start to write them.

        Parameters
        ----------
        path : Path
            The folder to make.
        contents : Contents
            What it is to hold.
        done : callable, optional
            Called in the writing thread: with None once the checkpoint is committed, with the error if it is not.
        share : Share, optional
            Where several processes write, each its own part: which this is, and where they meet.

        Raises
        ------
        FileExistsError
            If there is something at ``path``.
        TypeError
            If the training state holds what the format does not, naming where.
        """
        self.wait()
        share = share or Share(0, 1, begin(path))
        try:
            copy = self._copy(contents, share)
        except BaseException:
            give_up(share.aside)
            raise
        self._patience = math.inf
        arguments = (path, copy, share, done or (lambda error: None))
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint writer")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, patience: float = math.inf) -> None:
        """Wait for the write that is under way, and raise its error.

        ``patience`` is for how many seconds it may wait for the other processes' parts.
        """
        self._patience = time.monotonic() + patience
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def release(self) -> None:
        """Give the buffer's memory back."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _copy(self, contents: Contents, share: Share) -> "_Copy":
        tensors: dict[str, Tensor] = {}
        tree = pack(contents.training, tensors, "training")
        strange: dict[str, Tensor] = {}
        info = pack(contents.info, strange, "info")
        if strange:
            raise TypeError(
                f"{next(iter(strange))} is a tensor, and the manifest holds plain numbers: give it as a float"
            )
        pieces = _pieces_of(contents, tensors, share.rank)
        self._make_room(*pieces.values())
        places: dict[str, _Places] = {}
        end = 0
        for file, of_file in pieces.items():
            places[file], end = self._fill(of_file, _aligned(end))
        arrived = None
        if self._buffer.is_pinned():
            arrived = torch.cuda.Event()
            arrived.record()
        about = {file: metadata(of_file) if share.size > 1 else {} for file, of_file in pieces.items()}
        return _Copy(self._buffer, places, about, contents.parameters, tree, info, arrived)

    def _fill(self, pieces: dict[str, Piece], end: int) -> tuple["_Places", int]:
        """Copy tensors to the buffer from a place on; return where each is, and the end."""
        places: _Places = {}
        pinned, host = self._buffer.is_pinned(), self._buffer.numpy()
        tensors = {name: piece.tensor for name, piece in pieces.items()}
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so each is aligned
            start, end = end, end + tensor.numel() * tensor.element_size()
            places[name] = start, end, tensor.dtype, tensor.shape
            if tensor.device.type == "cpu" and tensor.dtype in _OF_NUMPY and tensor.is_contiguous():
                # By one thread: PyTorch's wait for each other wherever loader workers, say, have the cores.
                values = tensor.numpy()
                np.copyto(host[start:end].view(values.dtype).reshape(values.shape), values)
            else:
                _at(self._buffer, places[name]).copy_(tensor, non_blocking=pinned)
        return places, end

    def _make_room(self, *files: dict[str, Piece]) -> None:
        size = 0
        for pieces in files:
            size = _aligned(size) + sum(p.tensor.numel() * p.tensor.element_size() for p in pieces.values())
        if len(self._buffer) < size:
            self.release()  # first, so that never two are held
            pinned = any(p.tensor.is_cuda for pieces in files for p in pieces.values())
            self._buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)

    def _write(self, path: Path, copy: "_Copy", share: Share, done: Done) -> None:
        failure = None
        with share.at_work() if share.rank else nullcontext():
            try:
                if copy.arrived is not None:
                    copy.arrived.synchronize()
                copy.check_finite()
                described = write_files(share.aside, copy.files(share))
                if share.rank == 0:
                    for other in range(1, share.size):
                        described |= self._part_of(share, other)
                    commit(share.aside, path, described, copy.info)
                else:
                    share.tell({"files": described})
            except Exception as error:
                failure = _with_remedy(error, path)
                if share.rank == 0:
                    give_up(share.aside)
                else:
                    share.tell({"error": str(failure)})
        try:
            done(failure)
        except Exception as error:
            failure = failure or _with_remedy(error, path.parent)
        self._error = failure

    def _part_of(self, share: Share, rank: int) -> dict[str, Any]:
        """Wait until another process has written its part, and return what it says of it."""
        begin = time.monotonic()
        while True:
            now = time.monotonic()
            lost = now > self._patience or share.is_lost(rank, now - begin)
            told = share.told_by(rank)  # asked last, since it may have told in between, and gone
            if told is not None:
                break
            if lost:
                raise CheckpointError(
                    f"process {rank} did not write its part, as another process of this run has ended: see in its "
                    "output why, and start the run again"
                )
            time.sleep(0.005)
        if "error" in told:
            raise CheckpointError(f"process {rank} could not write its part: {told['error']}")
        files: dict[str, Any] = told["files"]
        return files


class _Copy(NamedTuple):
    """A copy of contents in host memory, from which the files are made."""

    buffer: Tensor
    places: dict[str, _Places]
    about: dict[str, dict[str, str]]
    parameters: frozenset[str]
    tree: Any
    info: dict[str, Any]
    arrived: Any

    def check_finite(self) -> None:
        """Raise for a parameter that is not finite, and for NaN in the rest of the model or in the optimizer."""
        optimizer = {k: v for k, v in self.places[TENSORS].items() if k.startswith("training.optimizer.")}
        averaged = self.places.get(AVERAGED, {})
        for name, place in (*self.places[MODEL].items(), *optimizer.items(), *averaged.items()):
            extremes = _extremes(_at(self.buffer, place))
            if any(map(math.isnan, extremes)) or (name in self.parameters and any(map(math.isinf, extremes))):
                raise NonFiniteError(
                    f"{name.removeprefix('training.')} holds NaN or infinite values, so no checkpoint was written and "
                    "the earlier ones stay. Lower the learning rate, set gradient_clip_norm, or look for a loss that "
                    "has no finite gradient."
                )

    def files(self, share: Share) -> dict[str, list[Any]]:
        """Return the parts of each file that this process writes."""
        files: dict[str, list[Any]] = {TREE: [json.dumps(self.tree).encode()]} if share.rank == 0 else {}
        for file, places in self.places.items():
            begin = min((start for start, *_ in places.values()), default=0)
            end = max((end for _, end, *_ in places.values()), default=0)
            header = {
                name: {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start - begin, end - begin]}
                for name, (start, end, dtype, shape) in places.items()
            }
            name = file if share.size == 1 else shard_name(file, share.rank)
            files[name] = [_framed(header, self.about[file]), self.buffer[begin:end].numpy()]
        return files


def write(path: Path, contents: Contents) -> None:
    """Write a checkpoint and wait for it; see `Writer.save`."""
    writer = Writer()
    writer.save(path, contents)
    writer.wait()


def _at(buffer: Tensor, place: _Place) -> Tensor:
    start, end, dtype, shape = place
    return buffer[start:end].view(dtype).view(shape)


def _extremes(tensor: Tensor) -> list[float]:
    """Return the least and the greatest value, NaN if one is; on one thread and without copies."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return []
    if tensor.dtype in _OF_NUMPY:
        values = tensor.numpy()
        with np.errstate(invalid="ignore"):
            return [float(values.min()), float(values.max())]
    return [float(value) for value in tensor.float().aminmax()]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _check_type(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors files do not hold: keep it dense "
            "and in another type"
        )


def _pieces_of(contents: Contents, tensors: dict[str, Tensor], rank: int) -> dict[str, dict[str, Piece]]:
    """Return what a process writes of contents, by file."""
    files = {TENSORS: tensors, MODEL: contents.model, **({AVERAGED: contents.averaged} if contents.averaged else {})}
    return {file: _pieces(of_file, rank) for file, of_file in files.items()}


def _pieces(tensors: dict[str, Tensor], rank: int) -> dict[str, Piece]:
    """Return what a process writes of tensors."""
    for name, tensor in tensors.items():
        _check_type(name, tensor)
    pieces = {name: piece_of(tensor, rank) for name, tensor in tensors.items()}
    return {name: piece for name, piece in pieces.items() if piece is not None}


def _framed(header: dict[str, Any], about: dict[str, str]) -> bytes:
    """Return the beginning of a safetensors file: the header's length in 8 bytes, and the header."""
    whole = {"__metadata__": {"format": "pt", **about}, **header}
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _with_remedy(error: Exception, path: Path) -> Exception:
    if not isinstance(error, OSError) or error.errno is None:  # which only the system's own have
        return error
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Make room on that disk" if full else "See that this folder can be written to"
    wrapped = CheckpointError(
        f"{path} could not be written ({error.strerror or error}); the checkpoints before it stay as they are. "
        f"{remedy}, and go on from the last one with fit(…, resume=…)."
    )
    wrapped.__cause__ = error
    return wrapped
