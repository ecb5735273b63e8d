"""TorchGeo's datamodules: their loaders, and what they do to a batch on the device, without Lightning's loop."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from interop import IGNORE, bits, copied, end_workers, network, run_resumed, run_whole, same, tensors, trainer
from torch import nn

pytest.importorskip("torchgeo")
pytest.importorskip("timm")

import kornia.augmentation as K
import lightning.pytorch as lightning
import numpy as np
import rasterio
import timm
from rasterio.transform import from_origin
from torchgeo.datamodules import EuroSAT100DataModule, GeoDataModule, SpaceNet1DataModule
from torchgeo.datasets import EuroSAT100, RasterDataset, random_grid_cell_assignment
from torchgeo.samplers import GridGeoSampler, RandomBatchGeoSampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]


def of_datamodule(datamodule, split):
    """Return what a datamodule does to a batch on the device, for train_transform ("train") or val_transform ("val").

    These are the lines of the guide.
    """
    stage = SimpleNamespace(
        training=split == "train", validating=split == "val", sanity_checking=False, testing=False, predicting=False
    )

    def transform(batch):
        datamodule.trainer = stage  # all that on_after_batch_transfer asks of Lightning's trainer
        return datamodule.on_after_batch_transfer(batch, 0)

    return transform


class Recorded:
    """What Lightning's hook was given and what it gave, and where PyTorch's generator stood."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        given, generator = copied(batch), torch.get_rng_state()
        made = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer.training:
            self.in_training = [*getattr(self, "in_training", []), (generator, given, copied(made))]
        else:
            self.in_validation = [*getattr(self, "in_validation", []), (generator, given, copied(made))]
        return made


class Task(lightning.LightningModule):
    """The least that Lightning takes."""

    def __init__(self, model, target):
        super().__init__()
        self.model, self.target = model, target

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch["image"]), batch[self.target], ignore_index=IGNORE)

    def validation_step(self, batch, index):
        self.training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def run_lightning(datamodule, model, target, folder):
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    ).fit(Task(model, target), datamodule=datamodule)  # fmt: skip
    return datamodule


class EuroSAT100Files(Recorded, EuroSAT100DataModule):
    """TorchGeo's own datamodule, with flips added to its normalisation."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.train_aug = K.AugmentationSequential(
            K.Normalize(mean=self.mean, std=self.std), K.RandomHorizontalFlip(), K.RandomVerticalFlip(),
            data_keys=None, keepdim=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory):
    """The files that EuroSAT100 looks for, with 13 bands of noise."""
    root = tmp_path_factory.mktemp("eurosat")
    generator = np.random.default_rng(0)
    names = {"train": [], "val": [], "test": []}
    for name in ("Forest", "River", "Pasture"):
        folder = root / EuroSAT100.base_dir / name
        folder.mkdir(parents=True)
        for number in range(8):
            file = folder / f"{name}_{number}.tif"
            names["train" if number < 5 else "val" if number < 7 else "test"].append(f"{file.stem}.jpg")
            pixels = generator.integers(0, 4000, (13, 16, 16)).astype("uint16")
            place = {"crs": "EPSG:32631", "transform": from_origin(0, 0, 10, 10)}
            with rasterio.open(file, "w", "GTiff", width=16, height=16, count=13, dtype="uint16", **place) as target:
                target.write(pixels)
    for split, files in names.items():
        (root / EuroSAT100.split_filenames[split]).write_text("\n".join(files))
    return root


def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_resnet", pretrained=False, in_chans=13, num_classes=3)


def on_eurosat(root, workers=0, **kwargs):
    datamodule = EuroSAT100Files(root=str(root), batch_size=4, num_workers=workers)
    datamodule.setup("fit")
    transforms = {
        "train_transform": of_datamodule(datamodule, "train"), "val_transform": of_datamodule(datamodule, "val")
    }  # fmt: skip
    loaders = datamodule.train_dataloader(), datamodule.val_dataloader()
    return trainer(*loaders, model=classifier(), loss_fn=nn.CrossEntropyLoss(), **transforms, **kwargs)


def test_a_datamodule_of_torchgeo_trains(eurosat):
    training = on_eurosat(eurosat, seed=0)
    history = training.fit(6)
    assert history["train_loss"][-1] < 0.99 * history["train_loss"][1]
    assert len(training.trained) == 6 * 3  # 15 images by 4, without the last: the datamodule's drop_last
    assert all(batch["image"].abs().median() < 10 for batch in training.trained + training.validated)  # normalised


def test_a_datamodule_gives_the_batches_that_lightning_gets(eurosat, tmp_path):
    """Validation batch by batch, and for training what is made of a batch with the same random state."""
    datamodule = run_lightning(EuroSAT100Files(root=str(eurosat), batch_size=4), classifier(), "label", tmp_path)
    training = on_eurosat(eurosat, seed=0)
    training.fit(1)
    assert len(training.validated) == len(datamodule.in_validation) == 2
    for own, (_, _, made) in zip(training.validated, datamodule.in_validation, strict=True):
        assert same(own, made)
    transform = of_datamodule(datamodule, "train")
    changed = 0
    for generator, given, made in datamodule.in_training[:3]:
        torch.set_rng_state(generator)
        assert same(transform(copied(given)), made)
        changed += not torch.equal(datamodule.aug(copied(given))["image"], made["image"])
    assert changed, "nothing was flipped, so that this shows nothing"


def test_the_augmentations_of_a_datamodule_serve_as_they_are(eurosat):
    """Shorter, where a datamodule has no hook of its own: ``train_aug or aug`` and ``val_aug or aug``."""
    expected = on_eurosat(eurosat, seed=0)
    torch.manual_seed(0)
    expected.fit(1)
    datamodule = EuroSAT100Files(root=str(eurosat), batch_size=4)
    datamodule.setup("fit")
    training = trainer(
        datamodule.train_dataloader(),
        datamodule.val_dataloader(),
        model=classifier(),
        loss_fn=nn.CrossEntropyLoss(),
        train_transform=datamodule.train_aug or datamodule.aug,
        val_transform=datamodule.val_aug or datamodule.aug,
        seed=0,
    )
    torch.manual_seed(0)
    training.fit(1)
    assert bits(training) == bits(expected)


def test_workers_and_a_break_inside_an_epoch_change_no_bit_of_a_datamodules_run(eurosat, tmp_path):
    def build(**kwargs):
        return on_eurosat(eurosat, **kwargs)

    def in_workers(**kwargs):
        return on_eurosat(eurosat, workers=2, **kwargs)

    expected, inside = run_whole(build, tmp_path / "whole")
    assert run_whole(in_workers, tmp_path / "workers")[0] == expected
    for number, checkpoint in enumerate(inside):
        assert run_resumed(build, checkpoint, tmp_path / f"{number}") == expected


class Images(RasterDataset):
    filename_glob = "image*.tif"


class Masks(RasterDataset):
    filename_glob = "mask*.tif"
    is_image = False


class LandCover(Recorded, GeoDataModule):
    """A datamodule as TorchGeo's own are written: cells of a grid for training and validation, random chips, flips."""

    mean = torch.tensor([1500.0, 1000.0, 500.0])
    std = torch.tensor([400.0, 300.0, 200.0])

    def __init__(self, folder, **kwargs):
        super().__init__(RasterDataset, batch_size=3, patch_size=16, length=12, **kwargs)
        self.folder = folder
        self.train_aug = K.AugmentationSequential(
            K.Normalize(mean=self.mean, std=self.std), K.RandomHorizontalFlip(), K.RandomRotation90((0, 3)),
            data_keys=None, keepdim=True,
        )  # fmt: skip

    def setup(self, stage):
        scenes = Images(self.folder, cache=False) & Masks(self.folder, cache=False)
        generator = torch.Generator().manual_seed(0)
        cells = random_grid_cell_assignment(scenes, [0.5, 0.5], grid_size=2, generator=generator)
        self.train_dataset, self.val_dataset = cells
        self.train_batch_sampler = RandomBatchGeoSampler(
            self.train_dataset, self.patch_size, self.batch_size, self.length
        )
        self.val_sampler = GridGeoSampler(self.val_dataset, self.patch_size)


@pytest.fixture(scope="module")
def landcover(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landcover")
    generator = np.random.default_rng(0)
    image = generator.integers(0, 3000, (3, 64, 64)).astype("uint16")
    mask = (image[:1] // 1000).astype("uint8")
    mask[:, :5] = IGNORE
    place = {"crs": "EPSG:32631", "transform": from_origin(500_000, 5_000_000, 10, 10)}
    for name, pixels in (("image", image), ("mask", mask)):
        shape = {"count": len(pixels), "height": 64, "width": 64, "dtype": pixels.dtype}
        with rasterio.open(folder / f"{name}.tif", "w", "GTiff", **shape, **place) as file:
            file.write(pixels)
    return folder


def on_landcover(folder, workers=0, **kwargs):
    datamodule = LandCover(folder, num_workers=workers)
    datamodule.setup("fit")
    transforms = {
        "train_transform": of_datamodule(datamodule, "train"), "val_transform": of_datamodule(datamodule, "val")
    }  # fmt: skip
    return trainer(datamodule.train_dataloader(), datamodule.val_dataloader(), **transforms, **kwargs)


def test_a_geographic_datamodule_gives_the_batches_that_lightning_gets(landcover, tmp_path):
    datamodule = run_lightning(LandCover(landcover), network(), "mask", tmp_path)
    training = on_landcover(landcover, seed=0)
    history = training.fit(3)
    assert history["val_iou"][-1] > history["val_iou"][0]
    epoch = training.validated[: len(datamodule.in_validation)]
    assert len(epoch) == len(training.validated) / 3 > 1
    for own, (_, _, made) in zip(epoch, datamodule.in_validation, strict=True):
        assert "bounds" in own
        assert same(tensors(own), tensors(made))
    transform = of_datamodule(datamodule, "train")
    for generator, given, made in datamodule.in_training:
        torch.set_rng_state(generator)
        assert same(tensors(transform(copied(given))), tensors(made))
    turned = [not torch.equal(made["mask"], given["mask"]) for _, given, made in datamodule.in_training]
    assert any(turned), "nothing was turned, so that this shows nothing"


def test_workers_and_a_break_inside_an_epoch_change_no_bit_of_a_geographic_datamodules_run(landcover, tmp_path):
    """The workers persist, as TorchGeo's datamodules have it."""

    def build(**kwargs):
        return on_landcover(landcover, **kwargs)

    def in_workers(**kwargs):
        return on_landcover(landcover, workers=2, **kwargs)

    expected, inside = run_whole(build, tmp_path / "whole")
    assert run_whole(in_workers, tmp_path / "workers")[0] == expected
    assert run_resumed(build, inside[0], tmp_path / "first") == expected
    assert run_resumed(in_workers, inside[-1], tmp_path / "last") == expected


def test_persistent_workers_as_datamodules_have_them_end_with_fit(landcover):
    training = on_landcover(landcover, workers=2, seed=0)
    others = set(multiprocessing.active_children())
    try:
        training.fit(1)
        assert not set(multiprocessing.active_children()) - others
    finally:
        end_workers(training)


def test_a_hook_of_the_datamodules_own_is_run_once_a_batch():
    """SpaceNet's adds 1 to the masks in place, so that 0 is what its padding holds."""
    datamodule = SpaceNet1DataModule(batch_size=2)
    masks = torch.randint(0, 2, (4, 64, 64), generator=torch.Generator().manual_seed(0))
    samples = [{"image": torch.rand(3, 64, 64) * 255, "mask": mask} for mask in masks]
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    training = trainer(
        loader,
        loader,
        loss_fn=nn.CrossEntropyLoss(ignore_index=0),
        train_transform=of_datamodule(datamodule, "train"),
        val_transform=of_datamodule(datamodule, "val"),
        seed=0,
    )
    training.fit(2)
    assert len(training.trained) == len(training.validated) == 4
    for batch in training.trained + training.validated:
        assert batch["image"].shape[-2:] == batch["mask"].shape[-2:]
    assert all(batch["mask"].unique().tolist() == [0, 1, 2] for batch in training.validated)
    assert {label for batch in training.trained for label in batch["mask"].unique().tolist()} == {0, 1, 2}
