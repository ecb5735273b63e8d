"""Import time against torch's, and the loop's time against a hand-written one.

Run with ``make bench``. Rounds are interleaved, one thread count serves all, the minimum counts.
"""

import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.metrics import IoU
from ununennium.training import Callback, Trainer
from ununennium.training.run_figures import RunFigures

IMPORTS = {
    "torch": "import torch",
    "ununennium": "import ununennium.training, ununennium.losses, ununennium.metrics, ununennium.models",
}
SAMPLES, BATCH = 4096, 4


def import_seconds(rounds: int = 10) -> dict[str, float]:
    best = dict.fromkeys(IMPORTS, float("inf"))
    for _ in range(rounds):
        for name, line in IMPORTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], check=True)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def setup() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, DataLoader]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    dataset = TensorDataset(torch.randn(SAMPLES, 16), torch.randint(0, 4, (SAMPLES,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss(), DataLoader(dataset, BATCH)


def by_hand(metric: IoU | None = None) -> Callable[[], None]:
    model, optimizer, loss_fn, loader = setup()

    def epoch() -> None:
        model.train()
        total, count = torch.zeros(()), 0
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(inputs)
            count += len(inputs)
            if metric is not None:
                metric.update(outputs.detach(), targets)
        float(total / count)

    return epoch


def by_trainer(callbacks: list[Callback], metrics: list[IoU], progress: bool) -> Callable[[], None]:
    trainer = Trainer(*setup(), callbacks=callbacks, device="cpu", progress=progress, seed=0)
    # On training figures alone, which the constructor does not offer: it asks for a val_loader with metrics.
    trainer._figures = RunFigures(metrics, trainer.loss_fn, trainer.device, finite_only=False)
    return lambda: trainer.fit(1) and None


class BatchHook(Callback):
    def on_batch_end(self, trainer, batch_idx, logs):
        pass


def loop_seconds(rounds: int = 12) -> dict[str, float]:
    contenders = {
        "hand-written": by_hand(),
        "Trainer": by_trainer([], [], progress=False),
        "Trainer, a batch hook": by_trainer([BatchHook()], [], progress=False),
        "Trainer, progress": by_trainer([], [], progress=True),
        "hand-written, IoU": by_hand(IoU(4)),
        "Trainer, IoU": by_trainer([], [IoU(4)], progress=False),
    }
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, epoch in contenders.items():
            start = time.perf_counter()
            epoch()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    torch.set_num_threads(1)
    imports = import_seconds()
    print(
        f"import: torch {imports['torch']:.2f} s, ununennium {imports['ununennium']:.2f} s, "
        f"ratio {imports['ununennium'] / imports['torch']:.3f}"
    )
    best = loop_seconds()
    steps = SAMPLES // BATCH
    for name, seconds in best.items():
        peer = best["hand-written, IoU" if "IoU" in name else "hand-written"]
        print(f"{name:24} {seconds / steps * 1e6:7.1f} µs a step, {seconds / peer:.3f} of the hand-written loop")


if __name__ == "__main__":
    main()
