"""Data order: which batches an epoch has, decided by (seed, epoch)."""

import copy
import hashlib
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ununennium.training.random_state import RandomState

_SELF_CONTAINED = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
_DRAWN_AT_ONCE = 64  # batches drawn ahead from a sampler that uses the global generators


class EpochLoader:
    """The batches of each epoch of a loader.

    For a `torch.utils.data.DataLoader` over a map-style dataset the order is a function of (seed, epoch): a twin of
    the user's loader, with the same dataset, workers and options, runs over the user's sampler or batch sampler,
    copied, told the epoch if it has ``set_epoch``, and drawn lazily with generators of its own. The user's loader,
    its sampler and the main process's generators are left as they were. Any other iterable is told the epoch where
    it can be, and yields what it yields.

    Parameters
    ----------
    loader : iterable of batches
        The user's loader.
    stream : int
        Tells loaders with the same seed apart.
    """

    def __init__(self, loader: Iterable[Any], stream: int) -> None:
        self.loader = loader
        self._stream = stream
        self._twin: DataLoader[Any] | None = None
        if isinstance(loader, DataLoader):
            self._twin = copy.copy(loader)
            changes: dict[str, Any] = {"generator": torch.Generator(), "_iterator": None}
            if not isinstance(loader.dataset, IterableDataset):
                name = "sampler" if loader.batch_sampler is None else "batch_sampler"
                self._order = changes[name] = Order(getattr(loader, name))
            self._twin.__dict__.update(changes)  # DataLoader.__setattr__ forbids assigning a sampler

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def epoch(self, seed: int, epoch: int) -> Iterator[Any]:
        """Return the batches of one epoch of the run with this seed.

        Raises
        ------
        ValueError
            While iterating, if there is not a single batch.
        """
        key = (seed, self._stream, epoch)
        if self._twin is None:
            set_epoch(self.loader, epoch)
            source: Iterable[Any] = self.loader
        else:
            source = self._twin
            self._twin.generator.manual_seed(_seed(key))
            if isinstance(self._twin.dataset, IterableDataset):
                set_epoch(self._twin.dataset, epoch)
            else:
                self._order.enter(key)
        position = 0
        try:
            for batch in source:
                yield batch
                position += 1
        except Exception as error:
            error.add_note(f"This happened while batch {position} of epoch {epoch} was read.")
            raise
        if position == 0:
            raise ValueError(
                f"the loader ({type(self.loader).__name__}) gave no batch in epoch {epoch}. An iterator that can be "
                "run through only once serves one epoch: pass a DataLoader, or an object whose __iter__ starts anew."
            )


class Order:
    """The sampler of a twin: one epoch's batches of indices, drawn lazily under (seed, stream, epoch)."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._sampler = sampler
        self._key: tuple[int, ...] = ()

    def enter(self, key: tuple[int, ...]) -> None:
        """Set the (seed, stream, epoch) that the next iteration is drawn under."""
        self._key = key

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        seeds = random.Random(_seed(self._key))
        sampler = _fresh(self._sampler, seeds, epoch=self._key[-1])
        if _self_contained(sampler):
            yield from sampler
            return
        mine = RandomState.seeded(seeds.getrandbits(32))
        with mine.swapped_in():
            iterator = iter(sampler)
        while True:
            with mine.swapped_in():
                drawn = [copy.copy(item) for item in islice(iterator, _DRAWN_AT_ONCE)]  # some yield one list again
            yield from drawn
            if len(drawn) < _DRAWN_AT_ONCE:
                return


def set_epoch(target: Any, epoch: int) -> None:
    """Tell an object the epoch, if it has the ``set_epoch`` that PyTorch's samplers have."""
    method = getattr(target, "set_epoch", None)
    if callable(method):
        method(epoch)


def _seed(key: tuple[int, ...]) -> int:
    """Hash a key to 32 bits, all that PyTorch's CPU generator uses of a seed."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def _fresh(sampler: Any, seeds: random.Random, epoch: int) -> Any:
    """Copy a sampler, and the samplers in it, with generators seeded anew and told the epoch."""
    twin = copy.copy(sampler)
    for name, value in list(getattr(twin, "__dict__", {}).items()):
        fresh: Any
        if isinstance(value, torch.Generator) or (value is None and name == "generator"):
            fresh = torch.Generator().manual_seed(seeds.getrandbits(32))
        elif isinstance(value, np.random.Generator):
            fresh = np.random.default_rng(seeds.getrandbits(64))
        elif isinstance(value, np.random.RandomState):
            fresh = np.random.RandomState(seeds.getrandbits(32))
        elif isinstance(value, random.Random):
            fresh = random.Random(seeds.getrandbits(64))
        elif isinstance(value, Sampler):
            fresh = _fresh(value, seeds, epoch)
        elif isinstance(value, (list, dict, set, np.ndarray)):
            fresh = copy.copy(value)  # some samplers shuffle their own list in place
        else:
            continue
        twin.__dict__[name] = fresh
    set_epoch(twin, epoch)
    return twin


def _self_contained(sampler: Any) -> bool:
    """Tell whether a sampler is known to draw from its own generator alone."""
    if type(sampler) is BatchSampler:
        return _self_contained(sampler.sampler)
    return type(sampler) in _SELF_CONTAINED or isinstance(sampler, (list, tuple, range))
