"""A run that is logged, made to be killed; as a script it trains into a folder, going on from what it finds there."""

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.training import (
    CheckpointCallback,
    CSVLogger,
    LRSchedulerCallback,
    MLflowLogger,
    TensorBoardLogger,
    Trainer,
    WandbLogger,
)

EPOCHS, STEPS = 3, 5  # an epoch's: windows of 2, 2, 2, 2 and 1 batches

MAKE = {
    "csv": lambda folder: CSVLogger(folder / "log"),
    "tensorboard": lambda folder: TensorBoardLogger(folder / "log", every_n_steps=1),
    "wandb": lambda folder: WandbLogger("test", mode="offline", path=folder / "log", every_n_steps=1),
    "mlflow": lambda folder: MLflowLogger("test", tracking_uri=f"sqlite:///{folder}/mlflow.db", every_n_steps=1),
}


class Victim(Trainer):
    """Takes its time."""

    def compute_loss(self, batch):
        time.sleep(float(os.environ.get("SECONDS", 0)))
        return super().compute_loss(batch)


def build(folder, loggers, *, callbacks=(), first=(), accumulation=2, **options):
    """Return the Trainer; every start begins from other weights and generators."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "little") if options.pop("unseeded", True) else 0)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(18, 3, 8, 8, generator=generator)
    masks = torch.randint(0, 3, (18, 8, 8), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < torch.linspace(0, 0.8, 18)[:, None, None]] = 255
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=1000)
    saving = {"every_n_steps": 1, "keep_last": 3, **options.pop("checkpoints", {})}
    return Victim(
        model, optimizer, nn.CrossEntropyLoss(ignore_index=255),
        DataLoader(TensorDataset(images, masks), 2, shuffle=True), DataLoader(TensorDataset(images[:4], masks[:4]), 2),
        callbacks=[*first, LRSchedulerCallback(schedule, step_on="batch"), *loggers,
                   CheckpointCallback(folder / "checkpoints", **saving), *callbacks],
        gradient_accumulation_steps=accumulation, gradient_clip_norm=0.5, device="cpu", progress=False, seed=3,
        **options,
    )  # fmt: skip


def main():
    """Train into a folder with the named loggers."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    random.seed(0), np.random.seed(0)
    trainer = build(folder, [MAKE[name](folder) for name in sys.argv[2:]], unseeded=False)
    print("started", flush=True)
    trainer.fit(EPOCHS, resume="auto")


if __name__ == "__main__":
    main()
