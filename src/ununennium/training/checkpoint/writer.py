"""Writing behind the run's back: a copy is taken in an instant, a thread brings it to disk."""

import errno
import json
import math
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ununennium.training.checkpoint.format import MODEL, TENSORS, TREE, Contents, commit
from ununennium.training.checkpoint.plain import pack
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

    def reserve(self, contents: Contents) -> None:
        """Have the buffer ready for contents of this size, its pages touched, so that no later save has to wait."""
        tensors: dict[str, Tensor] = {}
        pack(contents.training, tensors, "training")
        self._make_room(tensors, contents.model)

    def save(self, path: Path, contents: Contents, done: Done | None = None) -> None:
        """Copy the contents, after a write that is still under way, and start to write them.

        Parameters
        ----------
        path : Path
            The folder to make.
        contents : Contents
            What it is to hold.
        done : callable, optional
            Called in the writing thread: with None once the checkpoint is committed, with the error if it is not.

        Raises
        ------
        FileExistsError
            If there is something at ``path``.
        TypeError
            If the training state holds what the format does not, naming where.
        """
        self.wait()
        if path.exists():
            raise FileExistsError(f"{path} exists already; a checkpoint's name is never reused")
        copy = self._copy(contents)
        arguments = (path, copy, done or (lambda error: None))
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint writer")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the write that is under way, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def release(self) -> None:
        """Give the buffer's memory back."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _copy(self, contents: Contents) -> "_Copy":
        tensors: dict[str, Tensor] = {}
        tree = pack(contents.training, tensors, "training")
        strange: dict[str, Tensor] = {}
        info = pack(contents.info, strange, "info")
        if strange:
            raise TypeError(f"{next(iter(strange))} is no plain number, which the manifest holds")
        self._make_room(tensors, contents.model)
        places: dict[str, _Places] = {}
        end = 0
        for file, named in ((TENSORS, tensors), (MODEL, contents.model)):
            places[file], end = self._fill(named, _aligned(end))
        arrived = None
        if self._buffer.is_pinned():
            arrived = torch.cuda.Event()
            arrived.record()
        return _Copy(self._buffer, places, contents.parameters, tree, info, arrived)

    def _fill(self, tensors: dict[str, Tensor], end: int) -> tuple["_Places", int]:
        """Copy tensors to the buffer from a place on; return where each is, and the end."""
        places: _Places = {}
        pinned, host = self._buffer.is_pinned(), self._buffer.numpy()
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so each is aligned
            _check_type(name, tensor)
            start, end = end, end + tensor.numel() * tensor.element_size()
            places[name] = start, end, tensor.dtype, tensor.shape
            if tensor.device.type == "cpu" and tensor.dtype in _OF_NUMPY and tensor.is_contiguous():
                # By one thread: PyTorch's wait for each other wherever loader workers, say, have the cores.
                values = tensor.detach().numpy()
                np.copyto(host[start:end].view(values.dtype).reshape(values.shape), values)
            else:
                _at(self._buffer, places[name]).copy_(tensor.detach(), non_blocking=pinned)
        return places, end

    def _make_room(self, *files: dict[str, Tensor]) -> None:
        size = 0
        for tensors in files:
            size = _aligned(size) + sum(t.numel() * t.element_size() for t in tensors.values())
        if len(self._buffer) < size:
            self.release()  # first, so that never two are held
            pinned = any(t.is_cuda for tensors in files for t in tensors.values())
            self._buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)

    def _write(self, path: Path, copy: "_Copy", done: Done) -> None:
        failure = None
        try:
            if copy.arrived is not None:
                copy.arrived.synchronize()
            copy.check_finite()
            commit(path, copy.files(), copy.info)
        except Exception as error:
            failure = _with_remedy(error, path)
        try:
            done(failure)
        except Exception as error:
            failure = failure or _with_remedy(error, path.parent)
        self._error = failure


class _Copy(NamedTuple):
    """A copy of contents in host memory, from which the files are made."""

    buffer: Tensor
    places: dict[str, _Places]
    parameters: frozenset[str]
    tree: Any
    info: dict[str, Any]
    arrived: Any

    def check_finite(self) -> None:
        """Raise for a parameter that is not finite, and for NaN in the rest of the model or in the optimizer."""
        optimizer = {k: v for k, v in self.places[TENSORS].items() if k.startswith("training.optimizer.")}
        for name, place in {**self.places[MODEL], **optimizer}.items():
            extremes = _extremes(_at(self.buffer, place))
            if any(map(math.isnan, extremes)) or (name in self.parameters and any(map(math.isinf, extremes))):
                raise NonFiniteError(
                    f"{name.removeprefix('training.')} holds NaN or infinite values, so no checkpoint was written and "
                    "the earlier ones stay. Lower the learning rate, set gradient_clip_norm, or look for a loss that "
                    "has no finite gradient."
                )

    def files(self) -> dict[str, list[Any]]:
        """Return the parts of each file."""
        files: dict[str, list[Any]] = {TREE: [json.dumps(self.tree).encode()]}
        for file, places in self.places.items():
            begin = min((start for start, *_ in places.values()), default=0)
            end = max((end for _, end, *_ in places.values()), default=0)
            header = {
                name: {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start - begin, end - begin]}
                for name, (start, end, dtype, shape) in places.items()
            }
            files[file] = [_framed(header), self.buffer[begin:end].numpy()]
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


def _framed(header: dict[str, Any]) -> bytes:
    """Return the beginning of a safetensors file: the header's length in 8 bytes, and the header."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
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
