"""Checkpoints: a folder each, whole or absent, in which nothing that is read is executed."""

from ununennium.training.checkpoint.folder import Folder, newest
from ununennium.training.checkpoint.format import Contents, read
from ununennium.training.checkpoint.snapshot import Entry, Run, check_memories, gather, matched_weights, restore
from ununennium.training.checkpoint.writer import Done, Writer, write

__all__ = [
    "Contents",
    "Done",
    "Entry",
    "Folder",
    "Run",
    "Writer",
    "check_memories",
    "gather",
    "matched_weights",
    "newest",
    "read",
    "restore",
    "write",
]
