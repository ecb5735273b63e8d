"""Checkpoints: a folder each, whole or absent, in which nothing that is read is executed."""

from ununennium.training.checkpoint.folder import Folder, newest, newest_of
from ununennium.training.checkpoint.format import Contents, begin, chosen, export_weights, read, whole_or_absent
from ununennium.training.checkpoint.snapshot import (
    Entry,
    Run,
    check_memories,
    gather,
    load_weights,
    matched_weights,
    of_rank,
    restore,
)
from ununennium.training.checkpoint.writer import Done, Share, Writer, write

__all__ = [
    "Contents",
    "Done",
    "Entry",
    "Folder",
    "Run",
    "Share",
    "Writer",
    "begin",
    "check_memories",
    "chosen",
    "export_weights",
    "gather",
    "load_weights",
    "matched_weights",
    "newest",
    "newest_of",
    "of_rank",
    "read",
    "restore",
    "whole_or_absent",
    "write",
]
