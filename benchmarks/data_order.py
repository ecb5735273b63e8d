"""What a reproducible order costs: loading through `EpochLoader` against the loader itself, and entering an epoch late.

Run with ``make bench``. Rounds are interleaved, the minimum counts.
"""

import time

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ununennium.training.loading import EpochLoader

SAMPLES, BATCH, ROUNDS = 4096, 8, 7


class Plain(Dataset):
    """A dataset of the user's own, which might draw random numbers."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor(index)


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
    late = EpochLoader(DataLoader(TensorDataset(torch.arange(400_004)), 4, shuffle=True), stream=0)
    start = time.perf_counter()
    next(late.epoch(0, 0, start=100_000))
    print(f"entering an epoch at batch 100,000: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
