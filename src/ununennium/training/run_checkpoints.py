"""The checkpoints of a run: saved, found again, and gone on from."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ununennium.training import checkpoint
from ununennium.training.batches import to_device
from ununennium.training.callbacks.averaging import WeightAverage
from ununennium.training.callbacks.base import Callback, CallbackList
from ununennium.training.callbacks.checkpoint import CheckpointCallback
from ununennium.training.distributed import Group
from ununennium.training.errors import CheckpointError
from ununennium.training.random_state import RandomState
from ununennium.training.run_figures import RunFigures


class RunCheckpoints:
    """Saves a run and takes it over again: in one process, in several, and sharded.

    Parameters
    ----------
    group : Group
        The processes that train together. All of them have to call what saves and loads; process 0 writes, or each its
        own shards.

    Attributes
    ----------
    entry : checkpoint.Entry or None
        Where the next ``fit`` goes on; None if nothing was loaded.
    writer : checkpoint.Writer
        Of the checkpoint that is written while the run goes on.
    """

    def __init__(self, group: Group) -> None:
        self.entry: checkpoint.Entry | None = None
        self.writer: checkpoint.Writer = checkpoint.Writer()
        self._group = group

    def save(self, path: str | Path, run: checkpoint.Run, wait: bool, done: checkpoint.Done | None) -> Path:
        """Write a checkpoint, as `Trainer.save` has it."""
        path = Path(path).expanduser()
        contents = self._contents(run)
        share = None
        if self._group.sharded is not None and self._group.size > 1:
            aside = self._group.of_leader(lambda: checkpoint.begin(path))
            share = checkpoint.Share(self._group.rank, self._group.size, aside)
        if share is None and not self._group.leads:
            return path
        writer = checkpoint.Writer() if wait else self.writer
        writer.save(path, contents, done if self._group.leads else None, share)
        if wait:
            writer.wait()
        return path

    def reserve(self, run: checkpoint.Run) -> None:
        """Have the memory ready that saves without waiting need."""
        contents = self._contents(run)
        if self._group.leads or self._group.sharded is not None:
            self.writer.reserve(contents, self._group.rank)

    def newest(self, callbacks: CallbackList) -> Path | None:
        """Return the newest valid checkpoint in the callbacks' folders, the same in all processes; None without any."""
        folders = [c.path for c in callbacks.callbacks if isinstance(c, CheckpointCallback)]
        if not folders:
            raise ValueError('resume="auto" looks in the folder of a CheckpointCallback, and there is none: pass one')
        path: Path | None = self._group.of_leader(lambda: checkpoint.newest_of(folders))
        return path

    def load(self, path: str | Path, run: Callable[[], checkpoint.Run], figures: RunFigures) -> RunFigures:
        """Put a run back as a checkpoint has it; return the figures that go on from there.

        Raises
        ------
        CheckpointError
            As `Trainer.load` has it.
        """
        contents = checkpoint.read(path)
        random, states = checkpoint.of_rank(contents, self._group.rank, self._group.size)
        try:
            continued = figures.after(states)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint was left inside an epoch, and its metrics can't go on here: {error}. Mend that, or go "
                "on from a checkpoint at an epoch's end"
            ) from error
        entry = checkpoint.restore(contents, run())
        self.entry = entry._replace(random=None if random is None else RandomState(*random))
        return continued

    def _contents(self, run: checkpoint.Run) -> checkpoint.Contents:
        return checkpoint.gather(run, self._gather, self.entry)

    def _gather(self, value: Any) -> list[Any]:
        return self._group.gather(to_device(value, torch.device("cpu")) if self._group.size > 1 else value)


def load_weights(
    path: str | Path, model: torch.nn.Module, callbacks: Iterable[Callback], averaged: bool | None
) -> None:
    """Take over weights, as `Trainer.load_weights` has it."""
    contents = checkpoint.chosen(checkpoint.read(path), averaged)
    checkpoint.load_weights(model, checkpoint.matched_weights(contents, model))
    for callback in callbacks:
        if isinstance(callback, WeightAverage):
            callback.reset()


def check_memories(callbacks: CallbackList, figures: RunFigures, config: Mapping[str, Any] | None) -> None:
    """Raise for a memory that no checkpoint could hold."""
    memories = {f"{type(c).__name__}.state_dict()": c.state_dict() for c in callbacks.with_memory}
    if callbacks.savers:
        memories["the state of the metrics"] = figures.state_dict()
        memories["config"] = dict(config or {})
    checkpoint.check_memories(memories)
