"""Train on one process or many; the command line alone decides, and it serves the first start and every restart.

python examples/train_distributed.py
torchrun --nproc_per_node=2 examples/train_distributed.py
sbatch examples/slurm.sh
"""

import argparse
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ununennium.models import create_model
from ununennium.training import CheckpointCallback, LRSchedulerCallback, Trainer

BANDS, CLASSES, NODATA = 12, 10, 255


class Scenes(Dataset):
    """Chips of reflectances with patches of classes, each class with a spectrum, and nodata along one edge."""

    def __init__(self, chips: int, size: int, seed: int) -> None:
        self.chips, self.size, self.seed = chips, size, seed
        self.spectra = torch.rand(CLASSES, BANDS, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.chips

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        coarse = torch.randint(0, CLASSES, (self.size // 16, self.size // 16), generator=generator)
        mask = coarse.repeat_interleave(16, 0).repeat_interleave(16, 1)
        noise = 0.1 * torch.randn(BANDS, self.size, self.size, generator=generator)
        image = self.spectra[mask].permute(2, 0, 1) + noise
        edge = int(torch.randint(0, self.size // 2, (), generator=generator))
        image[:, :, :edge], mask[:, :edge] = 0, NODATA
        return {"image": image, "mask": mask}


def main() -> None:
    """Train, and print the last figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", default="runs/distributed", help="a folder that all hosts share")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--chips", type=int, default=96)
    parser.add_argument("--size", type=int, default=64, help="edge of a chip, a multiple of 32")
    parser.add_argument("--global-batch", type=int, default=8)
    args = parser.parse_args()

    # A loader's batch size is what one process takes: the same global batch gives the same run, whatever the number.
    batch = max(args.global_batch // int(os.environ.get("WORLD_SIZE", 1)), 1)
    train_loader = DataLoader(Scenes(args.chips, args.size, seed=1), batch, shuffle=True)
    val_loader = DataLoader(Scenes(args.chips // 4 + 1, args.size, seed=2), batch)

    torch.manual_seed(0)
    model = create_model("unet_resnet18", in_channels=BANDS, num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = args.epochs * -(-args.chips // (batch * int(os.environ.get("WORLD_SIZE", 1))))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)

    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(ignore_index=NODATA),
        train_loader=train_loader,
        val_loader=val_loader,
        callbacks=[
            LRSchedulerCallback(schedule, step_on="batch"),
            CheckpointCallback(args.checkpoints, monitor="val_iou", every_n_steps=10, keep_last=2),
        ],
        distributed="RANK" in os.environ,  # torchrun sets it
        seed=0,
    )
    history = trainer.fit(args.epochs, resume="auto")
    if trainer.rank == 0:
        print(", ".join(f"{name} {figures[-1]:.4f}" for name, figures in history.items()))


if __name__ == "__main__":
    main()
