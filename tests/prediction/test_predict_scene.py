"""A scene in tiles is the scene at once; what the map says of itself."""

import numpy as np
import pytest
import rasterio
import torch
from maps import BANDS, GRID, by_hand, left_behind, pixels
from torch import nn

from ununennium.data import Scene
from ununennium.models import create_model
from ununennium.prediction import predict_scene
from ununennium.prediction._tiles import Tiles

SMALL = {"tile": 64, "overlap": 16, "device": "cpu", "progress": False}


class Watched(nn.Module):
    """Remembers what it was given, and gives a function of it."""

    def __init__(self, function=lambda images: images):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.function, self.seen = function, []

    def forward(self, images):
        self.seen.append(images.clone())
        return self.function(images)


def classes_of(model, path):
    """Return the likeliest classes of a scene, and where they are so by a margin."""
    best = torch.from_numpy(by_hand(model, path)).softmax(0).topk(2, dim=0)
    return best.indices[0].numpy(), (best.values[0] - best.values[1] > 1e-5).numpy()


@pytest.mark.parametrize("tiling", [(64, 16), (64, 0), (48, 40), (33, 7), (512, 64), (190, 1)], ids=str)
@pytest.mark.parametrize("size", [(150, 190), (64, 201), (31, 5)], ids=str)
def test_tiles_give_what_the_whole_scene_gives(scene, raster_model, tmp_path, size, tiling):
    path, model = scene(*size), raster_model()
    options = {**SMALL, "tile": tiling[0], "overlap": tiling[1], "batch_size": 3, "overwrite": True}
    expected = by_hand(model, path)
    logits = pixels(predict_scene(model, path, tmp_path / "map.tif", output="logits", **options))
    assert np.abs(logits - expected).max() < 1e-5
    shares = pixels(predict_scene(model, path, tmp_path / "map.tif", output="probabilities", **options))
    assert np.abs(shares - torch.from_numpy(expected).softmax(0).numpy()).max() < 1e-5
    likeliest = pixels(predict_scene(model, path, tmp_path / "map.tif", **options))[0]
    classes, clear = classes_of(model, path)
    assert (likeliest == classes)[clear].all()
    assert clear.mean() > 0.99


def test_no_seam_shows_with_a_network_that_looks_around(scene, tmp_path):
    torch.manual_seed(0)
    scaled = Watched(lambda images: (images - 2000) / 1000)
    model = nn.Sequential(scaled, create_model("unet_resnet18", 3, 4))
    path = scene(160, 512)
    with rasterio.open(path, "r+") as dataset:  # as smooth as land is
        rows, columns = np.mgrid[:160, :512]
        smooth = [2000 + 900 * np.sin(rows / (20 + 3 * b)) * np.cos(columns / (25 - 2 * b) + b) for b in range(3)]
        dataset.write((np.array(smooth) + dataset.read() / 40).astype(np.uint16))

    def of_columns(overlap):
        """Return the 99th percentile of jumps at each column where tiles overlap, and at all others."""
        options = {**SMALL, "tile": 128, "overlap": overlap, "output": "probabilities", "overwrite": True}
        values = pixels(predict_scene(model, path, tmp_path / "map.tif", **options))
        jumps = np.percentile(np.abs(np.diff(values, axis=2)), 99, axis=(0, 1))
        starts, column = np.array(Tiles(512, 128, overlap).starts), np.arange(511)[:, None]
        tiles = ((column >= starts - 1) & (column < starts + 128)).sum(1)
        jumps, tiles = jumps[4:-4], tiles[4:-4]  # the scene's own edge is no seam, and shows
        return jumps[tiles > 1], jumps[tiles == 1]

    for overlap in (32, 64):
        seams, inside = of_columns(overlap)
        assert np.percentile(seams, 99) <= np.percentile(inside, 99)
        assert seams.max() <= inside.max()
    seams, inside = of_columns(0)
    assert seams.min() > 1.5 * np.median(inside)  # what there would be to see


def test_the_map_is_a_cog_on_the_scenes_grid_with_colours_and_names(scene, raster_model, tmp_path):
    path = scene(600, 700, empty=[(slice(10, 20), slice(30, 40))])
    colors = ["#ff0000", "#00ff00", "#0000ff", "#123456"]
    model = raster_model(class_values=[10, 20, 30, 41], colors=colors, class_names=["a", "b", "c, d", "ä"])
    result = predict_scene(model, path, str(tmp_path / "map.tif"), **SMALL | {"tile": 256})
    assert result == tmp_path / "map.tif"
    with rasterio.open(result) as dataset:
        assert dataset.driver == "GTiff"
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.profile["compress"] == "deflate"
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.overviews(1) == [2]
        assert (dataset.crs, dataset.transform, dataset.shape) == ("EPSG:32633", GRID, (600, 700))
        assert (dataset.dtypes, dataset.nodata) == (("uint8",), 255)
        table = dataset.colormap(1)
        assert [table[v][:3] for v in (10, 20, 30, 41)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (18, 52, 86)]
        assert dataset.tags(1) == {"CLASS_10": "a", "CLASS_20": "b", "CLASS_30": "c, d", "CLASS_41": "ä"}
        values = dataset.read(1)
    assert (values[10:20, 30:40] == 255).all()
    assert set(np.unique(values)) == {10, 20, 30, 41, 255}
    classes, clear = classes_of(model, path)
    assert (values == np.array([10, 20, 30, 41])[classes])[clear & (values != 255)].all()
    with rasterio.open(result, overview_level=0) as half:
        four = values.reshape(300, 2, 350, 2).swapaxes(1, 2).reshape(300, 350, 4)
        chosen = half.read(1)[:, :, None]
        assert (four == chosen).any(2).all()  # one of them, and no mean of numbers or of colours
        assert ((four == chosen).sum(2) >= (four == four[:, :, :1]).sum(2))[(four != 255).all(2)].all()
    assert list(tmp_path.glob("map*")) == [result]
    assert left_behind(tmp_path) == []


def test_probabilities_are_bands_with_names_and_sum_to_one(scene, raster_model, tmp_path):
    path = scene(600, 520, empty=[(slice(0, 8), slice(0, 8))])
    result = predict_scene(raster_model(), path, tmp_path / "map.tif", output="probabilities", **SMALL)
    with rasterio.open(result) as dataset:
        assert dataset.descriptions == ("class 0", "class 1", "class 2", "class 3")
        assert set(dataset.dtypes) == {"float32"}
        assert np.isnan(dataset.nodata)
        assert dataset.tags(ns="IMAGE_STRUCTURE")["PREDICTOR"] == "3"
        values = dataset.read()
    with rasterio.open(result, overview_level=0) as half:
        mean = values[:, 20:22, 20:22].mean((1, 2))
        assert np.abs(half.read()[:, 10, 10] - mean).max() < 1e-6
    assert np.isnan(values[:, :8, :8]).all()
    values[:, :8, :8] = 0.25
    assert np.abs(values.sum(0) - 1).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "nodata", "dtype"),
    [
        ({"ignore_index": -100}, 255, "uint8"),
        ({"ignore_index": 200}, 200, "uint8"),
        ({"ignore_index": 2}, 255, "uint8"),
        ({"ignore_index": 255, "class_values": [255, 1, 2, 254]}, 253, "uint8"),
        ({"ignore_index": 255, "class_values": [1, 2, 3, 300]}, 255, "uint16"),
        ({"ignore_index": 999}, 255, "uint8"),
    ],
)
def test_nodata_is_never_a_class(scene, raster_model, tmp_path, options, nodata, dtype):
    path = scene(40, 40, empty=[(slice(0, 5), slice(0, 5))])
    result = predict_scene(raster_model(**options), path, tmp_path / "map.tif", **SMALL)
    with rasterio.open(result) as dataset:
        assert (dataset.nodata, dataset.dtypes[0]) == (nodata, dtype)
        values = dataset.read(1)
    assert (values[:5, :5] == nodata).all()
    assert (values != nodata).sum() == 40 * 40 - 25


def test_256_classes_and_more_need_a_wider_type(scene, tmp_path):
    model = Watched(lambda images: nn.functional.one_hot(images[:, 0].long() % 300, 300).movedim(-1, 1).float())
    path = scene(40, 40)
    result = predict_scene(model, path, tmp_path / "map.tif", **SMALL)
    assert (pixels(result)[0] == pixels(path)[0] % 300).all()


def test_pixels_without_data_are_filled_and_tiles_without_any_are_left_out(scene, tmp_path, raster_model):
    path = scene(64, 300, empty=[(slice(None), slice(100, 300)), (slice(3, 5), slice(7, 9))])
    watched = Watched(lambda images: images[:, [0, 1, 2, 0]])
    model = raster_model(watched, fill=-7.5)
    values = pixels(predict_scene(model, path, tmp_path / "map.tif", output="logits", **SMALL, batch_size=2))
    given = torch.cat(watched.seen[1:] if watched.seen[0].shape[0] == 1 else watched.seen)
    assert len(given) == 3  # of six
    filled = (torch.tensor(-7.5) - 2000) / 1000
    assert torch.equal(given[0][:, 3:5, 7:9], torch.full((3, 2, 2), filled))
    assert np.isnan(values[:, 3:5, 7:9]).all()
    assert np.isnan(values[:, :, 100:]).all()
    assert np.isfinite(values).sum() == 4 * (64 * 100 - 4)


def test_a_scene_without_any_data_is_a_map_without_any(scene, raster_model, tmp_path):
    path = scene(70, 70, empty=[(slice(None), slice(None))])
    for output in ("classes", "probabilities"):
        with rasterio.open(predict_scene(raster_model(), path, tmp_path / output, output=output, **SMALL)) as dataset:
            assert not dataset.read_masks().any()


def test_a_small_scene_is_filled_up_to_what_networks_take(scene, tmp_path):
    path, model = scene(45, 70), Watched()
    values = pixels(predict_scene(model, path, tmp_path / "map.tif", output="logits", **SMALL | {"tile": 512}))
    assert {tuple(images.shape[2:]) for images in model.seen} == {(64, 96)}
    assert (values == pixels(path)).all()


def test_nan_in_a_source_is_no_data(scene, tmp_path):
    path = scene(64, 64, dtype="float32", nodata=float("nan"), empty=[(slice(5, 6), slice(7, 8))])
    values = pixels(predict_scene(Watched(), path, tmp_path / "map.tif", output="logits", **SMALL))
    assert np.isnan(values[:, 5, 7]).all()
    assert np.isfinite(values).sum() == 3 * (64 * 64 - 1)


def test_flips_average_four_views(scene, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(Watched(lambda images: images / 2000), nn.Conv2d(3, 4, 5, padding=2))
    path = scene(64, 64)
    image = torch.from_numpy(pixels(path).astype(np.float32))[None]
    with torch.no_grad():
        views = [network(image.flip(dims)).softmax(1).flip(dims) for dims in ([], [2], [3], [2, 3])]
    values = pixels(predict_scene(network, path, tmp_path / "map.tif", output="probabilities", flips=True, **SMALL))
    assert np.abs(values - torch.stack(views).mean(0)[0].numpy()).max() < 1e-6
    assert np.abs(values - views[0][0].numpy()).max() > 1e-3
    raw = pixels(predict_scene(network, path, tmp_path / "raw.tif", output="logits", flips=True, **SMALL))
    with torch.no_grad():
        views = [network(image.flip(dims)).flip(dims) for dims in ([], [2], [3], [2, 3])]
    assert np.abs(raw - torch.stack(views).mean(0)[0].numpy()).max() < 1e-6


def test_a_regression_gives_its_values(scene, tmp_path):
    path = scene()
    model = Watched(lambda images: images.mean(1))  # (B, H, W)
    with rasterio.open(predict_scene(model, path, tmp_path / "map.tif", output="logits", **SMALL)) as dataset:
        assert dataset.count == 1
        assert np.allclose(dataset.read(1), pixels(path).mean(0))


def test_bands_are_found_by_name_in_whatever_order_and_files(scene, raster_model, tmp_path):
    whole, model = scene(), raster_model()
    expected = pixels(predict_scene(model, whole, tmp_path / "map.tif", output="logits", **SMALL))
    image = pixels(whole)
    files = []
    for number in (2, 0, 1):
        files.append(tmp_path / f"T33_{BANDS[number]}.tif")
        with rasterio.open(whole) as dataset, rasterio.open(files[-1], "w", **dataset.profile | {"count": 1}) as one:
            one.write(image[number], 1)
    options = {**SMALL, "output": "logits", "overwrite": True}
    assert (pixels(predict_scene(model, files, tmp_path / "map.tif", **options)) == expected).all()
    called = Scene(whole, bands=["x", "y", "z"])
    named = predict_scene(model, called, tmp_path / "map.tif", bands=["x", "y", "z"], **options)
    assert (pixels(named) == expected).all()
    plain = Watched()
    chosen = pixels(predict_scene(plain, whole, tmp_path / "map.tif", bands=["B8A", "B2"], **options))
    assert np.abs(chosen - image[[2, 0]]).max() < 1e-2  # of 4000


def test_modes_gradients_and_device_are_the_models_own_afterwards(scene, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = scene()
    one = pixels(predict_scene(model, path, tmp_path / "one.tif", output="logits", **SMALL))
    two = pixels(predict_scene(model, path, tmp_path / "two.tif", output="logits", **SMALL))
    assert (one == two).all()  # no dropout
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    model.append(Watched(lambda images: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        predict_scene(model, path, tmp_path / "three.tif", **SMALL)
    assert [m.training for m in model] == [True, False, True, True]


def test_what_a_model_keeps_of_a_prediction_can_be_trained_with(scene, tmp_path):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.kept = nn.Conv2d(3, 4, 1), None

        def forward(self, images):
            if self.kept is None:
                self.kept = torch.linspace(0, 1, images.shape[-1])
            return self.conv(images) * self.kept

    model = Keeping()
    predict_scene(model, scene(64, 64), tmp_path / "map.tif", **SMALL)
    model(torch.rand(1, 3, 64, 64)).sum().backward()


def test_mixed_precision_reaches_the_model_and_blending_stays_in_float32(scene, tmp_path):
    types = []
    conv = nn.Conv2d(3, 2, 1)
    network = nn.Sequential(conv, Watched(lambda outputs: types.append(outputs.dtype) or outputs))
    path = scene(80, 80)
    result = predict_scene(network, path, tmp_path / "map.tif", output="probabilities", mixed_precision="bf16", **SMALL)
    assert set(types) == {torch.bfloat16}
    assert np.abs(pixels(result).sum(0) - 1).max() < 1e-6


def test_a_model_in_double_is_given_doubles(scene, tmp_path):
    path = scene(40, 40)
    result = predict_scene(nn.Conv2d(3, 2, 1).double(), path, tmp_path / "map.tif", **SMALL)
    assert pixels(result).shape == (1, 40, 40)


def test_a_raster_without_georeference_gives_a_map_without(tmp_path, recwarn):
    profile = {"driver": "GTiff", "height": 40, "width": 50, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "plain.tif", "w", **profile) as plain:
        plain.write(np.ones((3, 40, 50), np.uint8))
    recwarn.clear()
    result = predict_scene(nn.Conv2d(3, 2, 1), tmp_path / "plain.tif", tmp_path / "map.tif", **SMALL)
    assert not recwarn.list
    with rasterio.open(result) as dataset:
        assert dataset.crs is None
        assert dataset.shape == (40, 50)
