"""What a reproducible order costs: loading through `EpochLoader` against the loader itself, and entering an epoch late.

Run with ``make bench``. Rounds are interleaved, the minimum counts.
"""

import time

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

from ununennium.training.loading import EpochLoader

SAMPLES, BATCH, ROUNDS = 4096, 8, 7
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


def entering(sampler) -> str:
    dataset, times = Counting((LATE + 1) * 4), []
    late = EpochLoader(DataLoader(dataset, 4, sampler=sampler(dataset)), stream=0)
    for epoch in range(3):
        start = time.perf_counter()
        next(late.epoch(0, epoch, start=LATE))
        times.append(time.perf_counter() - start)
    beyond = dataset.loaded - 4 * len(times)
    return f"{min(times):.2f} s, {beyond} samples loaded beyond the batch itself"


def seconds(batches) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    for name, dataset in (("tensors", TensorDataset(torch.arange(SAMPLES))), ("a dataset of one's own", Plain())):
        loader = DataLoader(dataset, BATCH, shuffle=True)
        ordered = EpochLoader(loader, stream=0)
        rounds = [(seconds(loader), seconds(ordered.epoch(0, epoch))) for epoch in range(ROUNDS)]
        plain, keyed = (min(times) / (SAMPLES // BATCH) * 1e6 for times in zip(*rounds, strict=True))
        print(f"{name}: a batch of {BATCH} takes {plain:.0f} µs, {keyed:.0f} µs in a reproducible order")
    for name, sampler in (("shuffle", RandomSampler), ("weights", weighted)):
        print(f"entering an epoch at batch {LATE:,}, {name}: {entering(sampler)}")


if __name__ == "__main__":
    main()
