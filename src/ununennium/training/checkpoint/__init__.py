"""Checkpoints: a folder each, whole or absent, in which nothing that is read is executed."""

from ununennium.training.checkpoint.folder import Folder, newest, newest_of
from ununennium.training.checkpoint.format import Contents, read
from ununennium.training.checkpoint.snapshot import (
    Entry,
    Run,
    check_memories,
    gather,
    matched_weights,
    of_rank,
    restore,
)
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
    "newest_of",
    "of_rank",
    "read",
    "restore",
    "write",
]
