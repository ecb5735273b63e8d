"""What a reproducible order costs: `EpochLoader` against the loader it is made of, and entering an epoch late."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

from _timing import Row, Timing, interleaved, main, row
from ununennium.training.loading import EpochLoader

PART, SAMPLES, BATCH, ROUNDS = "data_order", 4096, 8, 7
LATE = 100_000


class Plain(Dataset):
    """A dataset of the user's own, which might draw random numbers."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor(index)


class Counting(Dataset):
    """A dataset that counts what is loaded."""

    def __init__(self, samples):
        self.samples, self.loaded = samples, 0

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        self.loaded += 1
        return torch.tensor(index)


def weighted(dataset) -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.rand(len(dataset)), len(dataset))


def entering(name: str, sampler: Callable) -> list[Row]:
    dataset, times = Counting((LATE + 1) * 4), []
    late = EpochLoader(DataLoader(dataset, 4, sampler=sampler(dataset)), stream=0)
    for epoch in range(3):
        start = time.perf_counter()
        next(late.epoch(0, epoch, start=LATE))
        times.append(time.perf_counter() - start)
    beyond, title = dataset.loaded - 4 * len(times), f"entering an epoch at batch {LATE:,}, {name}"
    return [
        row(PART, title, {title: Timing.of(times)}),
        Row(PART, f"{title}: loaded beyond the batch itself", beyond, "samples", None, None, 0, None),
    ]


def drain(batches: Iterable) -> None:
    for _ in batches:
        pass


def epochs(loader: EpochLoader) -> Iterator[Iterable]:
    epoch = 0
    while True:
        yield loader.epoch(0, epoch)
        epoch += 1


def measure() -> list[Row]:
    rows = []
    for name, dataset in (("tensors", TensorDataset(torch.arange(SAMPLES))), ("a dataset of one's own", Plain())):
        loader = DataLoader(dataset, BATCH, shuffle=True)
        ordered = epochs(EpochLoader(loader, stream=0))
        plain, keyed = f"a batch of {BATCH}, {name}", f"the same in a reproducible order, {name}"
        # Bound now: the loop goes on.
        runs = {plain: lambda it=loader: drain(it), keyed: lambda it=ordered: drain(next(it))}
        timings = {n: t.each(SAMPLES // BATCH) for n, t in interleaved(runs, ROUNDS).items()}
        rows += [row(PART, plain, timings, unit="µs"), row(PART, keyed, timings, plain, unit="µs")]
    for name, sampler in (("shuffle", RandomSampler), ("weights", weighted)):
        rows += entering(name, sampler)
    return rows


if __name__ == "__main__":
    main(PART, measure, threads=1)
