"""Checkpoints: a folder each, whole or absent, in which nothing that is read is executed."""

from ununennium.training.checkpoint.format import Contents, new_name, point, read, remove, write
from ununennium.training.checkpoint.snapshot import Run, check_memories, gather, matched_weights, restore

__all__ = [
    "Contents",
    "Run",
    "check_memories",
    "gather",
    "matched_weights",
    "new_name",
    "point",
    "read",
    "remove",
    "restore",
    "write",
]
