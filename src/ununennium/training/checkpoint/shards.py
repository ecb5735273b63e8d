"""Tensors that are sharded over processes: each writes its pieces, and readers put them together."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ununennium.training.distributed import is_sharded, local
from ununennium.training.errors import DamagedCheckpointError

_KEY = "ununennium_pieces"


class Piece(NamedTuple):
    """A block of a tensor.

    Attributes
    ----------
    offsets : list of int
        Where its first element is in the whole.
    shape : list of int
        Of the whole.
    tensor : Tensor
        The block.
    """

    offsets: list[int]
    shape: list[int]
    tensor: Tensor


def piece_of(tensor: Tensor, rank: int) -> Piece | None:
    """Return the block that a process has to write; None if others do. What is not sharded is for process 0."""
    if not is_sharded(tensor):
        return Piece([0] * tensor.ndim, list(tensor.shape), tensor.detach()) if rank == 0 else None
    block = local(tensor.detach())
    if not block.numel():
        return None
    chunk: Any = tensor.__create_chunk_list__()[0]  # type: ignore[attr-defined]
    return Piece(list(chunk.offsets), list(tensor.shape), block)


def metadata(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """Return what a safetensors file of pieces says of them, for `assemble` and for PyTorch's own reader."""
    ours = {name: {"offsets": piece.offsets, "shape": piece.shape} for name, piece in pieces.items()}
    theirs = {name: {"saved_offsets": piece.offsets} for name, piece in pieces.items()}
    return {_KEY: json.dumps(ours), "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(theirs)}


def assemble(files: Iterable[bytes]) -> dict[str, Tensor]:
    """Put the tensors of safetensors files together, whole or in pieces.

    Raises
    ------
    DamagedCheckpointError
        If a part of a tensor is missing.
    """
    from safetensors.torch import load  # imported where it is used: `import ununennium.training` stays quick

    tensors: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for file in files:
        (length,) = struct.unpack("<Q", file[:8])
        pieces = json.loads(json.loads(file[8 : 8 + length]).get("__metadata__", {}).get(_KEY, "{}"))
        for name, block in load(file).items():
            if name not in pieces or pieces[name]["shape"] == list(block.shape):
                tensors[name] = block
                continue
            offsets, shape = pieces[name]["offsets"], pieces[name]["shape"]
            if name not in tensors:
                tensors[name], missing[name] = torch.empty(shape, dtype=block.dtype), math.prod(shape)
            place = tuple(slice(start, start + size) for start, size in zip(offsets, block.shape, strict=True))
            tensors[name][place] = block
            missing[name] -= block.numel()
    for name, count in missing.items():
        if count:
            raise DamagedCheckpointError(
                f"{count} elements of {name} are missing: put the files of all processes into one folder"
            )
    return tensors


def sharded_as(example: Tensor, whole: Tensor) -> Tensor:
    """Cut a whole tensor as another of its shape is sharded; no process asks another."""
    if not is_sharded(example) or is_sharded(whole):
        return whole
    kind: Any = type(example)
    dtensor: Any = example.detach()
    block = local(dtensor)
    chunk: Any = dtensor.__create_chunk_list__()[0]
    if block.numel():
        start = chunk.offsets
        place = tuple(slice(at, at + size) for at, size in zip(start, block.shape, strict=True))
        block = torch.empty_like(block, dtype=whole.dtype).copy_(whole[place])
    else:
        block = torch.empty_like(block, dtype=whole.dtype)
    cut: Tensor = _plain(kind).from_local(
        block, dtensor.device_mesh, dtensor.placements, run_check=False, shape=whole.shape, stride=dtensor.stride()
    )
    return cut


def _plain(kind: Any) -> Any:
    """Return the class of sharded tensors that a sharded parameter's data are of."""
    return next(base for base in kind.__mro__ if base.__name__ == "DTensor")
