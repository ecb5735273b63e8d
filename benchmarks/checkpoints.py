"""What a checkpoint in the background costs: inside `Trainer.save`, in throughput while it is written, and in memory.

Run with ``make bench``. Peer is ``torch.save`` of the same state, which neither flushes to disk nor computes a digest.
Rounds are interleaved, the minimum counts, and the maximum shows the noise: another process on the same cores raises it
to a second. Files go to a temporary folder (``TMPDIR`` chooses the disk), which is deleted at the end.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ununennium.models import create_model
from ununennium.training import Trainer, checkpoint

BUDGET, ROUNDS, STEPS = 35, (3, 12), 24  # seconds for the rounds of one table; their least and greatest number
LIMIT = 0.25

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
    times: Times = {
        name: [] for name in ("torch.save", "Trainer.save", "first save", "prepare_save", "written", "read")
    }
    prepared = big.trainer()
    prepared.prepare_save()
    for _ in rounds():
        empty(big.folder)
        times["torch.save"].append(big.torch_save())
        empty(big.folder)
        saved = big.save(prepared).wait()
        times["Trainer.save"].append(saved.inside)
        times["written"].append(saved.committed)
        times["read"].append(seconds(lambda path=saved.path: checkpoint.read(path)))
        empty(big.folder)
        unprepared = big.trainer()
        times["first save"].append(big.save(unprepared).wait().inside)
        del unprepared  # and its memory
        times["prepare_save"].append(seconds(big.trainer().prepare_save))
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
    times: Times = {name: [] for name in ("alone", "Trainer.save", "torch.save", "written")}
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
        times["alone"].append(seconds(steps))
        times["Trainer.save"].append(seconds(save_and_step))
        assert saved is not None
        times["written"].append(saved.wait().committed)
        empty(big.folder)
        times["torch.save"].append(seconds(lambda: (big.torch_save(), steps())))
    return times


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def line(name: str, times: list[float]) -> str:
    return f"{name:38} {min(times) * 1e3:7.1f} ms at best, {max(times) * 1e3:7.1f} at worst"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ununennium-bench-") as folder:
        big = Big(Path(folder))
        tensors, threads = big.tensors(), torch.get_num_threads()
        size = sum(t.numel() * t.element_size() for t in tensors) / 1e6
        print(f"U-Net ResNet-50 and AdamW: {size:.0f} MB in {len(tensors)} tensors; {threads} threads")
        if Path("/proc/self/clear_refs").exists():
            peak, kept = memory(big)
            print(f"{'memory':38} {peak:7.0f} MB more at the peak of a first save, {kept:.0f} kept for the next")
        times = saving(big)
        ratio = min(times["Trainer.save"]) / min(times["torch.save"])
        print(line("torch.save", times["torch.save"]))
        print(f"{line('inside Trainer.save(wait=False)', times['Trainer.save'])}, {ratio:.3f} of torch.save", end="")
        print(f" (limit {LIMIT}{'' if ratio <= LIMIT else ': EXCEEDED'})")
        print(line("inside the first, memory not prepared", times["first save"]))
        print(line("prepare_save", times["prepare_save"]))
        print(line("from save to committed, idle", times["written"]))
        print(line("read and verified", times["read"]))
        times = throughput(big)
        alone = min(times["alone"])
        print(line(f"{STEPS} steps of a small network", times["alone"]))
        for name in ("Trainer.save", "torch.save"):
            print(f"{line(f'with one {name}', times[name])}, {(min(times[name]) - alone) * 1e3:.0f} ms lost")
        print(line("from save to committed, training", times["written"]))


if __name__ == "__main__":
    main()
