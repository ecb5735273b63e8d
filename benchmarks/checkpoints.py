"""What a checkpoint in the background costs: inside `Trainer.save`, in throughput while it is written, and in memory.

U-Net ResNet-50 with AdamW. Peer is ``torch.save`` of the same state, which neither flushes to disk nor computes a
digest. Files go to a temporary folder (``TMPDIR`` chooses the disk), which is deleted at the end.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from _timing import Row, Timing, main, row, timed
from ununennium.models import create_model
from ununennium.training import Trainer, checkpoint

BUDGET, ROUNDS, STEPS = 35, (3, 12), 24  # seconds for the rounds of one table; their least and greatest number
PART, LIMIT = "checkpoints", 0.25
PEER, INSIDE, FIRST = "torch.save", "inside Trainer.save(wait=False)", "inside the first, memory not prepared"
PREPARE, WRITTEN, READ = "prepare_save", "from save to committed, idle", "read and verified"
ALONE = f"{STEPS} steps of a small network"
WITH_OURS, WITH_PEER = f"{ALONE} with one Trainer.save", f"{ALONE} with one torch.save"
COMMITTED = "from save to committed, training"

Times = dict[str, list[float]]


class Big:
    """U-Net ResNet-50 with AdamW after a step, and ways to save them."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = create_model("unet_resnet50", in_channels=12, num_classes=10)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.folder, self._number = folder, 0

    def trainer(self) -> Trainer:
        """Return a Trainer whose memory for saving is not prepared."""
        return Trainer(self.model, self.optimizer, nn.CrossEntropyLoss(), [()], device="cpu", progress=False, seed=0)

    def tensors(self) -> list[Tensor]:
        states = self.optimizer.state.values()
        return [*self.model.state_dict().values(), *(value for state in states for value in state.values())]

    def torch_save(self) -> float:
        start = time.perf_counter()
        torch.save((self.model.state_dict(), self.optimizer.state_dict()), self.folder / "whole.pt")
        return time.perf_counter() - start

    def save(self, trainer: Trainer) -> "Saving":
        self._number += 1
        return Saving(trainer, self.folder / f"checkpoint-{self._number}")


class Saving:
    """A save: the seconds inside the call, and those until it is committed."""

    def __init__(self, trainer: Trainer, path: Path) -> None:
        self.path = path
        self.error: BaseException | None = None
        self.committed = 0.0
        self._ended = threading.Event()
        start = self._start = time.perf_counter()
        trainer.save(path, wait=False, done=self._done)
        self.inside = time.perf_counter() - start

    def _done(self, error: BaseException | None) -> None:
        self.committed, self.error = time.perf_counter() - self._start, error
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> "Saving":
        self._ended.wait()
        if self.error is not None:
            raise self.error
        return self


def rounds() -> Iterator[None]:
    """Yield for each round; on a busy machine there are fewer."""
    start = time.perf_counter()
    for number in range(ROUNDS[1]):
        if number < ROUNDS[0] or time.perf_counter() - start < BUDGET:
            yield


def empty(folder: Path) -> None:
    """Delete what was written, so that it is neither in the way of what comes next nor on its way to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def resident(peak: bool = False) -> float:
    """Return the process's memory now or at its peak, in MB, as Linux tells it."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def memory(big: Big) -> tuple[float, float]:
    """Return by how many MB the first save lets the process grow at its peak, and what stays for the next."""
    trainer = big.trainer()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident()
    big.save(trainer).wait()
    return resident(peak=True) - before, resident() - before


def saving(big: Big) -> Times:
    times: Times = {name: [] for name in (PEER, INSIDE, FIRST, PREPARE, WRITTEN, READ)}
    prepared = big.trainer()
    prepared.prepare_save()
    for _ in rounds():
        empty(big.folder)
        times[PEER].append(big.torch_save())
        empty(big.folder)
        saved = big.save(prepared).wait()
        times[INSIDE].append(saved.inside)
        times[WRITTEN].append(saved.committed)
        times[READ].append(timed(lambda path=saved.path: checkpoint.read(path)))
        empty(big.folder)
        unprepared = big.trainer()
        times[FIRST].append(big.save(unprepared).wait().inside)
        del unprepared  # and its memory
        times[PREPARE].append(timed(big.trainer().prepare_save))
    return times


def loop() -> Callable[[], None]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(12, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 10, 1),
    )  # fmt: skip
    optimizer, loss_fn = torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(4, 12, 128, 128), torch.randint(0, 10, (4, 128, 128))

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()

    return steps


def throughput(big: Big) -> Times:
    """Time a training loop alone, and with a save of the big state that begins with it."""
    times: Times = {name: [] for name in (ALONE, WITH_OURS, WITH_PEER, COMMITTED)}
    steps, trainer = loop(), big.trainer()
    trainer.prepare_save()
    steps()

    def save_and_step() -> None:
        nonlocal saved
        saved = big.save(trainer)
        steps()
        if not saved.ended:
            print("the write outlasted the loop: seconds lost are too few")

    saved: Saving | None = None
    for _ in rounds():
        empty(big.folder)
        times[ALONE].append(timed(steps))
        times[WITH_OURS].append(timed(save_and_step))
        assert saved is not None
        times[COMMITTED].append(saved.wait().committed)
        empty(big.folder)
        times[WITH_PEER].append(timed(lambda: (big.torch_save(), steps())))
    return times


def measure() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="ununennium-bench-") as folder:
        big = Big(Path(folder))
        size = sum(t.numel() * t.element_size() for t in big.tensors()) / 1e6
        rows.append(Row(PART, "size of the state", size, "MB", None, None, None, None))
        if Path("/proc/self/clear_refs").exists():
            peak, kept = memory(big)
            rows.append(Row(PART, "more memory at the peak of a first save", peak, "MB", None, None, None, None))
            rows.append(Row(PART, "kept of it for the next", kept, "MB", None, None, None, None))
        timings = {name: Timing.of(times) for name, times in saving(big).items()}
        for name in timings:
            rows.append(row(PART, name, timings, *((PEER, LIMIT) if name == INSIDE else ())))
        timings = {name: Timing.of(times) for name, times in throughput(big).items()}
    return rows + [row(PART, name, timings, None if name in (ALONE, COMMITTED) else ALONE) for name in timings]


if __name__ == "__main__":
    main(PART, measure)
