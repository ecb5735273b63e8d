"""Import time against torch's, and what a loop adds to a step of a tiny network, ours and peers' side by side.

One thread, Linear 16-32-4, SGD, batches of 4, 1,024 steps an epoch. Peers have logs, progress and checkpoints off.
"""

import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from _timing import Row, Timing, interleaved, main, row
from ununennium.metrics import IoU
from ununennium.training import Callback, Trainer

PART = "overhead"
IMPORTS = {
    "import torch": "import torch",
    "import ununennium": "import ununennium.training, ununennium.losses, ununennium.metrics, ununennium.models",
}
SAMPLES, BATCH, CLASSES = 4096, 4, 4
BY_HAND, BY_HAND_IOU = "hand-written", "hand-written, IoU"
LIMITS = {"import ununennium": 1.15, "Trainer": 1.05, "Trainer, a batch hook": 1.08}

Epoch = Callable[[], object]


def setup() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, DataLoader]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    return model, torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss(), DataLoader(data(), BATCH)


def data() -> TensorDataset:
    return TensorDataset(torch.randn(SAMPLES, 16), torch.randint(0, CLASSES, (SAMPLES,)))


def by_hand(metric: IoU | None = None) -> Epoch:
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


def by_trainer(*callbacks: Callback, metrics: tuple[IoU, ...] = (), progress: bool = False) -> Epoch:
    # Metrics are asked for together with something to validate: one batch.
    val_loader = [(torch.randn(BATCH, 16), torch.randint(0, CLASSES, (BATCH,)))] if metrics else None
    trainer = Trainer(
        *setup(), val_loader=val_loader, callbacks=callbacks, metrics=metrics, device="cpu", progress=progress, seed=0
    )
    return lambda: trainer.fit(1) and None


class BatchHook(Callback):
    def on_batch_end(self, trainer, batch_idx, logs):
        pass


def by_lightning() -> Epoch:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model, optimizer, loss_fn, loader = setup()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            inputs, targets = batch
            return loss_fn(self.model(inputs), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip

    def epoch() -> None:
        trainer.fit_loop.max_epochs += 1
        trainer.fit(module, loader)

    return epoch


def by_ignite() -> Epoch:
    from ignite.engine import create_supervised_trainer

    model, optimizer, loss_fn, loader = setup()
    # By default it reads every loss back; this spares it that.
    engine = create_supervised_trainer(model, optimizer, loss_fn, output_transform=lambda x, y, outputs, loss: None)
    return lambda: engine.run(loader, max_epochs=1)


def by_accelerate() -> Epoch:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    *others, loss_fn, loader = setup()
    model, optimizer, loader = accelerator.prepare(*others, loader)

    def epoch() -> None:
        model.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_fn(model(inputs), targets))
            optimizer.step()

    return epoch


def by_transformers(folder: str) -> Epoch:
    import transformers

    network, optimizer, loss_fn, _ = setup()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = self.network(inputs)
            return {"loss": loss_fn(outputs, labels), "logits": outputs}

    def collate(samples: list[Any]) -> dict[str, Tensor]:
        inputs, labels = default_collate(samples)
        return {"inputs": inputs, "labels": labels}

    transformers.logging.set_verbosity_error()
    arguments = transformers.TrainingArguments(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH, logging_strategy="no",
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, max_grad_norm=0,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        Model(), arguments, data_collator=collate, train_dataset=data(),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return lambda: trainer.train() and None


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        return compare(folder)


def compare(folder: str) -> list[Row]:
    warnings.simplefilter("ignore")
    imports = interleaved({n: partial(subprocess.run, [sys.executable, "-c", line]) for n, line in IMPORTS.items()}, 10)
    loops = {
        BY_HAND: by_hand(),
        "Trainer": by_trainer(),
        "Trainer, a batch hook": by_trainer(BatchHook()),
        "Trainer, progress": by_trainer(progress=True),
        BY_HAND_IOU: by_hand(IoU(CLASSES)),
        "Trainer, IoU": by_trainer(metrics=(IoU(CLASSES),)),
        "Ignite": by_ignite(),
        "Accelerate": by_accelerate(),
        "Lightning": by_lightning(),
        "transformers": by_transformers(folder),
    }
    steps = {name: timing.each(SAMPLES // BATCH) for name, timing in interleaved(loops, 12, warmup=2).items()}
    rows = [row(PART, n, imports, None if n == "import torch" else "import torch", LIMITS.get(n)) for n in IMPORTS]
    for name in loops:
        peer = BY_HAND_IOU if "IoU" in name else BY_HAND
        rows.append(row(PART, name, steps, None if name == peer else peer, LIMITS.get(name), "µs"))
    return rows + [beyond(name, steps) for name in loops if "hand-written" not in name]


def beyond(name: str, steps: dict[str, Timing]) -> Row:
    """Return what a loop adds to a step."""
    peer = BY_HAND_IOU if "IoU" in name else BY_HAND
    extra = steps[name].minimum - steps[peer].minimum
    return Row(PART, f"{name}: beyond the {peer} step", extra * 1e6, "µs", None, None, None, None)


if __name__ == "__main__":
    main(PART, measure, threads=1)
