"""Scenes: what is read where, from one file and from several, and what is refused."""

import json
import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import rasterio
import timm
import torch
from safetensors.torch import save_file

from ununennium.data import Scene, Window, _files
from ununennium.data._files import open_raster, version_of
from ununennium.models import create_model

EVERYWHERE = [Window(0, 0, 30, 40), Window(3, 5, 7, 9), Window(-4, -6, 12, 13), Window(25, 35, 20, 20),
              Window(-5, -5, 60, 70), Window(100, 3, 4, 4), Window(-9, 0, 9, 5)]  # fmt: skip


def expected(values, known, window):
    """Cut a window out of whole arrays, by padding them."""
    pad = 200
    row, col = window.row + pad, window.col + pad
    cut = (slice(row, row + window.height), slice(col, col + window.width))
    image = np.pad(values, ((0, 0), (pad, pad), (pad, pad)))[:, *cut]
    return image, np.pad(known, pad)[cut]


@pytest.mark.parametrize("window", EVERYWHERE)
def test_windows_of_one_file_inside_across_and_outside(raster, draws, window):
    values = draws.integers(1, 60_000, (3, 30, 40)).astype(np.uint16)
    scene = Scene(raster("image.tif", values, tile=16))
    for bands in (None, (0,), (2, 0), (1, 1, 2)):
        image, valid = scene.read(window, bands)
        chosen = values if bands is None else values[list(bands)]
        wanted, known = expected(chosen, np.ones((30, 40), bool), window)
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(image, wanted)
        np.testing.assert_array_equal(valid, known)


def test_what_a_scene_tells_of_itself(raster, draws):
    values = draws.integers(0, 9, (2, 30, 40)).astype(np.int16)
    path = raster("image.tif", values, nodata=-1, bands=("red", "nir"))
    scene = Scene(path)
    assert (scene.shape, scene.dtype, scene.nodata, scene.bands) == ((30, 40), np.int16, -1, ("red", "nir"))
    assert (scene.image, scene.label, scene.crs.to_epsg()) == ((str(path),), None, 32633)
    assert tuple(scene.transform)[:6] == (10, 0, 500_000, 0, -10, 5_000_000)
    assert repr(scene) == f"Scene({path}: 2 bands, 30 x 40, int16)"


# ------------------------------------------------------------------ what has data


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_a_pixel_is_valid_where_every_band_that_is_read_has_data(raster, draws, dtype):
    values = draws.integers(0, 4, (3, 30, 40)).astype(dtype)
    scene = Scene(raster("image.tif", values, nodata=2))
    for bands in ((0, 1, 2), (1,), (0, 2)):
        _, valid = scene.read(Window(0, 0, 30, 40), bands)
        np.testing.assert_array_equal(valid, (values[list(bands)] != 2).all(axis=0))


def test_nan_and_infinity_are_no_data(raster, draws, close_rasters):
    values = draws.normal(size=(2, 30, 40)).astype(np.float32)
    values[0, 3, 4], values[1, 5, 6], values[1, 7, 8] = np.nan, np.inf, -np.inf
    for nodata in (None, np.nan):
        image, valid = Scene(raster("image.tif", values, nodata=nodata)).read(Window(0, 0, 30, 40))
        np.testing.assert_array_equal(valid, np.isfinite(values).all(axis=0))
        np.testing.assert_array_equal(image, values)
        close_rasters()


def test_a_nodata_value_that_the_type_rounds(raster):
    values = np.full((1, 30, 40), -3.4e38, np.float32)
    values[0, 0, 0] = 1
    _, valid = Scene(raster("image.tif", values, nodata=float(np.float32(-3.4e38)))).read(Window(0, 0, 30, 40))
    assert valid.sum() == 1


def test_masks_and_alpha_bands(raster, draws):
    values = draws.integers(0, 99, (2, 30, 40)).astype(np.uint8)
    known = draws.random((30, 40)) < 0.7
    masked = Scene(raster("masked.tif", values, mask=known))
    alpha = Scene(raster("alpha.tif", values, alpha=known * np.uint8(255)))
    assert len(alpha.bands) == 2
    for scene in (masked, alpha):
        for window in EVERYWHERE:
            image, valid = scene.read(window)
            wanted, seen = expected(values, known, window)
            np.testing.assert_array_equal(image, wanted)
            np.testing.assert_array_equal(valid, seen)


# ------------------------------------------------------------------ several files


@pytest.fixture
def sentinel(raster, draws):
    """A scene like Sentinel-2's: two bands of 10 m, two of 20 m, one of 60 m, which begins and ends elsewhere."""
    fine = draws.integers(1, 9000, (2, 60, 72)).astype(np.uint16)
    middle = draws.integers(1, 9000, (2, 30, 36)).astype(np.uint16)
    coarse = draws.integers(1, 9000, (1, 9, 12)).astype(np.uint16)
    return (fine, middle, coarse), [
        raster("T33_20260101_B11_20m.tif", middle[0], pixel=20),
        raster("T33_20260101_B02_10m.tif", fine[0]),
        raster("T33_20260101_B8A_20m.tif", middle[1], pixel=20),
        raster("T33_20260101_B04_10m.tif", fine[1]),
        raster("T33_20260101_b01_60m.tif", coarse, pixel=60, origin=(500_000 - 60, 5_000_000)),
    ]


def test_files_of_other_resolutions_are_read_on_the_finest_grid(sentinel):
    (fine, middle, _), paths = sentinel
    scene = Scene(paths, resampling="nearest")
    assert scene.bands == ("B11", "B02", "B8A", "B04", "B01")
    assert (scene.shape, scene.transform.a) == ((60, 72), 10)
    blown_up = np.kron(middle, np.ones((2, 2), np.uint16))
    whole = np.stack([blown_up[0], fine[0], blown_up[1], fine[1]])
    for window in (Window(0, 0, 60, 72), Window(11, 13, 21, 30), Window(-3, 60, 40, 30)):
        image, valid = scene.read(window, (0, 1, 2, 3))
        wanted, known = expected(whole, np.ones((60, 72), bool), window)
        np.testing.assert_array_equal(image, wanted)
        np.testing.assert_array_equal(valid, known)


def test_what_a_coarse_file_does_not_reach_is_invalid(sentinel):
    (_, _, coarse), paths = sentinel
    scene = Scene(paths, resampling="nearest")
    image, valid = scene.read(Window(0, 0, 60, 72), scene.band_indices(["B1"]))
    reached = np.zeros((60, 72), bool)
    reached[:54, :66] = True
    np.testing.assert_array_equal(valid, reached)
    np.testing.assert_array_equal(image[0, :54, :66], np.kron(coarse[0], np.ones((6, 6), np.uint16))[:, 6:])
    assert scene.read(Window(0, 0, 60, 72), (0, 1))[1].all()


def test_bilinear_resampling_keeps_a_slope_and_does_not_depend_on_the_window(raster, draws):
    rows, cols = np.mgrid[:30, :36]
    slope = (100 * rows + 10 * cols).astype(np.float32)
    fine = draws.integers(1, 9000, (60, 72)).astype(np.uint16)
    scene = Scene([raster("a_B02.tif", fine), raster("a_B11.tif", slope, pixel=20)])
    image, valid = scene.read(Window(0, 0, 60, 72))
    rows, cols = (np.mgrid[:60, :72] + 0.5) / 2 - 0.5
    inner = (slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(image[1][inner], (100 * rows + 10 * cols)[inner], rtol=1e-6)
    assert valid.all()
    for _ in range(60):
        row, col = draws.integers(-9, 60, 2).tolist()
        window = Window(row, col, *draws.integers(1, 40, 2).tolist())
        wanted, known = expected(image, valid, window)
        part, seen = scene.read(window)
        np.testing.assert_array_equal(seen, known)
        np.testing.assert_array_equal(part, wanted)


@pytest.mark.parametrize("how", [{"nodata": 7}, {"mask": True}, {"alpha": True}, {"nodata": -9999.0}, {}])
def test_a_resampled_file_has_data_where_it_had(raster, draws, how):
    known = draws.random((30, 36)) < 0.6
    coarse = draws.integers(10, 250, (30, 36)).astype(np.uint8)
    options = dict(how)
    if "mask" in how:
        options["mask"] = known
    elif "alpha" in how:
        options["alpha"] = known * np.uint8(255)
    elif how.get("nodata") == 7:
        coarse[~known] = 7
    else:
        known[:] = True
    if how.get("nodata", 0) < 0:
        path = raster("b.tif", coarse.astype(np.int16), pixel=20, nodata=-9999.0)
    else:
        path = raster("b.tif", coarse, pixel=20, **options)
    fine = raster("a.tif", draws.integers(1, 9, (80, 72)).astype(np.uint8))
    image, valid = Scene([fine, path], resampling="nearest").read(Window(0, 0, 80, 72))
    reached = np.zeros((80, 72), bool)
    reached[:60] = np.kron(known, np.ones((2, 2), bool))
    np.testing.assert_array_equal(valid, reached)
    np.testing.assert_array_equal(
        image[1][valid], np.kron(coarse, np.ones((2, 2), np.uint8))[known.repeat(2, 0).repeat(2, 1)]
    )


def test_another_projection_is_read_on_the_grid(raster):
    from rasterio.warp import transform

    rows, cols = np.mgrid[:40, :40]
    fine = raster("a.tif", np.ones((20, 20), np.uint8), pixel=100)
    (lon,), (lat,) = transform("EPSG:32633", "EPSG:4326", [500_000], [5_000_000])
    other = rasterio.Affine(0.002, 0, lon - 0.01, 0, -0.002, lat + 0.01)
    scene = Scene([fine, raster("b.tif", (50 * rows + cols).astype(np.float32), crs="EPSG:4326", transform=other)])
    image, valid = scene.read(Window(0, 0, 20, 20))
    assert scene.crs.to_epsg() == 32633
    assert valid.all()
    xs, ys = 500_050 + 100 * np.arange(20), np.full(20, 5_000_000 - 550)
    lons, lats = map(np.array, transform("EPSG:32633", "EPSG:4326", xs, ys))
    wanted = 50 * ((lat + 0.01 - lats) / 0.002 - 0.5) + (lons - lon + 0.01) / 0.002 - 0.5
    np.testing.assert_allclose(image[1, 5], wanted, atol=0.05)


def test_types_are_joined_without_loss(raster, draws):
    small = draws.integers(0, 255, (30, 40)).astype(np.uint8)
    signed = draws.integers(-900, 900, (30, 40)).astype(np.int16)
    scene = Scene([raster("a.tif", small, nodata=0), raster("b.tif", signed)])
    image, valid = scene.read(Window(0, 0, 30, 40))
    assert scene.dtype == image.dtype == np.int16
    np.testing.assert_array_equal(image, [small, signed])
    np.testing.assert_array_equal(valid, small != 0)
    assert scene.nodata == 0


# ------------------------------------------------------------------ labels


def test_labels_at_another_resolution_and_grid_are_read_nearest(raster, draws):
    coarse = draws.integers(0, 5, (12, 12)).astype(np.uint8)
    coarse[2, 3] = 255
    image = raster("image.tif", np.ones((1, 30, 40), np.uint8))
    # Pixels of 30 m that begin 30 m west and 60 m south of the image.
    label = raster("label.tif", coarse, pixel=30, origin=(499_970, 4_999_940), nodata=255)
    labels, labelled = Scene(image, label, resampling="cubic").read_label(Window(0, 0, 30, 40))
    wanted, known = np.zeros((30, 40), np.uint8), np.zeros((30, 40), bool)
    for row in range(30):
        for col in range(40):
            i, j = (10 * row + 5 - 60) // 30, (10 * col + 5 + 30) // 30
            if 0 <= i < 12 and 0 <= j < 12 and coarse[i, j] != 255:
                wanted[row, col], known[row, col] = coarse[i, j], True
    np.testing.assert_array_equal(labelled, known)
    np.testing.assert_array_equal(labels[known], wanted[known])


@pytest.mark.parametrize("window", EVERYWHERE)
def test_windows_of_labels(raster, draws, window):
    values = draws.integers(0, 5, (30, 40)).astype(np.int16)
    scene = Scene(raster("image.tif", values), raster("label.tif", values, nodata=3))
    labels, labelled = scene.read_label(window)
    wanted, known = expected(values[None], values != 3, window)
    np.testing.assert_array_equal(labels, wanted[0])
    np.testing.assert_array_equal(labelled, known)
    assert labels.dtype == np.int16


# ------------------------------------------------------------------ names of bands


def test_names_of_bands(raster):
    one, two = np.ones((1, 4, 4), np.uint8), np.ones((2, 4, 4), np.uint8)
    assert Scene(raster("plain.tif", two)).bands == ("B1", "B2")
    assert Scene(raster("LC08_L2SP_SR_B10.tif", one)).bands == ("B10",)
    described = [raster(f"x_B0{n}_10m.tif", one, bands=("Reflectance",)) for n in (2, 3)]
    assert Scene(described).bands == ("B02", "B03")
    mixed = [raster("y.tif", two, bands=("red", "nir")), raster("z.tif", two)]
    assert Scene(mixed).bands == ("red", "nir", "B3", "B4")
    assert Scene(mixed, bands="abcd").bands == ("a", "b", "c", "d")


def test_bands_are_found_whatever_their_case_and_zeros(raster):
    scene = Scene(raster("a.tif", np.ones((3, 4, 4), np.uint8), bands=("B02", "B8A", "B10")))
    assert scene.band_indices() == (0, 1, 2)
    assert scene.band_indices(["b8a", "B2", "b10", 2, "B002"]) == (1, 0, 2, 2, 0)
    for wrong in ("B80A", "B1", "8A", 3, -1):
        with pytest.raises(ValueError, match=r"3 bands.* has no band .*; its bands are B02, B8A, B10"):
            scene.band_indices([wrong])
    with pytest.raises(ValueError, match=r"a sequence of names, got 'B02': write \['B02'\]"):
        scene.band_indices("B02")


@pytest.mark.parametrize(("named", "asked"), [("B8A", "B08A"), ("B02_20m", "b2_20M"), ("10m B02", "10m B2")])
def test_a_band_that_a_scene_finds_is_one_that_weights_know(named, asked, raster, tmp_path):
    scene = Scene(raster("a.tif", np.ones((2, 4, 4), np.uint8), bands=("B1", named)))
    assert scene.band_indices([asked]) == (1,)
    with pytest.raises(ValueError, match="more than one band is called"):
        Scene(raster("b.tif", np.ones((2, 4, 4), np.uint8)), bands=[named, asked])
    encoder = timm.create_model("test_resnet", in_chans=2)
    save_file(encoder.state_dict(), tmp_path / "a.safetensors", {"model": json.dumps({"bands": scene.bands})})
    model = create_model("test_resnet", 1, 1000, tmp_path / "a.safetensors", [asked])
    first = next(name for name, values in encoder.named_parameters() if values.ndim == 4)
    assert torch.equal(model.state_dict()[first][:, 0], encoder.state_dict()[first][:, 1])
    with pytest.raises(ValueError, match="are both"):
        create_model("test_resnet", 2, 3, bands=[named, asked])


def test_wavelengths_keep_the_zeros_of_their_fractions(raster):
    scene = Scene(raster("a.tif", np.ones((2, 4, 4), np.uint8), bands=("650.05 nm", "650.5 nm")))
    assert scene.band_indices(["650.5 nm", "650.05 nm"]) == (1, 0)


# ------------------------------------------------------------------ what is refused


def test_errors_name_the_file_and_the_remedy(raster, tmp_path):
    ones = np.ones((2, 4, 4), np.uint8)
    good, one = raster("good.tif", ones), raster("one.tif", ones[:1])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tif: there is no such file: correct the path"):
        Scene(tmp_path / "nowhere.tif")
    with pytest.raises(FileNotFoundError, match=f"^nowhere.tif: there is no such file in {Path.cwd()}: correct"):
        Scene("nowhere.tif")
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(OSError, match=r"text\.tif: can't be read as a raster"):
        Scene(tmp_path / "text.tif")
    with pytest.raises(ValueError, match="image names no file: a scene needs one"):
        Scene([])
    with pytest.raises(
        ValueError, match=r"good\.tif has 2 bands: a label raster has one, each pixel's class: take that out"
    ):
        Scene(good, good)
    with pytest.raises(
        ValueError, match=r"float\.tif holds values of type float32: a label raster holds integers, .*: convert it"
    ):
        Scene(good, raster("float.tif", ones[:1].astype(np.float32)))
    with pytest.raises(
        ValueError, match=r"complex\.tif holds values of type complex64: convert it to integers or real"
    ):
        Scene(raster("complex.tif", ones[:1].astype(np.complex64)))
    with pytest.raises(ValueError, match=r"good\.tif: 2 bands.*: bands has 1 names, \['a'\]: name each band once"):
        Scene(good, bands=["a"])
    with pytest.raises(ValueError, match=r"more than one band is called 'B1' or 'b01': give each a name of its own$"):
        Scene(good, bands=["B1", "b01"])
    with pytest.raises(ValueError, match=r"more than one band is called 'red': give each a name of its own, bands="):
        Scene([raster("r1.tif", ones, bands=("red", "x")), raster("r2.tif", ones, bands=("red", "y"))])
    with pytest.raises(ValueError, match=r"resampling must be one of .*, got 'smooth'"):
        Scene(good, resampling="smooth")
    with pytest.raises(ValueError, match=r"one\.tif: 1 bands.* has no label: make it with Scene\(image, label\)"):
        Scene(one).read_label(Window(0, 0, 2, 2))


def test_files_without_georeference_need_one_grid(raster):
    plain = rasterio.Affine.identity()
    first = raster("a.tif", np.full((1, 4, 4), 1, np.uint8), crs=None, transform=plain)
    second = raster("b.tif", np.full((1, 4, 4), 2, np.uint8), crs=None, transform=plain)
    np.testing.assert_array_equal(Scene([first, second], bands="ab").read(Window(0, 0, 1, 1))[0].ravel(), [1, 2])
    third = raster("c.tif", np.ones((1, 5, 4), np.uint8), crs=None, transform=plain)
    with pytest.raises(
        ValueError, match=r"c\.tif has no coordinate reference system and lies on another grid than .*a"
    ):
        Scene([first, third])
    placed = raster("d.tif", np.ones((1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"a\.tif has no coordinate reference system .*give it one"):
        Scene(placed, first)


def test_files_of_other_places_are_refused(raster):
    ones = np.ones((1, 4, 4), np.uint8)
    here, there = raster("a.tif", ones), raster("b.tif", ones, origin=(600_000, 5_000_000), pixel=20)
    for arguments in (([here, there],), (here, there)):
        with pytest.raises(ValueError, match=r"b\.tif does not overlap .*a\.tif: name rasters of one place"):
            Scene(*arguments)
    touching = raster("c.tif", ones, origin=(500_040, 5_000_000))
    with pytest.raises(ValueError, match="does not overlap"):
        Scene(here, touching)


def test_a_damaged_file_is_named_with_the_window(raster, draws, close_rasters):
    path = raster("a.tif", draws.integers(0, 255, (1, 64, 64)).astype(np.uint8), tile=16)
    scene = Scene(path)
    close_rasters()
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 300)
    assert scene.read(Window(0, 0, 16, 16))[1].all()
    with pytest.raises(OSError, match=r"a\.tif: rows 40 to 60, columns 50 to 60 can't be read: "):
        scene.read(Window(40, 50, 20, 10))


# ------------------------------------------------------------------ handles


def handle_of(scene):
    return open_raster(scene.image[0], version=version_of(scene.image[0]))


def test_a_file_that_was_written_anew_is_read_anew(raster):
    first = Scene(raster("a.tif", np.ones((1, 8, 8), np.uint8)))
    assert first.read(Window(0, 0, 8, 8))[0].sum() == 64
    second = Scene(raster("a.tif", np.full((1, 9, 9), 2, np.uint8)))
    assert second.shape == (9, 9)
    assert second.read(Window(0, 0, 9, 9))[0].sum() == 162


def test_descriptions_that_repeat_are_no_names(raster):
    assert Scene(raster("a.tif", np.ones((2, 8, 8), np.uint8), bands=["value", "value"])).bands == ("B1", "B2")


def child(scene, window, queue, parents):
    queue.put((scene.read(window)[0].sum(), id(handle_of(scene)) == parents))


def test_a_forked_process_opens_files_of_its_own(raster, draws):
    scene = Scene(raster("a.tif", draws.integers(0, 99, (1, 30, 40)).astype(np.uint8)))
    window = Window(2, 3, 9, 9)
    total = scene.read(window)[0].sum()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(scene, window, queue, id(handle_of(scene))))
    process.start()
    assert queue.get(timeout=60) == (total, False)
    process.join()
    assert scene.read(window)[0].sum() == total


def test_threads_open_files_of_their_own_and_keep_them(raster, draws, close_rasters):
    values = draws.integers(0, 99, (1, 64, 64)).astype(np.uint8)
    scene = Scene(raster("a.tif", values, tile=16))
    handles, wrong = [handle_of(scene)], []

    def work(seed):
        mine = handle_of(scene)
        handles.append(mine)
        for row, col in np.random.default_rng(seed).integers(0, 50, (200, 2)).tolist():
            image, _ = scene.read(Window(row, col, 14, 14))
            if not np.array_equal(image, values[:, row : row + 14, col : col + 14]):
                wrong.append((row, col))
        if handle_of(scene) is not mine:
            wrong.append("handle")
        close_rasters()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(set(map(id, handles))) == 4


def test_a_scene_is_pickled_without_handles(raster, draws):
    values = draws.integers(0, 99, (2, 30, 40)).astype(np.uint8)
    scene = Scene(raster("a.tif", values), raster("label.tif", values[0]))
    scene.read(Window(0, 0, 5, 5))
    twin = pickle.loads(pickle.dumps(scene))
    np.testing.assert_array_equal(twin.read(Window(0, 0, 30, 40))[0], values)
    np.testing.assert_array_equal(twin.read_label(Window(0, 0, 30, 40))[0], values[0])
    assert twin.bands == scene.bands


def test_no_more_files_are_open_than_allowed(raster, monkeypatch):
    monkeypatch.setattr(_files, "OPEN_FILES", 3)
    scenes = [Scene(raster(f"{n}.tif", np.full((1, 4, 4), n, np.uint8))) for n in range(6)]
    for _ in range(2):
        for number, scene in enumerate(scenes):
            assert (scene.read(Window(0, 0, 4, 4))[0] == number).all()
    assert len(_files._handles.files) == 3


def cache_limit(path, user, queue):
    from rasterio._env import get_gdal_config

    if user:
        with rasterio.Env(GDAL_CACHEMAX=2**29):
            Scene(path)
            queue.put(int(get_gdal_config("GDAL_CACHEMAX")))
    else:
        Scene(path)
        queue.put(int(get_gdal_config("GDAL_CACHEMAX")))


@pytest.mark.parametrize("user", [False, True])
def test_gdals_cache_is_bounded_in_each_process_unless_the_user_does_it(raster, user):
    path = raster("a.tif", np.ones((1, 4, 4), np.uint8))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=cache_limit, args=(path, user, queue))
    process.start()
    limit = queue.get(timeout=60)
    process.join()
    assert limit == 2**29 if user else limit <= _files.CACHE_BYTES
