"""The same training run in several hands: ours by the specification's own call, peers', and loops written by hand.

Each contender trains a U-Net with AdamW in bf16 on made-up chips that are in memory, validates IoU and F1 and keeps the
best and the last state on disk. ``Contender(setting, folder)`` prepares it, calling it trains some epochs more.
"""

import logging
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Setting(NamedTuple):
    """What all contenders train.

    Attributes
    ----------
    on_device : bool
        Whether the batches are made before and lie on the device, so that the data loader costs nothing.
    """

    encoder: str = "resnet18"
    bands: int = 12
    classes: int = 10
    side: int = 128
    batch: int = 4
    train: int = 64
    val: int = 16
    device: str = "cpu"
    on_device: bool = False


class Samples(Dataset):
    """Chips, or whole batches of them, as tuples or as the mappings that TorchGeo's datasets yield."""

    def __init__(self, images: Tensor, masks: Tensor, named: bool = False) -> None:
        self.images, self.masks, self.named = images, masks, named

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, mask = self.images[index], self.masks[index]
        return {"image": image, "mask": mask} if self.named else (image, mask)


def loaders(setting: Setting, named: bool = False) -> tuple[DataLoader, DataLoader]:
    """Return a shuffled loader to train on, and one to validate on."""
    generator = torch.Generator().manual_seed(0)

    def loader(samples: int, shuffle: bool) -> DataLoader:
        images = torch.randn(samples, setting.bands, setting.side, setting.side, generator=generator)
        masks = torch.randint(0, setting.classes, (samples, setting.side, setting.side), generator=generator)
        if not setting.on_device:
            return DataLoader(Samples(images, masks, named), setting.batch, shuffle=shuffle)
        batches = [t.unflatten(0, (-1, setting.batch)).to(setting.device) for t in (images, masks)]
        return DataLoader(Samples(*batches, named), batch_size=None, shuffle=shuffle)

    return loader(setting.train, True), loader(setting.val, False)


def network(setting: Setting) -> nn.Module:
    """Return smp's U-Net, which is also what `create_model` makes."""
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.Unet(setting.encoder, encoder_weights=None, in_channels=setting.bands, classes=setting.classes)
    return model.to(setting.device)


class OurTrainer:
    """The specification's own call."""

    title = "Trainer"

    def __init__(self, setting: Setting, folder: Path, watching: Sequence[Any] = (), **options: Any) -> None:
        from ununennium.losses import DiceLoss
        from ununennium.models import create_model
        from ununennium.training import CheckpointCallback, Trainer

        torch.manual_seed(0)
        model = create_model(f"unet_{setting.encoder}", in_channels=setting.bands, num_classes=setting.classes)
        train_loader, val_loader = loaders(setting)
        # What it has beyond the specification's: where to run, and that it is quiet.
        self.trainer = Trainer(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
            loss_fn=DiceLoss(),
            train_loader=train_loader,
            val_loader=val_loader,
            callbacks=[*watching, CheckpointCallback(folder, monitor="val_iou")],
            mixed_precision=True,
            device=setting.device,
            progress=False,
            seed=0,
            **options,
        )
        self.done = 0

    def __call__(self, epochs: int = 1) -> None:
        self.trainer.fit(self.done + epochs, start_epoch=self.done)
        self.done += epochs


@contextmanager
def quiet() -> Iterator[None]:
    """Let Lightning say nothing."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Lightning:
    """Lightning with smp's loss and torchmetrics, without logger, progress bar or sanity check."""

    title = "Lightning, smp, torchmetrics"
    named, monitor, mode = False, "val_iou", "max"

    def __init__(self, setting: Setting, folder: Path) -> None:
        with quiet():
            import lightning
            from lightning.pytorch.callbacks import ModelCheckpoint

            self.module = self.make(setting)
            self.loaders = loaders(setting, self.named)
            checkpoint = ModelCheckpoint(folder, monitor=self.monitor, mode=self.mode, save_top_k=1, save_last=True)
            self.trainer = lightning.Trainer(
                accelerator="gpu" if setting.device == "cuda" else "cpu",
                devices=1,
                precision="bf16-mixed",
                max_epochs=0,
                callbacks=[checkpoint],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
            )

    def make(self, setting: Setting) -> Any:
        import lightning
        import segmentation_models_pytorch as smp

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network, self.loss_fn = network(setting), smp.losses.DiceLoss("multiclass")
                self.metrics = torch_metrics(setting)
                self.optimizer: torch.optim.Optimizer | None = None

            def forward(self, images: Tensor) -> Tensor:
                return self.network(images)

            def training_step(self, batch: Any, index: int) -> Tensor:
                images, masks = batch
                loss = self.loss_fn(self(images), masks)
                self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
                return loss

            def validation_step(self, batch: Any, index: int) -> None:
                images, masks = batch
                outputs = self(images)
                self.metrics.update(outputs, masks)
                self.log("val_loss", self.loss_fn(outputs, masks), batch_size=len(images))

            def on_validation_epoch_end(self) -> None:
                self.log_dict({f"val_{name}": value for name, value in self.metrics.compute().items()})
                self.metrics.reset()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                self.optimizer = self.optimizer or torch.optim.AdamW(self.parameters(), lr=1e-4)
                return self.optimizer

        return Module()

    def __call__(self, epochs: int = 1) -> None:
        with quiet():
            self.trainer.fit_loop.max_epochs += epochs
            self.trainer.fit(self.module, *self.loaders)


class TorchGeo(Lightning):
    """TorchGeo's task under Lightning, with the Jaccard loss, the nearest to Dice that it offers."""

    title = "TorchGeo's SemanticSegmentationTask"
    named, monitor, mode = True, "val_loss", "min"

    def make(self, setting: Setting) -> Any:
        from torchgeo.trainers import SemanticSegmentationTask

        torch.manual_seed(0)
        return SemanticSegmentationTask(
            model="unet", backbone=setting.encoder, weights=None, in_channels=setting.bands, task="multiclass",
            num_classes=setting.classes, loss="jaccard", lr=1e-4,
        )  # fmt: skip


def torch_metrics(setting: Setting) -> Any:
    """Return torchmetrics' IoU and F1."""
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

    return MetricCollection(
        {"iou": MulticlassJaccardIndex(setting.classes), "f1": MulticlassF1Score(setting.classes, average="macro")}
    ).to(setting.device)


class Naive:
    """The loop that a tutorial shows: smp's loss, torchmetrics, a float of every loss, `torch.save`."""

    title = "naive loop"

    def __init__(self, setting: Setting, folder: Path) -> None:
        import segmentation_models_pytorch as smp

        self.setting, self.folder = setting, folder
        self.model, self.loss_fn = network(setting), smp.losses.DiceLoss("multiclass")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.loaders, self.metrics = loaders(setting), torch_metrics(setting)
        self.best = -1.0

    def __call__(self, epochs: int = 1) -> None:
        for _ in range(epochs):
            self.epoch()

    def epoch(self) -> None:
        device, (train_loader, val_loader) = self.setting.device, self.loaders
        self.model.train()
        total, count = 0.0, 0
        for images, masks in train_loader:
            images, masks = images.to(device), masks.to(device)
            self.optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = self.loss_fn(self.model(images), masks)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(images)
            count += len(images)
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for images, masks in val_loader:
                images, masks = images.to(device), masks.to(device)
                with torch.autocast(device, torch.bfloat16):
                    outputs = self.model(images)
                    loss = self.loss_fn(outputs, masks)
                self.metrics.update(outputs, masks)
                total += loss.item() * len(images)
                count += len(images)
        iou = float(self.metrics.compute()["iou"])
        self.metrics.reset()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.folder / "last.pt")
        if iou > self.best:
            self.best = iou
            torch.save(state, self.folder / "best.pt")


class Levers(NamedTuple):
    """What a hand-tuned loop pulls."""

    channels_last: bool = True
    fused: bool = True
    our_loss: bool = True
    our_metrics: bool = True
    save_once: bool = True  # best is a link to what last is, written by a thread from a copy
    inference_mode: bool = True  # or no_grad, which is what the Trainer validates under
    compile: bool = False


class HandTuned:
    """A loop with every lever that we know of, and nothing that a run needs beside."""

    title = "hand-tuned loop"

    def __init__(self, setting: Setting, folder: Path, levers: Levers | None = None) -> None:
        import segmentation_models_pytorch as smp

        from ununennium.losses import DiceLoss
        from ununennium.metrics import ConfusionMatrix

        levers = self.levers = levers or Levers()
        self.setting, self.folder = setting, folder
        self.model = network(setting)
        if levers.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=levers.fused)
        self.forward = torch.compile(self.model) if levers.compile else self.model
        self.loss_fn = DiceLoss() if levers.our_loss else smp.losses.DiceLoss("multiclass")
        self.metrics = ConfusionMatrix(setting.classes) if levers.our_metrics else torch_metrics(setting)
        self.loaders = loaders(setting)
        self.best, self.copy, self.writing = -1.0, {}, threading.Thread()

    def batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        form = torch.channels_last if self.levers.channels_last else torch.contiguous_format
        for images, masks in loader:
            yield (
                images.to(self.setting.device, memory_format=form, non_blocking=True),
                masks.to(self.setting.device, non_blocking=True),
            )

    def __call__(self, epochs: int = 1) -> None:
        for _ in range(epochs):
            self.train()
            self.save(self.validate())
        if self.writing.ident:
            self.writing.join()

    def train(self) -> None:
        self.model.train()
        total, count = torch.zeros((), device=self.setting.device), 0
        for images, masks in self.batches(self.loaders[0]):
            self.step(images, masks, total)
            count += len(images)
        float(total / count)

    def step(self, images: Tensor, masks: Tensor, total: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.setting.device, torch.bfloat16):
            outputs = self.forward(images)
            loss = self.loss_fn(outputs, masks)
        loss.backward()
        self.optimizer.step()
        total += loss.detach() * len(images)

    def validate(self) -> float:
        with torch.inference_mode() if self.levers.inference_mode else torch.no_grad():
            return self.evaluate()

    def evaluate(self) -> float:
        self.model.eval()
        total, count = torch.zeros((), device=self.setting.device), 0
        for images, masks in self.batches(self.loaders[1]):
            with torch.autocast(self.setting.device, torch.bfloat16):
                outputs = self.forward(images)
                total += self.loss_fn(outputs, masks) * len(images)
            self.metrics.update(outputs, masks)
            count += len(images)
        float(total / count)
        if self.levers.our_metrics:
            matrix = self.metrics.compute().double()
            iou = float((matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())).nanmean())
            float((2 * matrix.diag() / (matrix.sum(0) + matrix.sum(1))).nanmean())
        else:
            iou = float(self.metrics.compute()["iou"])
        self.metrics.reset()
        return iou

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All that a run goes on from."""
        names = {p: name for name, p in self.model.named_parameters()}
        states = {
            f"{names[p]}.{key}": value for p, state in self.optimizer.state.items() for key, value in state.items()
        }
        return {**self.model.state_dict(), **states}

    def save(self, iou: float) -> None:
        better, self.best = iou > self.best, max(iou, self.best)
        last, best = self.folder / "last", self.folder / "best"
        if not self.levers.save_once:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, last)
            if better:
                torch.save(state, best)
            return
        if self.writing.ident:
            self.writing.join()
        if not self.copy:  # contiguous, which safetensors asks for; used anew by every save
            self.copy = {k: torch.empty(t.shape, dtype=t.dtype) for k, t in self.tensors.items()}
        for name, tensor in self.tensors.items():
            self.copy[name].copy_(tensor)
        self.writing = threading.Thread(target=self.write, args=(last, best, better))
        self.writing.start()

    def write(self, last: Path, best: Path, better: bool) -> None:
        from safetensors.torch import save_file

        aside = last.with_name("aside")
        save_file(self.copy, aside)
        aside.replace(last)
        if better:
            best.unlink(missing_ok=True)
            best.hardlink_to(last)


WITHOUT = {
    "channels_last": Levers(channels_last=False),
    "a fused optimizer": Levers(fused=False),
    "our DiceLoss, with smp's": Levers(our_loss=False),
    "our confusion matrix, with torchmetrics": Levers(our_metrics=False),
    "one save aside, with torch.save": Levers(save_once=False),
    "inference_mode, with no_grad": Levers(inference_mode=False),
}

ALL: list[type] = [OurTrainer, HandTuned, Naive, Lightning, TorchGeo]


def prepared(make: Callable[..., Any], setting: Setting, folder: Path, **options: Any) -> Any:
    """Return a contender with an empty folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return make(setting, folder, **options)
