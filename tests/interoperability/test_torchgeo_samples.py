"""Datasets without a place: one label, one number or several labels an image, through timm's models."""

import pytest
import torch
from interop import run_resumed, run_whole, trainer
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("torchgeo")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

import numpy as np
import timm
import torchmetrics
from PIL import Image
from torchgeo.datasets import NonGeoClassificationDataset, NonGeoDataset

from ununennium.training import BatchError

CLASSES = "field", "forest", "water"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder a class, as torchvision's ImageFolder has it, each in a colour of its own."""
    folder = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for number in range(6):
            pixels = generator.integers(0, 200, (32, 32, 3))
            pixels[..., channel] += 55
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{number}.png")
    return folder


def scaled(sample):
    """Scale the pixels and turn some images, drawing from PyTorch's generator."""
    image = sample["image"].float() / 255
    return {**sample, "image": image.flip(-1) if torch.rand(()) < 0.5 else image}


def classifier(outputs):
    """Return a small timm model, which has BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_resnet", pretrained=False, in_chans=3, num_classes=outputs)


def classify(folder, workers=0, **kwargs):
    dataset = NonGeoClassificationDataset(str(folder), transforms=scaled)
    train = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers)
    val = DataLoader(dataset, batch_size=4, num_workers=workers)
    return trainer(train, val, model=classifier(3), loss_fn=nn.CrossEntropyLoss(), **kwargs)


def test_a_classification_dataset_trains_a_timm_model(folder):
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro")
    training = classify(folder, seed=0, metrics={"accuracy": accuracy}, channels_last=False)
    history = training.fit(5)
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert history["val_accuracy"][-1] > 0.8
    labels = torch.cat([batch["label"] for batch in training.validated[-5:]])
    assert labels.tolist() == [label for label in range(3) for _ in range(6)]


def test_labels_without_metrics_of_their_own_get_iou_and_dice(folder):
    assert {"val_loss", "val_iou", "val_dice"} <= classify(folder, seed=0).fit(1).keys()


def test_workers_and_a_break_inside_an_epoch_change_no_bit_of_a_classifier(folder, tmp_path):
    def build(**kwargs):
        return classify(folder, **kwargs)

    def in_workers(**kwargs):
        return classify(folder, workers=2, **kwargs)

    expected, inside = run_whole(build, tmp_path / "whole")
    assert run_whole(in_workers, tmp_path / "workers")[0] == expected
    assert run_resumed(build, inside[1], tmp_path / "resumed") == expected
    assert run_resumed(in_workers, inside[-1], tmp_path / "resumed in workers") == expected


class Plots(NonGeoDataset):
    """Images whose mean is what there is to learn, as a map, a number or several labels; all else comes along."""

    def __init__(self, target, samples=12):
        images = torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        means = images.mean((2, 3))
        self.images, self.target = images, target
        self.values = {
            "a float mask": images.mean(1, keepdim=True) * 2 + 1,
            "a number": means.sum(1),
            "a column": means.sum(1, keepdim=True),
            "labels": (means > 0).long(),
        }[target]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        name = "mask" if self.target == "a float mask" else "label"
        return {"image": self.images[index], name: self.values[index], "name": f"plot {index}"}


def plots(target, model, loss_fn, **kwargs):
    train, val = DataLoader(Plots(target), batch_size=4, shuffle=True), DataLoader(Plots(target), batch_size=5)
    return trainer(train, val, model=model, loss_fn=loss_fn, seed=0, **kwargs)


def test_a_float_mask_is_regressed_pixel_by_pixel():
    model = nn.Conv2d(3, 1, 1)
    training = plots("a float mask", model, nn.MSELoss(), metrics={"mse": torchmetrics.MeanSquaredError()})
    history = training.fit(30)
    assert history["val_loss"][-1] < 0.5 * history["val_loss"][0]
    assert history["val_mse"] == pytest.approx(history["val_loss"], rel=1e-5)
    assert set(history) == {"train_loss", "train_mse", "val_loss", "val_mse"}
    assert [name for batch in training.validated[:3] for name in batch["name"]] == [f"plot {n}" for n in range(12)]


def test_a_column_of_numbers_is_regressed():
    history = plots("a column", classifier(1), nn.HuberLoss()).fit(6)
    assert history["train_loss"][-1] < 0.99 * history["train_loss"][1]
    assert set(history) == {"train_loss", "val_loss"}


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_numbers_beside_a_column_of_outputs_are_refused_and_not_broadcast():
    with pytest.raises(BatchError, match=r"outputs \(4, 1\) and targets \(4,\) differ in shape.*unsqueeze\(1\)"):
        plots("a number", classifier(1), nn.L1Loss()).fit(1)


def test_numbers_are_regressed_by_a_model_that_gives_numbers():
    history = plots("a number", nn.Sequential(classifier(1), nn.Flatten(0)), nn.L1Loss()).fit(2)
    assert set(history) == {"train_loss", "val_loss"}


def test_several_labels_an_image_train_as_torchgeo_gives_them():
    """Integers, as of BigEarthNet, with the loss and the metric of TorchGeo's own multi-label task."""
    accuracy = torchmetrics.classification.MultilabelAccuracy(num_labels=3, average="micro")
    training = plots("labels", classifier(3), nn.MultiLabelSoftMarginLoss(), metrics={"accuracy": accuracy})
    history = training.fit(6)
    assert training.trained[0]["label"].dtype == torch.int64
    assert history["train_loss"][-1] < 0.99 * history["train_loss"][1]
    model, dataset = training.model.eval(), Plots("labels")
    with torch.no_grad():
        right = (model(dataset.images) > 0).long() == dataset.values
    assert history["val_accuracy"][-1] == pytest.approx(float(right.float().mean()))


def test_integer_labels_for_a_binary_cross_entropy_are_refused_with_the_remedy():
    with pytest.raises(BatchError, match=r"torch\.int64.*convert the targets with targets\.float\(\)"):
        plots("labels", classifier(3), nn.BCEWithLogitsLoss()).fit(1)


def test_the_remedy_is_one_line_in_a_transform():
    def to_float(batch):
        return {**batch, "label": batch["label"].float()}

    transforms = {"train_transform": to_float, "val_transform": to_float}
    history = plots("labels", classifier(3), nn.BCEWithLogitsLoss(), **transforms).fit(6)
    assert history["train_loss"][-1] < 0.99 * history["train_loss"][1]
