"""The step of a `Trainer` on two processes against a hand-written loop over `DistributedDataParallel`.

U-Net ResNet-18, 2 chips of 64² in each of two processes: gloo, one thread each. A step lasts from the reading of a
window's first batch to that of the next window's, on average in an epoch, so that the Trainer's one vote a window is
counted in. What a ``fit`` does at its ends shows in the time of whole epochs, which are short here.
"""

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, default_collate

from _timing import Row, Timing, main, row
from ununennium.models import create_model
from ununennium.training import Trainer

WORLD, BATCH, BATCHES, CHIP = 2, 2, 16, 64
BANDS, CLASSES, WINDOW = 12, 10, 4
BUDGET, ROUNDS = 80, (3, 12)  # seconds for all rounds; their least and greatest number
PART, PEER, LIMIT = "distributed", "hand-written", 1.03

Epoch = Callable[[], object]
Times = dict[tuple[str, int], list[float]]


class Stamps:
    """A collate function that notes when it is called."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, samples: list[Any]) -> Any:
        self.times.append(time.perf_counter())
        return default_collate(samples)

    def take(self, window: int) -> float:
        """Return the mean seconds from one window's beginning to the next one's, and forget them."""
        starts, self.times = self.times[::window], []
        return (starts[-1] - starts[0]) / (len(starts) - 1)


def setup() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = create_model("unet_resnet18", in_channels=BANDS, num_classes=CLASSES)
    samples = WORLD * BATCH * BATCHES
    images = torch.randn(samples, BANDS, CHIP, CHIP)
    masks = torch.randint(0, CLASSES, (samples, CHIP, CHIP))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return model, optimizer, nn.CrossEntropyLoss(), TensorDataset(images, masks)


def by_hand(accumulation: int, stamps: Stamps) -> Epoch:
    model, optimizer, loss_fn, dataset = setup()
    wrapped = DistributedDataParallel(model)
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, BATCH, sampler=sampler, collate_fn=stamps)

    def epoch() -> None:
        wrapped.train()
        total, count = torch.zeros(()), 0
        optimizer.zero_grad()
        for number, (inputs, targets) in enumerate(loader, 1):
            closes = number % accumulation == 0
            with nullcontext() if closes else wrapped.no_sync():
                outputs = wrapped(inputs)
                loss = loss_fn(outputs, targets)
                (loss if accumulation == 1 else loss / accumulation).backward()
            if closes:
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() * len(inputs)
            count += len(inputs)
        sums = torch.stack([total, torch.tensor(float(count))])
        dist.all_reduce(sums)
        float(sums[0] / sums[1])

    return epoch


def by_trainer(accumulation: int, stamps: Stamps) -> Epoch:
    model, optimizer, loss_fn, dataset = setup()
    loader = DataLoader(dataset, BATCH, collate_fn=stamps)
    trainer = Trainer(
        model, optimizer, loss_fn, loader, gradient_accumulation_steps=accumulation, metrics=[], distributed=True,
        device="cpu", progress=False, seed=0,
    )  # fmt: skip
    return lambda: trainer.fit(1)


def rounds() -> Iterator[None]:
    """Yield for each round; on a busy machine there are fewer, in both processes alike."""
    start = time.perf_counter()
    for number in range(ROUNDS[1]):
        enough = torch.tensor(number >= ROUNDS[0] and time.perf_counter() - start > BUDGET)
        dist.broadcast(enough, 0)
        if enough:
            return
        yield


def process(rank: int, port: int, rows: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    contenders = {
        (name, window): (make(window, stamps := Stamps()), stamps)
        for window in (1, WINDOW)
        for name, make in ((PEER, by_hand), ("Trainer", by_trainer))
    }
    steps: Times = {key: [] for key in contenders}
    epochs: Times = {key: [] for key in contenders}
    for _ in rounds():
        for key, (epoch, stamps) in contenders.items():
            dist.barrier()
            start = time.perf_counter()
            epoch()
            dist.barrier()
            epochs[key].append(time.perf_counter() - start)
            steps[key].append(stamps.take(key[1]))
    if rank == 0:
        Path(rows).write_text(json.dumps(summed(steps, epochs)))
    dist.destroy_process_group()


def summed(steps: Times, epochs: Times) -> list[Row]:
    rows = []
    for window in (1, WINDOW):
        for what, times, limit in (("a step", steps, LIMIT), ("a whole epoch", epochs, None)):
            suffix = what if window == 1 else f"{what}, {window} batches a window"
            timings = {f"{n}, {suffix}": Timing.of(times[n, window]) for n in (PEER, "Trainer")}
            peer, own = timings
            rows += [row(PART, peer, timings), row(PART, own, timings, peer, limit)]
    return rows


def measure() -> list[Row]:
    with socket.socket() as probe, tempfile.NamedTemporaryFile() as file:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(process, (port, file.name), WORLD)
        return [Row(*values) for values in json.loads(Path(file.name).read_text())]


if __name__ == "__main__":
    main(PART, measure, threads=1)
