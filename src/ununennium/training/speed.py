"""How fast a pass goes, and how much of it is waiting for data."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from ununennium.training.batches import num_samples
from ununennium.training.loading import LoadedBatch


class Speed(NamedTuple):
    """How fast the training pass of an epoch went.

    Attributes
    ----------
    chips : int
        Samples trained on, in all processes.
    seconds : float
        How long that took, without validation.
    waiting : float
        Seconds of it that this process, or on an accelerator its device, had nothing to do but wait for the loader.
    """

    chips: int
    seconds: float
    waiting: float

    @classmethod
    def together(cls, speeds: Sequence["Speed"]) -> "Speed":
        """Return the speed of processes that train together: chips of all, the time of the slowest, the mean wait."""
        chips, seconds, waiting = zip(*speeds, strict=True)
        return cls(sum(chips), max(seconds), sum(waiting) / len(speeds))

    @property
    def chips_per_second(self) -> float:
        """Samples a second."""
        return self.chips / self.seconds if self.seconds else float("nan")

    @property
    def data_wait(self) -> float:
        """Share of the time that was spent waiting for data, 0 … 1."""
        return self.waiting / self.seconds if self.seconds else float("nan")


class Stopwatch:
    """Measures a pass from the inside, without waiting for the device.

    Parameters
    ----------
    device : torch.device
        Where the work is done. On CUDA a wait for the loader counts only if the device had finished all its work when
        the batch came: until then it was not kept waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        self.restart()

    def restart(self) -> None:
        """Begin a pass."""
        self._chips, self._waiting, self._started = 0, 0.0, time.perf_counter()

    def timed(self, batches: Iterable[LoadedBatch]) -> Iterator[LoadedBatch]:
        """Yield the batches, and note how long each was waited for."""
        clock, iterator = time.perf_counter, iter(batches)
        while True:
            if self._done is not None:
                self._done.record()
            asked = clock()
            batch = next(iterator, None)
            if self._done is None or self._done.query():
                self._waiting += clock() - asked
            if batch is None:
                return
            if batch.counts:
                self._chips += len(batch.indices) if type(batch.indices) is list else _size_of(batch.batch)
            yield batch

    def read(self) -> Speed:
        """Return the pass so far, of this process."""
        return Speed(self._chips, time.perf_counter() - self._started, self._waiting)


def _size_of(batch: object) -> int:
    try:
        return num_samples(batch)
    except TypeError:
        return 0  # a batch of a kind that only its user knows
