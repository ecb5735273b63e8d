"""The demo on a small scene made here, and the real scene's files."""

import contextlib
import io
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import rasterio
import sklearn.metrics
import torch

from ununennium import cli, demo
from ununennium.palette import palette
from ununennium.prediction import predict_scene

TRANSFORM = rasterio.Affine(30.0, 0.0, 500_000.0, 0.0, -30.0, 5_000_000.0)
CRS = "EPSG:32633"


def write(path, array, *, crs=CRS, transform=TRANSFORM, nodata=None):
    array = array if array.ndim == 3 else array[None]
    shape = dict(zip(("count", "height", "width"), array.shape, strict=True))
    with rasterio.open(
        path, "w", driver="GTiff", dtype=array.dtype, crs=crs, transform=transform, nodata=nodata, **shape
    ) as target:
        target.write(array)
    return path


def make_scene(height=200, width=135, num_classes=3):
    """A scene whose first band numbers its pixels, with no data on the right and unlabelled pixels here and there."""
    rng = np.random.default_rng(0)
    numbers = np.arange(height * width, dtype=np.float32).reshape(height, width)
    image = np.stack([numbers, *rng.normal(size=(2, height, width)).astype(np.float32)])
    valid = np.ones((height, width), dtype=bool)
    valid[:, -7:] = False
    labels = rng.integers(num_classes, size=(height, width)).astype(np.uint8)
    labels[(rng.random((height, width)) < 0.2) | ~valid] = demo.IGNORE
    names = [f"class {number}" for number in range(num_classes)]
    return demo.LabelledScene(None, image, valid, labels, list(range(num_classes)), names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command, run once on three kinds of field with values 2, 5 and 9; returns its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    rng = np.random.default_rng(0)
    rows, cols = np.indices((96, 150))
    kind = (rows // 12 + cols // 10) % 3
    image = 100 * kind + rng.integers(1, 60, size=(4, 96, 150))
    image[:, :, :9] = 0
    image[:, 40, 40] = 0
    label = np.array([2, 5, 9])[kind]
    label[:5] = 255
    write(folder / "scene.tif", image.astype(np.uint16), nodata=0)
    write(folder / "labels.tif", label.astype(np.uint8))
    printed = io.StringIO()
    options = {
        "image": folder / "scene.tif",
        "label": folder / "labels.tif",
        "output": folder / "run",
        "classes": "water,meadow,forest",
        "model": "unet_mobilenet_v2",
        "epochs": 2,
        "batches": 2,
    }
    with contextlib.redirect_stdout(printed):
        cli.main(["demo", *(f"--{name}={value}" for name, value in options.items())])
    return folder, printed.getvalue()


def test_the_map_lies_on_the_image_and_is_nodata_where_the_image_is(finished):
    folder, _ = finished
    with rasterio.open(folder / "scene.tif") as image, rasterio.open(folder / "run/map.tif") as target:
        predicted, without_data = target.read(1), image.read_masks(1) == 0
        assert (target.crs, target.transform, target.shape) == (image.crs, image.transform, image.shape)
        assert (target.nodata, target.dtypes) == (255, ("uint8",))
        assert target.tags(1)["CLASS_5"] == "meadow"
        assert len({target.colormap(1)[value] for value in (2, 5, 9)}) == 3
    assert set(np.unique(predicted[~without_data])) <= {2, 5, 9}
    assert without_data.sum() > 9 * 96
    np.testing.assert_array_equal(predicted == 255, without_data)


def test_all_files_are_there_and_named(finished):
    folder, printed = finished
    for name in ("map.tif", "map.png", "curves.png", "checkpoints/best", "checkpoints/last"):
        assert (folder / "run" / name).exists()
        assert name in printed
    for name in ("map.png", "curves.png"):
        picture = matplotlib.image.imread(folder / "run" / name)
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.1
    figures = json.loads((folder / "run/run.json").read_text())["figures"]
    assert set(figures) == {"overall_accuracy", "kappa", "mean_recall", "mean_iou"}
    assert f"overall accuracy {100 * figures['overall_accuracy']:.2f}" in printed
    for name in ("water", "meadow", "forest"):
        assert sum(line.startswith(name) for line in printed.splitlines()) == 2  # pixels at first, figures at the end


def test_the_printed_line_loads_the_model_that_made_the_map(finished, tmp_path):
    folder, printed = finished
    (line,) = (line for line in printed.splitlines() if "import load_model" in line)
    namespace = {}
    exec(line.strip(), namespace)
    model = namespace["model"]
    assert model(torch.zeros(1, 4, 64, 64)).shape == (1, 3, 64, 64)
    assert (model.bands, model.class_names) == (("B1", "B2", "B3", "B4"), ("water", "meadow", "forest"))
    options = {"tile": demo.TILE, "overlap": demo.TILE // 2}
    maps = folder / "run/map.tif", predict_scene(model, folder / "scene.tif", tmp_path / "map.tif", **options)
    mapped, predicted = (rasterio.open(path).read(1) for path in maps)
    np.testing.assert_array_equal(mapped, predicted)


def test_the_map_sees_pixels_without_data_as_the_training_did(finished):
    folder, _ = finished
    model = demo.load_model(folder / "run")
    scene = demo.read_scene(folder / "scene.tif", folder / "labels.tif")
    tile = demo.Tiles(scene, demo.hold_out(scene.labels, 16))[0]["image"]
    without_data = tile.isnan().any(0)
    assert without_data.any()
    assert (tile[:, without_data].isnan()).all()
    assert math.isnan(model.fill)
    means = torch.where(tile.isnan(), model.network[0].mean[:, None, None], tile)
    torch.testing.assert_close(model(tile[None]), model(means[None]), rtol=0, atol=0)


def test_a_mistake_leaves_an_earlier_demo_as_it_is(finished, tmp_path):
    folder, _ = finished
    before = sorted((folder / "run").rglob("*"))
    with pytest.raises(demo.DemoError, match="there is no file"):
        demo.run(folder / "scene.tif", tmp_path / "nowhere.tif", folder / "run")
    assert sorted((folder / "run").rglob("*")) == before


def test_the_weights_do_not_depend_on_held_out_blocks(tmp_path, capsys):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 64, 64)).astype(np.float32)
    label = rng.integers(2, size=(64, 64)).astype(np.uint8)
    held_out = demo.hold_out(label, 8)
    weights = []
    for name in ("one", "other"):
        paths = write(tmp_path / f"{name}.tif", image), write(tmp_path / f"{name}_labels.tif", label)
        output = tmp_path / "run"
        demo.run(*paths, output, epochs=1, batches=1, block=8, model="unet_mobilenet_v2")
        weights.append(demo.load_model(output, "last").state_dict())
        image[:, held_out], label[held_out] = 1000 * image[:, held_out], 1 - label[held_out]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert weights[0]["network.1.segmentation_head.0.bias"].any()
    assert len(list((output / "checkpoints").glob("step-*"))) == 1  # the second run's


def test_training_chips_hold_no_pixel_of_validation_blocks():
    scene = make_scene()
    held_out = demo.hold_out(scene.labels, 8)
    chips = demo.Chips(scene, held_out, length=60)
    torch.manual_seed(0)
    forbidden = set(scene.image[0][held_out | ~scene.valid])
    labels = dict(zip(scene.image[0].ravel(), scene.labels.ravel(), strict=True))
    seen, blanks = set(), 0
    for index in range(len(chips)):
        sample = chips[index]
        assert sample["image"].shape == (3, demo.CHIP, demo.CHIP)
        assert (sample["image"].dtype, sample["mask"].dtype) == (torch.float32, torch.int64)
        is_blank = sample["image"].isnan().all(0)
        assert (sample["mask"][is_blank] == demo.IGNORE).all()
        numbers = sample["image"][0][~is_blank].tolist()
        assert forbidden.isdisjoint(numbers)
        assert sample["mask"][~is_blank].tolist() == [labels[number] for number in numbers]
        seen.update(numbers)
        blanks += int(is_blank.sum())
    assert seen == set(scene.image[0][~held_out & scene.valid])  # nothing of the training part is never shown
    assert blanks > 60 * demo.CHIP**2 / 4


def test_chips_turn_and_mirror_and_show_rare_classes():
    scene = make_scene(num_classes=2)
    held_out = demo.hold_out(scene.labels, 16)
    scene.labels[~held_out & (scene.labels == 1)] = 0
    scene.labels[16, 5] = 1  # one training pixel in some eighteen thousand
    assert not held_out[16, 5]
    chips = demo.Chips(scene, held_out, length=64)
    torch.manual_seed(0)
    samples = [chips[index] for index in range(len(chips))]
    assert sum(bool((sample["mask"] == 1).any()) for sample in samples) > 25
    steps = set()
    for sample in samples:
        numbers, known = sample["image"][0], ~sample["image"].isnan().any(0)
        beside = known[:, 1:] & known[:, :-1]
        steps |= set((numbers[:, 1:] - numbers[:, :-1])[beside].tolist())
    assert steps == {1, -1, 135, -135}


def test_statistics_come_from_training_pixels_alone():
    scene = make_scene()
    held_out = demo.hold_out(scene.labels, 16)
    seen = scene.valid & ~held_out
    before = demo.Whitening.fit(scene, seen)
    scene.image[:, ~seen] = np.nan
    after = demo.Whitening.fit(scene, seen)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.matrix, after.matrix)
    pixels = torch.from_numpy(scene.image[:, seen])[None, :, :, None]
    components = after.eval()(pixels)[0, :, :, 0]
    torch.testing.assert_close(components.cov(), torch.eye(3), atol=1e-3, rtol=0)
    assert not after(after.mean[None, :, None, None]).any()
    pixels[:, 0, ::2] = pixels[:, :, ::3] = np.nan  # without data in a band, and in all
    expected = components.clone()
    expected[:, ::2] = expected[:, ::3] = 0
    assert torch.equal(after(pixels)[0, :, :, 0], expected)


def test_a_band_that_says_nothing_new_is_left_out():
    scene = make_scene()
    scene.image = np.concatenate([scene.image, scene.image[:1] * 2, np.full_like(scene.image[:1], 7)])
    assert demo.Whitening.fit(scene, scene.valid).matrix.shape == (3, 5)


@pytest.mark.parametrize("shape", [(200, 135), (96, 192), (97, 64)])
def test_each_validation_pixel_counts_once(shape):
    scene = make_scene(*shape)
    held_out = demo.hold_out(scene.labels, 16)
    tiles = demo.Tiles(scene, held_out)
    counts = np.zeros(shape, dtype=int)
    for index in range(len(tiles)):
        image, mask = tiles[index]["image"][0], tiles[index]["mask"]
        counted = mask != demo.IGNORE
        places = image[counted].long().numpy()
        np.add.at(counts.reshape(-1), places, 1)
        np.testing.assert_array_equal(mask[counted], scene.labels.reshape(-1)[places])
        rim = torch.ones_like(counted)
        rim[demo.MARGIN : -demo.MARGIN, demo.MARGIN : -demo.MARGIN] = False
        assert not (counted & rim).any()
        assert (image[rim] >= 0).any()  # context
    np.testing.assert_array_equal(counts, held_out & (scene.labels != demo.IGNORE))


def test_figures_are_those_of_scikit_learn():
    scene = make_scene(num_classes=4)
    held_out = demo.hold_out(scene.labels, 16)
    scene.labels[held_out & (scene.labels == 3)] = 0  # a class without validation pixels, yet predicted
    rng = np.random.default_rng(1)
    wrong = rng.random(scene.labels.shape) < 0.3
    predicted = np.where(wrong, rng.integers(4, size=wrong.shape), scene.labels).astype(np.uint8)
    predicted[predicted == demo.IGNORE] = 0
    figures, per_class = demo.assess(scene, held_out, predicted)
    compared = held_out & (scene.labels != demo.IGNORE)
    true, mapped = scene.labels[compared], predicted[compared]
    ious = sklearn.metrics.jaccard_score(true, mapped, average=None)
    recalls = sklearn.metrics.recall_score(true, mapped, average=None, zero_division=np.nan)
    expected = {
        "overall_accuracy": sklearn.metrics.accuracy_score(true, mapped),
        "kappa": sklearn.metrics.cohen_kappa_score(true, mapped),
        "mean_recall": np.nanmean(recalls),
        "mean_iou": ious.mean(),
    }
    assert figures == pytest.approx(expected)
    np.testing.assert_allclose(per_class, np.stack([ious, recalls], axis=1))
    assert np.isnan(per_class[3, 1])
    assert per_class[3, 0] == 0


def test_every_third_block_is_held_out():
    labels = np.zeros((70, 45), dtype=np.uint8)
    held_out = demo.hold_out(labels, 10)
    for row in range(70):
        for col in range(45):
            assert held_out[row, col] == ((row // 10 + col // 10) % 3 == 0)


def test_the_default_block_is_the_largest_that_keeps_classes_on_both_sides():
    rows, cols = np.indices((400, 400))
    labels = (rows // 200).astype(np.uint8)
    assert demo.choose_block(labels) == 64
    labels[(rows < 20) & (cols < 20)] = 2  # a corner of the first 32-pixel block, which is held out; of several of 16
    assert demo.choose_block(labels) == 16
    assert demo.choose_block(labels[:70, :70]) == 8  # six blocks across


def test_class_names(tmp_path):
    file = tmp_path / "classes.json"
    file.write_text('{"classes": ["none", "wet", "dry"], "counts": {"wet": 3}}')
    assert demo.class_names([1, 2], str(file)) == ["wet", "dry"]  # by value
    assert demo.class_names([3, 20], "wet, dry") == ["wet", "dry"]  # in order
    assert demo.class_names([3, 20], {"20": "dry", "3": "wet", "0": "none"}) == ["wet", "dry"]
    assert demo.class_names([3, 20], None) == ["class 3", "class 20"]
    for names, complaint in (
        (["wet"], "no name for"),
        (["wet", "wet"], "one name to two"),
        ("no.json", "can't be read"),
    ):
        with pytest.raises(demo.DemoError, match=complaint):
            demo.class_names([3, 20], names)


def test_a_pixel_without_data_has_no_class(tmp_path):
    image = np.ones((2, 64, 64), dtype=np.float32)
    image[0, 0, :3] = -9999
    image[1, 1, :3] = np.nan
    label = np.indices((64, 64))[0].astype(np.int16) // 32 + 10
    label[2, :3], label[3, :3] = -1, 0
    scene = demo.read_scene(
        write(tmp_path / "image.tif", image, nodata=-9999), write(tmp_path / "label.tif", label, nodata=-1), None, 0
    )
    assert scene.values == [10, 11]
    assert (~scene.valid).sum() == 6
    assert not scene.valid[:2, :3].any()
    assert (scene.labels == demo.IGNORE).sum() == 12
    assert (scene.labels[:4, :3] == demo.IGNORE).all()
    assert scene.labels[63, 63] == 1


def test_rasters_that_can_not_be_read_are_named(tmp_path):
    label = write(tmp_path / "label.tif", np.indices((64, 64))[0].astype(np.uint8) // 32)
    waves = write(tmp_path / "waves.tif", np.ones((1, 64, 64), dtype=np.complex64))
    damaged = write(tmp_path / "damaged.tif", np.ones((2, 64, 64), dtype=np.float32))
    damaged.write_bytes(damaged.read_bytes()[:-9000])
    for image, complaint in (
        (waves, r"waves\.tif holds values of type complex64"),
        (damaged, r"damaged\.tif: .*can't be read"),
    ):
        with pytest.raises(demo.DemoError, match=complaint):
            demo.read_scene(image, label)


def test_24_classes_have_colours_of_their_own():
    assert len(set(palette(24))) == 24


def test_indian_pines_is_written_as_it_is(tmp_path, capsys):
    datasets = pytest.importorskip("tensorly.datasets")
    image_path, label_path = demo.write_indian_pines(tmp_path)
    bunch = datasets.load_indian_pines()
    with rasterio.open(image_path) as image:
        assert (image.count, image.shape, image.dtypes[0]) == (200, (145, 145), "uint16")
        np.testing.assert_array_equal(image.read().transpose(1, 2, 0), bunch.tensor)
        assert (image.descriptions[0], image.descriptions[-1]) == ("400.02 nm", "2498.96 nm")
        assert image.res == (20, 20)
        assert image.crs.wkt.startswith("LOCAL_CS")
        assert "CC BY 3.0" in image.tags()["TIFFTAG_COPYRIGHT"]
    with rasterio.open(label_path) as label:
        raw = label.read(1)
        assert (label.nodata, label.dtypes[0]) == (255, "uint8")
        assert "doi:10.4231/R7RX991C" in label.tags()["TIFFTAG_COPYRIGHT"]
    published = bunch.ticks[0]
    np.testing.assert_array_equal(raw == 255, published == 0)
    np.testing.assert_array_equal(raw[published > 0], published[published > 0] - 1)
    scene = demo.read_scene(image_path, label_path, demo.INDIAN_PINES)
    assert scene.names[13] == "Woods"
    assert (scene.labels == 13).sum() == 1265
    for attribution in ((tmp_path / "ATTRIBUTION.txt").read_text(), capsys.readouterr().out):
        assert "CC BY 3.0" in attribution
        assert "doi:10.4231/R7RX991C" in attribution


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(demo.DemoError, match="holds other files"):
        demo.make_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(demo.DemoError, match="can't be the output folder"):
        demo.make_folder(tmp_path / "file")
    assert demo.make_folder(tmp_path / "new" / "run") == Path(tmp_path / "new" / "run")
