"""Previews: what they show, and that the run does not know of them."""

import random
import re

import matplotlib.image
import numpy as np
import pytest
import rasterio
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ununennium import plots
from ununennium.data import Chips, Scene
from ununennium.models import RasterModel
from ununennium.training import Callback, PreviewCallback, Trainer
from ununennium.training.callbacks._picture import Shown, titles_of


class Gallery(Callback):
    """What a logger is given."""

    def __init__(self):
        self.pictures = []

    def log_image(self, trainer, name, image):
        self.pictures.append((name, trainer.state.epoch, image))


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn of classes, values and scenes, in the order of the pictures."""
    seen = []
    for name in ("draw_classes", "draw_values", "draw_scenes"):
        draw = getattr(plots, name)

        def recording(*args, name=name, draw=draw, **kwargs):
            seen.append((name, args, kwargs))
            return draw(*args, **kwargs)

        monkeypatch.setattr(plots, name, recording)
    return seen


class Augmented(TensorDataset):
    """Whose samples draw from all three generators, and from one of its own."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.own, self.read = np.random.default_rng(3), []

    def __getitem__(self, index):
        self.read.append(index)
        image, mask = super().__getitem__(index)
        noise = random.random() + np.random.rand() + float(torch.rand(())) + self.own.random()
        return image + noise * image.roll(1, -1), mask  # another picture, however it is stretched


def data(samples=12, channels=3, classes=3, size=16):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, channels, size, size, generator=generator)
    masks = torch.randint(0, classes, (samples, size, size), generator=generator)
    masks[:, 0] = 255
    return images, masks


def network(channels=3, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, classes, 1)
    )


def trainer(callbacks, *, model=None, loss=None, dataset=None, val_loader=..., **kwargs):
    model, dataset = model or network(), dataset or TensorDataset(*data())
    loss = loss or nn.CrossEntropyLoss(ignore_index=255)
    if val_loader is ...:
        val_loader = DataLoader(dataset, batch_size=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    return Trainer(
        model, optimizer, loss, loader, val_loader, callbacks, device="cpu", seed=4, progress=False, **kwargs
    )  # fmt: skip


def test_a_run_with_previews_ends_with_the_same_bits(tmp_path):
    def run(callbacks):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        dataset = Augmented(*data())
        training = trainer(callbacks, dataset=dataset)
        history = training.fit(3)
        after = random.random(), np.random.rand(), float(torch.rand(()))
        return training.model.state_dict(), history, after, dataset.read

    (weights, history, after, read), (others, other_history, other_after, more) = (
        run([]),
        run([PreviewCallback(tmp_path)]),
    )
    assert all(torch.equal(weights[name], value) for name, value in others.items())
    assert (history, after) == (other_history, other_after)
    assert len(more) == len(read) + 3 * 4


def test_the_same_samples_spread_evenly_in_the_same_state(tmp_path, drawn):
    dataset = Augmented(*data())
    loader = DataLoader(dataset, batch_size=5, shuffle=True)
    gallery = Gallery()
    training = trainer([PreviewCallback(tmp_path), gallery], dataset=dataset, val_loader=loader)
    training.fit(3)
    first, *others = ([e.picture for e in args[0]] for _, args, _ in drawn)
    assert len(first) == 4
    assert all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    predictions = [args[0][0].prediction for _, args, _ in drawn]
    assert not np.array_equal(predictions[0], predictions[-1])
    assert [(name, epoch) for name, epoch, _ in gallery.pictures] == [("preview", n) for n in (1, 2, 3)]
    for _, epoch, image in gallery.pictures:
        assert (image.dtype, image.shape[2]) == (np.uint8, 3)
        written = tmp_path / f"preview-epoch-{epoch:04}.png"
        np.testing.assert_array_equal(np.round(255 * matplotlib.image.imread(written)), image)


def test_which_samples(tmp_path, drawn):
    images, masks = data(40)
    images[:, 0, 0, 0] = torch.arange(40)
    loader = DataLoader(TensorDataset(images, masks), batch_size=7)
    trainer([PreviewCallback(tmp_path)], val_loader=loader).fit(1)
    trainer([PreviewCallback(tmp_path, samples=[30, 2])], val_loader=loader).fit(1)
    trainer([PreviewCallback(tmp_path, samples=100)], val_loader=loader).fit(1)
    titles = [[e.title for e in args[0]] for _, args, _ in drawn]
    assert titles[0] == ["sample 5", "sample 15", "sample 25", "sample 35"]
    assert titles[1] == ["sample 30", "sample 2"]
    np.testing.assert_array_equal(drawn[1][1][0][0].target, masks[30].numpy())
    assert len(titles[2]) == 40


def test_what_is_predicted_is_what_validation_predicts(tmp_path, drawn):
    """In eval mode, with the weights that a callback puts in, in the run's precision and after the transform."""

    class Doubles(Callback):
        def evaluation(self, trainer):
            return self

        def __enter__(self):
            training.model[3].weight.data *= -2

        def __exit__(self, *_):
            training.model[3].weight.data /= -2

    def transform(batch):
        return batch[0] * 3, batch[1].flip(-1)

    images, masks = data()
    training = trainer(
        [Doubles(), PreviewCallback(tmp_path, samples=[7])], val_transform=transform, mixed_precision="bf16"
    )
    training.fit(1)
    model = training.model.eval()
    model[3].weight.data *= -2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images[7:8] * 3)[0].argmax(0)
    (shown,) = drawn[0][1][0]
    np.testing.assert_array_equal(shown.prediction, expected.numpy())
    np.testing.assert_array_equal(shown.target, masks[7].flip(-1).numpy())
    np.testing.assert_array_equal(shown.compared, masks[7].flip(-1).numpy() != 255)


def test_a_class_that_is_ignored_is_not_compared(tmp_path, drawn):
    images, masks = data()
    masks[:, 0] = 0
    loss = nn.CrossEntropyLoss(ignore_index=0)
    trainer([PreviewCallback(tmp_path)], loss=loss, dataset=TensorDataset(images, masks)).fit(1)
    shown = drawn[0][1][0][0]
    np.testing.assert_array_equal(shown.compared, shown.target != 0)


def test_every_few_epochs_and_after_the_last(tmp_path):
    trainer([PreviewCallback(tmp_path, every_n_epochs=2)]).fit(5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"preview-epoch-000{n}.png" for n in (2, 4, 5)]


def test_bands_by_name_and_by_choice(tmp_path, drawn):
    images, masks = data(channels=4)
    images = images + 10
    images[:, :, :4, :4] = 0  # no data

    def shown(**options):
        model = RasterModel(network(4), ["B8", "B2", "B3", "B4"], class_names=["water", "crops", "forest"])
        training = trainer([PreviewCallback(tmp_path, **options)], model=model, dataset=TensorDataset(images, masks))
        training.fit(1)
        _, (examples, names, colors), kwargs = drawn[-1]
        assert names == ("water", "crops", "forest")
        assert colors == model.colors
        return examples[0], kwargs["titles"][0]

    for options, channels, title in (
        ({}, [3, 2, 1], "Image (B4, B3, B2)"),
        ({"rgb": ["b08", "B4", 2]}, [0, 3, 2], "Image (B8, B4, B3)"),
        ({"rgb": ["B8"]}, [0], "Image (B8)"),
    ):
        example, said = shown(**options)
        assert said == title
        valid = np.ones((16, 16), bool)
        valid[:4, :4] = False
        np.testing.assert_array_equal(example.valid, valid)
        np.testing.assert_array_equal(example.picture, plots.composite(images[1].numpy(), channels, valid))


def test_a_band_that_is_not_there_is_told_before_the_first_step(tmp_path):
    model = RasterModel(network(), ["B2", "B3", "B4"], class_names=["a", "b", "c"])
    training = trainer([PreviewCallback(tmp_path, rgb=["B8", "B4", "B3"])], model=model)
    with pytest.raises(ValueError, match="rgb has 'B8', but the bands are B2, B3, B4"):
        training.fit(1)
    assert training.state.optimizer_steps == 0


@pytest.mark.parametrize(
    "options",
    [{"every_n_epochs": 0}, {"samples": 0}, {"samples": []}, {"samples": True}, {"rgb": ["a", "b"]}, {"rgb": "red"}],
)
def test_options_that_make_no_sense(tmp_path, options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        PreviewCallback(tmp_path, **options)


def test_what_is_no_colour_is_told_when_it_is_given(tmp_path):
    with pytest.raises(ValueError, match="'red' is no colour"):
        PreviewCallback(tmp_path, colors=["#00ff00", "red"])


@pytest.mark.parametrize("loss_fn", [nn.BCELoss(), nn.functional.binary_cross_entropy])
def test_outputs_that_are_probabilities_are_taken_for_what_they_are(loss_fn):
    images, likely = torch.zeros(2, 3, 4, 4), torch.tensor([0.1, 0.9])
    targets = torch.zeros(2, 1, 4, 4)
    shown = Shown.of((images, targets), likely[:, None, None, None].expand(2, 1, 4, 4), targets, loss_fn)
    assert [int(picture.max()) for picture in shown.predictions] == [0, 1]
    labels = torch.tensor([[0.2, 0.8, 0.4], [0.9, 0.1, 0.6]])
    shown = Shown.of((images, labels.round()), labels, labels.round(), loss_fn)
    assert shown.predictions.tolist() == [[False, True, False], [True, False, True]]


# Places


def test_chips_tell_where_they_lie(tmp_path, drawn):
    profile = {"driver": "GTiff", "height": 64, "width": 64, "crs": "EPSG:32633"}
    profile["transform"] = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    draw = np.random.default_rng(0)
    with rasterio.open(tmp_path / "image.tif", "w", count=3, dtype="uint16", **profile) as target:
        target.write(draw.integers(1, 900, (3, 64, 64)).astype(np.uint16))
    with rasterio.open(tmp_path / "label.tif", "w", count=1, dtype="uint8", **profile) as target:
        target.write(draw.integers(0, 3, (1, 64, 64)).astype(np.uint8))
    chips = Chips(Scene(tmp_path / "image.tif", tmp_path / "label.tif"), 16, classes=["wet", "dry", "green"])
    loader = DataLoader(chips, batch_size=4)
    model = RasterModel(network(), chips.bands, class_names=chips.class_names)
    trainer([PreviewCallback(tmp_path / "previews", samples=[5])], model=model, dataset=chips, val_loader=loader).fit(1)
    (shown,) = drawn[0][1][0]
    assert shown.title == "sample 5   EPSG:32633   x 500,160 … 500,320   y 4,999,680 … 4,999,840"
    assert drawn[0][1][1] == ("wet", "dry", "green")


def test_places_as_torchgeo_tells_them():
    sample = {
        "crs": ["EPSG:4326", 'LOCAL_CS["site 3, local grid",UNIT["metre",1]]'],
        "bounds": [(slice(10.5, 10.51), slice(-1.2, -1.19), slice(0, 1)), (slice(0, 64), slice(0, 64), slice(0, 1))],
    }
    assert titles_of(sample, ["", ""], None) == [
        "EPSG:4326   x 10.5000 … 10.5100   y -1.2000 … -1.1900",
        "site 3, local grid   x 0 … 64   y 0 … 64",
    ]
    system = rasterio.crs.CRS.from_epsg(32631)
    written_out = type("CRS", (), {"__str__": lambda _: system.to_wkt(), "to_epsg": lambda _: 32631})()  # as pyproj's
    assert titles_of({"crs": [written_out], "bounds": sample["bounds"][1:]}, [], None) == [
        "EPSG:32631   x 0 … 64   y 0 … 64"
    ]
    newer = {"bounds": torch.tensor([[1.0, 101.0, 10, 2.0, 102.0, 10, 0, 1, 1]]), "crs": "EPSG:3035"}
    assert titles_of(newer, [], None) == ["EPSG:3035   x 1 … 101   y 2 … 102"]
    assert titles_of((1, 2), ["sample 3"], None) == ["sample 3"]


# Other tasks


def test_values_for_each_pixel(tmp_path, drawn):
    images, _ = data()
    values = images[:, :1] * 2
    values[:, :, 0] = torch.nan
    loss = lambda outputs, targets: ((outputs - targets.nan_to_num()) ** 2).mean()  # noqa: E731
    preview = PreviewCallback(tmp_path)
    training = trainer([preview], model=network(classes=1), loss=loss, dataset=TensorDataset(images, values))
    training.fit(1)
    name, (examples,), _ = drawn[0]
    assert (name, preview.per_pixel) == ("draw_values", True)
    np.testing.assert_array_equal(examples[0].target, values[1, 0].numpy())
    assert not examples[0].compared[0].any()
    assert examples[0].compared[1:].all()
    with torch.no_grad():
        expected = training.model.eval()(images[1:2])[0, 0]
    np.testing.assert_allclose(examples[0].prediction, expected.numpy(), atol=1e-6)


def scene_model(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, outputs), nn.Unflatten(1, (outputs,)))


SCENES = {
    "classes": (torch.arange(12) % 3, nn.CrossEntropyLoss(), 3),
    "two classes of one logit": (torch.arange(12)[:, None] % 2, nn.BCEWithLogitsLoss(), 1),
    "several labels": ((torch.arange(36).reshape(12, 3) % 2).float(), nn.BCEWithLogitsLoss(), 3),
    "values": (torch.randn(12, 1), nn.MSELoss(), 1),
}


@pytest.mark.parametrize("kind", SCENES)
def test_scenes_say_what_is_predicted_and_what_is_true(tmp_path, drawn, kind):
    targets, loss, outputs = SCENES[kind]
    targets = targets.float() if kind.startswith("two") else targets
    preview = PreviewCallback(tmp_path, samples=[2], class_names=["wet", "dry", "green"][: max(outputs, 2)])
    training = trainer([preview], model=scene_model(outputs), loss=loss, dataset=TensorDataset(data()[0], targets))
    training.fit(1)
    name, (_, (caption,), (right,), _), _ = drawn[0]
    assert (name, preview.per_pixel) == ("draw_scenes", False)
    with torch.no_grad():
        said, truth = training.model.eval()(data()[0][2:3])[0], targets[2]
    if kind == "values":
        assert (caption, right) == (f"{float(said):.4g}\ntrue {float(truth):.4g}", None)
        return
    names = np.array(["wet", "dry", "green"])
    if kind == "several labels":
        chosen, true = (", ".join(names[v.numpy().astype(bool)]) or "none" for v in (said > 0, truth))
    elif kind == "classes":
        chosen, true = names[int(said.argmax())], names[int(truth)]
    else:
        chosen, true = names[int(said > 0)], names[int(truth)]
    assert right == (chosen == true)
    assert re.fullmatch(rf"{chosen}( \(\d+%\))?" + ("" if right else f"\ntrue: {true}"), caption)


def test_two_classes_of_one_logit_a_pixel(tmp_path, drawn):
    images, masks = data(classes=2)
    dataset = TensorDataset(images, (masks.clamp(max=1)[:, None]).float())
    training = trainer(
        [PreviewCallback(tmp_path, samples=[4])], model=network(classes=1), loss=nn.BCEWithLogitsLoss(), dataset=dataset
    )
    training.fit(1)
    name, ((shown,), names, _), _ = drawn[0]
    assert (name, list(names)) == ("draw_classes", ["class 0", "class 1"])
    with torch.no_grad():
        expected = training.model.eval()(images[4:5])[0, 0] > 0
    np.testing.assert_array_equal(shown.prediction, expected.numpy())


# Other loaders


class Stream(IterableDataset):
    passes = 0

    def __iter__(self):
        self.passes += 1
        yield from zip(*data(), strict=True)


def test_of_an_iterable_the_first_batch_read_once(tmp_path, drawn):
    stream = Stream()
    trainer([PreviewCallback(tmp_path, samples=2)], val_loader=DataLoader(stream, batch_size=3)).fit(3)
    assert stream.passes == 3 + 1
    assert [len(args[0]) for _, args, _ in drawn] == [2, 2, 2]
    np.testing.assert_array_equal(drawn[2][1][0][1].target, data()[1][1].numpy())


def test_batches_that_a_list_or_a_dataset_of_batches_gives(tmp_path, drawn):
    images, masks = data()
    batches = [(images[:6], masks[:6]), (images[6:], masks[6:])]
    for loader in (batches, DataLoader(batches, batch_size=None)):
        trainer([PreviewCallback(tmp_path)], val_loader=loader).fit(1)
        np.testing.assert_array_equal(drawn[-1][1][0][3].target, masks[3].numpy())
    trainer(
        [PreviewCallback(tmp_path)], val_loader=DataLoader(TensorDataset(images, masks), batch_sampler=[[1, 2], [3]])
    ).fit(1)
    assert [e.title for e in drawn[-1][1][0]] == ["sample 1", "sample 2", "sample 3"]


@pytest.mark.parametrize("kind", ["no loader", "once", "no image"])
def test_where_there_is_nothing_to_draw_it_says_so_once(tmp_path, capsys, kind):
    images, masks = data()
    options = {
        "no loader": {"val_loader": None},
        "once": {"val_loader": iter([(images, masks)])},
        "no image": {
            "model": nn.Linear(5, 2),
            "loss": nn.CrossEntropyLoss(),
            "dataset": TensorDataset(torch.randn(9, 5), torch.zeros(9).long()),
        },
    }[kind]
    preview = PreviewCallback(tmp_path)
    trainer([preview], **options).fit(1 if kind == "once" else 3)
    said = {"no loader": "there is no val_loader", "once": "only once", "no image": "no image (B, C, H, W)"}[kind]
    assert said in preview.skipped
    assert capsys.readouterr().out == f"no previews: {preview.skipped}\n"
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_knows_the_last_picture_that_was_its_own(tmp_path):
    training = trainer([PreviewCallback(tmp_path / "previews")])
    training.fit(2)
    training.save(tmp_path / "checkpoint")
    (tmp_path / "previews/preview-epoch-0009.png").write_bytes(b"of a run that went on")
    preview = PreviewCallback(tmp_path / "previews")
    again = trainer([preview])
    again.load(tmp_path / "checkpoint")
    again.fit(2)
    assert preview.latest == (2, (tmp_path / "previews/preview-epoch-0002.png").read_bytes())
