"""Chips: which windows, what is in a sample, and that both are functions of the seed."""

import pickle
import subprocess
import sys
from collections import Counter
from itertools import product

import numpy as np
import pytest
import rasterio
import torch
from torch.utils.data import DataLoader, default_collate

from ununennium.data import Chips, Scene, Window, _focus, block_split
from ununennium.data._places import Places
from ununennium.training.loading import EpochLoader

H, W = 50, 67


@pytest.fixture
def values(draws):
    return draws.integers(1, 60_000, (3, H, W)).astype(np.uint16)


@pytest.fixture
def labels(draws):
    return draws.integers(0, 4, (H, W)).astype(np.uint8)


@pytest.fixture
def scene(raster, values, labels):
    return Scene(raster("image.tif", values, bands=("B02", "B03", "B8A")), raster("label.tif", labels))


def cut(array, window):
    row, col, height, width = window
    return array[..., row : row + height, col : col + width]


# ------------------------------------------------------------------ grids


@pytest.mark.parametrize(("size", "stride"), [(16, None), (16, 10), ((20, 8), (7, 8)), (50, 50), (H, 13), (16, 30)])
def test_a_grid_ends_at_the_edges_and_covers_every_pixel(scene, size, stride):
    chips = Chips(scene, size, stride=stride)
    height, width = size if isinstance(size, tuple) else (size, size)
    down, right = (height, width) if stride is None else stride if isinstance(stride, tuple) else (stride, stride)
    rows = sorted({*range(0, H - height + 1, down), H - height})
    cols = sorted({*range(0, W - width + 1, right), W - width})
    assert chips.windows == [(0, Window(row, col, height, width)) for row, col in product(rows, cols)]
    assert len(chips) == len(chips.windows)
    covered = np.zeros((H, W), bool)
    for _, window in chips.windows:
        cut(covered, window)[:] = True
    assert covered.all() or down > height


def test_a_sample(scene, values, labels):
    chips = Chips(scene, 16)
    for index, (_, window) in enumerate(chips.windows):
        sample = chips[index]
        assert set(sample) == {"image", "mask", "transform", "bounds", "window"}
        assert (sample["image"].dtype, sample["mask"].dtype) == (torch.uint16, torch.int64)
        np.testing.assert_array_equal(sample["image"].numpy(), cut(values, window))
        np.testing.assert_array_equal(sample["mask"].numpy(), cut(labels, window))
        assert sample["window"].tolist() == [0, *window]
        left, top = 500_000 + 10 * window.col, 5_000_000 - 10 * window.row
        assert sample["transform"].tolist() == [10, 0, left, 0, -10, top]
        assert sample["bounds"].tolist() == [left, top - 160, left + 160, top]
        assert sample["transform"].dtype == sample["bounds"].dtype == torch.float64
    batch = default_collate([chips[0], chips[-1]])
    assert (batch["image"].shape, batch["mask"].shape) == ((2, 3, 16, 16), (2, 16, 16))
    assert batch["image"].dtype == torch.uint16
    for index in (len(chips), -len(chips) - 1):
        with pytest.raises(IndexError):
            chips[index]


def test_bounds_of_a_turned_grid(raster, values):
    turned = rasterio.Affine(8, 3, 500_000, 2, -9, 5_000_000)
    sample = Chips(Scene(raster("image.tif", values, transform=turned)), (10, 20), stride=10)[9]
    _, row, col, height, width = sample["window"].tolist()
    corners = [
        (8 * x + 3 * y + 500_000, 2 * x - 9 * y + 5_000_000) for x in (col, col + width) for y in (row, row + height)
    ]
    xs, ys = zip(*corners, strict=True)
    assert sample["bounds"].tolist() == [min(xs), min(ys), max(xs), max(ys)]
    assert "mask" not in sample


def test_a_scene_smaller_than_a_chip_is_padded(scene, values, labels):
    for options in ({}, {"length": 3}):
        chips = Chips(scene, (64, 80), fill=9, ignore_index=-1, **options)
        sample = chips[0]
        assert sample["window"].tolist() == [0, 0, 0, 64, 80]
        wanted, mask = np.full((3, 64, 80), 9), np.full((64, 80), -1)
        wanted[:, :H, :W], mask[:H, :W] = values, labels
        np.testing.assert_array_equal(sample["image"].numpy(), wanted)
        np.testing.assert_array_equal(sample["mask"].numpy(), mask)


def test_bands_are_found_by_name_in_each_scene(raster, scene, values, draws):
    other = draws.integers(1, 99, (3, H, W)).astype(np.uint8)
    second = Scene(
        raster("o.tif", other, bands=("b8a", "B2", "B4"), origin=(1e5, 1e6)),
        scene.label and raster("l.tif", other[0], origin=(1e5, 1e6)),
    )
    chips = Chips([scene, second], 16, bands=["B8A", "B02"])
    assert chips.bands == ("B8A", "B02")
    assert chips.dtype == np.uint16
    first, last = chips[0], chips[-1]
    np.testing.assert_array_equal(first["image"].numpy(), values[[2, 0], :16, :16])
    assert last["window"].tolist() == [1, H - 16, W - 16, 16, 16]
    assert last["image"].dtype == torch.uint16
    np.testing.assert_array_equal(last["image"].numpy(), other[:2, -16:, -16:])
    assert Chips(scene, 16, bands=[1]).bands == ("B03",)
    with pytest.raises(ValueError, match=r"o\.tif: 3 bands.* has no band 'B03'; its bands are b8a, B2, B4"):
        Chips([scene, second], 16)


# ------------------------------------------------------------------ no data, and classes


def test_no_data_in_image_or_label_is_filled_and_ignored(raster, draws):
    values = draws.integers(0, 5, (2, H, W)).astype(np.int16)
    labels = draws.integers(0, 5, (H, W)).astype(np.uint8)
    scene = Scene(raster("image.tif", values, nodata=0), raster("label.tif", labels, nodata=4))
    known = (values != 0).all(axis=0)
    sample = Chips(scene, (H, W), fill=-7, ignore_index=99, ignore_values=(1,))[0]
    np.testing.assert_array_equal(sample["image"].numpy(), np.where(known, values, -7))
    np.testing.assert_array_equal(sample["mask"].numpy(), np.where(known & (labels != 4) & (labels != 1), labels, 99))
    one = Chips(scene, (H, W), bands=[1], fill=-7)[0]
    np.testing.assert_array_equal(one["mask"].numpy() == 255, (values[1] == 0) | (labels == 4))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_label_values_become_targets(raster, draws, dtype):
    numbers = np.array([7, 3, 100, 12, 99, 0])
    labels = draws.choice(numbers[:5], (H, W)).astype(dtype)
    scene = Scene(raster("image.tif", np.ones((1, H, W), np.uint8)), raster("label.tif", labels, nodata=12))
    chips = Chips(scene, (H, W), classes={7: "water", 3: "rock", 100: "ice", 0: "none"}, ignore_values=(99,))
    wanted = np.full((H, W), 255)
    for target, value in enumerate((7, 3, 100)):
        wanted[labels == value] = target
    np.testing.assert_array_equal(chips[0]["mask"].numpy(), wanted)
    assert (chips.class_names, chips.class_values) == (("water", "rock", "ice", "none"), (7, 3, 100, 0))
    assert (chips.num_classes, chips.ignore_index, chips.fill) == (4, 255, 0)


def test_negative_label_values(raster):
    labels = np.full((H, W), -5, np.int16)
    labels[0, :2] = 3, -32768
    scene = Scene(raster("image.tif", np.ones((1, H, W), np.uint8)), raster("label.tif", labels))
    mask = Chips(scene, (H, W), classes={-5: "a", 3: "b"}, ignore_index=-100, ignore_values=(-32768,))[0]["mask"]
    assert mask[0, :3].tolist() == [1, -100, 0]


def test_the_ignore_index_as_a_label_is_unlabelled_unless_it_is_a_class(raster, scene):
    labels = np.full((H, W), 255, np.uint8)
    scene = Scene(scene.image, raster("other.tif", labels))
    assert (Chips(scene, 16, classes=["a", "b"])[0]["mask"] == 255).all()
    assert (Chips(scene, 16, classes={255: "a", 1: "b"})[0]["mask"] == 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_a_label_outside_the_classes_names_file_pixel_and_value(raster, labels, dtype):
    labels = labels.astype(dtype)
    labels[40, 33] = 77
    scene = Scene(raster("image.tif", np.ones((1, H, W), np.uint8)), raster("label.tif", labels))
    chips = Chips(scene, 16, classes=["a", "b", "c", "d"])
    text = (r"label\.tif: the label at row 40, column 33 is 77, which is none of the classes \(0, 1, 2, 3\) \(window "
            r"\(32, 32, 16, 16\)\): name it in classes, or ignore it with ignore_values \[77\]")  # fmt: skip
    with pytest.raises(ValueError, match=text):
        [chips[index] for index in range(len(chips))]
    Chips(scene, (H, W), classes=["a", "b", "c", "d"], ignore_values=(77,))[0]


def test_labels_without_classes_stay_as_they_are(scene, labels):
    chips = Chips(scene, (H, W))
    np.testing.assert_array_equal(chips[0]["mask"].numpy(), labels)
    assert chips.class_names is chips.class_values is chips.num_classes is None


# ------------------------------------------------------------------ random windows


def test_positions_are_numbered_one_by_one():
    places = Places((9, 12), (4, 5), None)
    assert [places.at(number) for number in range(places.count)] == list(product(range(6), range(8)))


def test_random_windows_are_uniform_over_all_positions(raster, draws):
    ones = np.ones((1, 9, 8), np.uint8)
    small = Scene(raster("a.tif", ones))
    wide = Scene(raster("b.tif", np.ones((1, 7, 12), np.uint8)))
    chips = Chips([small, wide], (6, 7), length=4000)
    torch.manual_seed(0)
    seen = Counter(tuple(chips[n]["window"].tolist()[:3]) for n in range(4000))
    places = {(0, r, c) for r, c in product(range(4), range(2))} | {(1, r, c) for r, c in product(range(2), range(6))}
    assert set(seen) == places
    wanted = 4000 / len(places)
    assert sum((count - wanted) ** 2 / wanted for count in seen.values()) < 45  # 19 degrees of freedom: p < 0.001
    assert chips.windows is None


def epoch(chips, workers, number=0, start=0):
    loader = EpochLoader(DataLoader(chips, 4, shuffle=True, num_workers=workers), stream=0)
    return [loaded.batch for loaded in loader.epoch(3, number, start)]


@pytest.mark.parametrize("options", [{"length": 22}, {"length": 22, "focus": 0.5, "min_valid": 0.6}, {"stride": 20}])
def test_the_trainers_loader_gives_the_same_bytes_with_any_number_of_workers(raster, draws, values, labels, options):
    values[:, :20, :30] = 0
    scene = Scene(raster("n.tif", values, nodata=0), raster("label.tif", labels))
    chips = Chips(scene, 16, transform=add_noise, **options)
    none, two = epoch(chips, 0), epoch(chips, 2)
    assert len(none) == len(two) == -(-len(chips) // 4)
    for one, other in zip(none, two, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    late = epoch(chips, 0, start=3)
    assert all(torch.equal(one[key], other[key]) for one, other in zip(none[3:], late, strict=True) for key in one)
    again = torch.cat([batch["window"] for batch in epoch(chips, 0, number=1)])
    assert not torch.equal(torch.cat([batch["window"] for batch in none]), again)


def add_noise(sample):
    return sample | {"noise": torch.rand(2)}


def test_chips_travel_to_workers_of_any_kind(scene):
    chips = Chips(scene, 16, length=8, focus=0.5)
    twin = pickle.loads(pickle.dumps(chips))
    for each in (chips, twin):
        torch.manual_seed(1)
        each.seen = [each[n] for n in range(8)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(chips.seen, twin.seen, strict=True) for k in a)


# ------------------------------------------------------------------ enough valid pixels


@pytest.fixture
def patchy(raster, draws):
    """A scene that has data on the left and labels at the top, and both as arrays."""
    values = draws.integers(1, 99, (2, H, W)).astype(np.uint8)
    values[1, :, 40:] = 0
    labels = draws.integers(0, 3, (H, W)).astype(np.uint8)
    labels[25:] = 255
    scene = Scene(raster("image.tif", values, nodata=0), raster("label.tif", labels, nodata=255))
    known = np.zeros((H, W), bool)
    known[:25, :40] = True
    return scene, known


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_chips_of_a_grid_with_too_few_valid_pixels_are_left_out(patchy, share):
    scene, known = patchy
    every = Chips(scene, 16, stride=5).windows
    kept = Chips(scene, 16, stride=5, min_valid=share).windows
    assert kept == [each for each in every if cut(known, each[1]).mean() >= share]
    assert 0 < len(kept) < len(every)
    unlabelled = Chips(Scene(scene.image), 16, stride=5, min_valid=share).windows
    assert unlabelled == [each for each in every if np.pad(known, 0)[0, each[1].col : each[1].col + 16].mean() >= share]


def test_random_chips_with_too_few_valid_pixels_are_drawn_anew(patchy):
    scene, _ = patchy
    torch.manual_seed(0)
    chips = Chips(scene, 16, length=60, min_valid=0.5)
    shares = [(chips[n]["mask"] != 255).float().mean().item() for n in range(60)]
    assert min(shares) >= 0.5
    whole = Chips(scene, (30, 50), length=20, min_valid=1.0)  # none is: the best of each twenty
    best = [(whole[n]["mask"] != 255).float().mean().item() for n in range(20)]
    plain = Chips(scene, (30, 50), length=20)
    assert np.mean(best) > np.mean([(plain[n]["mask"] != 255).float().mean().item() for n in range(20)]) + 0.05


# ------------------------------------------------------------------ classes in focus


@pytest.fixture
def rare(raster):
    """Class 0 all over, class 1 in two corners, class 2 at one pixel."""
    labels = np.zeros((H, W), np.uint8)
    labels[:2, :3] = labels[-1, -1] = 1
    labels[30, 40] = 2
    return Scene(raster("image.tif", np.ones((1, H, W), np.uint8)), raster("label.tif", labels)), labels


def test_a_class_in_focus_is_in_the_chip_wherever_it_lies_in_it(rare):
    scene, _ = rare
    chips = Chips(scene, 8, length=400, focus=1.0, focus_classes=["c"], classes=["a", "b", "c"])
    torch.manual_seed(0)
    seen = Counter()
    for number in range(400):
        sample = chips[number]
        assert (sample["mask"] == 2).sum() == 1
        seen[tuple(sample["window"][1:3].tolist())] += 1
    assert set(seen) <= set(product(range(23, 31), range(33, 41)))
    assert len(seen) > 60  # of 64
    corner = Chips(scene, 8, length=50, focus=1.0, focus_classes=[1])
    assert {tuple(corner[n]["window"][1:3].tolist()) for n in range(50)} >= {(0, 0), (H - 8, W - 8)}


def test_classes_in_focus_are_equally_likely_and_as_often_as_asked(rare):
    scene, _ = rare
    torch.manual_seed(0)
    chips = Chips(scene, 8, length=1500, focus=0.6)
    present = np.mean([[(chips[n]["mask"] == k).any().item() for k in range(3)] for n in range(1500)], axis=0)
    assert abs(present[2] - (0.2 + 0.4 * 64 / (43 * 60))) < 0.04
    assert abs(present[1] - (0.2 + 0.4 * 7 / (43 * 60))) < 0.04
    plain = Chips(scene, 8, length=1500)
    assert np.mean([(plain[n]["mask"] == 2).any().item() for n in range(1500)]) < 0.06


def test_the_sample_of_a_classs_pixels_is_uniform_and_bounded(raster, draws, monkeypatch):
    monkeypatch.setattr(_focus, "PIXELS_A_CLASS", 300)
    monkeypatch.setattr("ununennium.data.scene._STRIP", (16, 24))
    labels = (draws.random((H, W)) < 0.9).astype(np.uint8)
    scene = Scene(raster("image.tif", np.ones((1, H, W), np.uint8)), raster("label.tif", labels))
    chips = Chips(scene, 8, length=1, focus=1.0)
    assert chips._pixels[0].shape == (min(300, (labels == 0).sum()), 3)
    assert chips._pixels[1].shape == (300, 3)
    for target, pixels in chips._pixels.items():
        assert len(np.unique(pixels, axis=0)) == len(pixels)
        assert (labels[pixels[:, 1], pixels[:, 2]] == target).all()
    rows, cols = chips._pixels[1][:, 1] < H / 2, chips._pixels[1][:, 2] < W / 2
    assert all(abs((rows == a).sum() + 0 - 150) < 45 for a in (True, False))
    assert abs(cols.mean() - 0.5) < 0.12


def test_focus_stays_in_its_region(rare):
    scene, _ = rare
    split = block_split(scene, {"a": 0.5, "b": 0.5}, block=10, buffer=2, seed=1)
    for part in split:
        chips = Chips(scene, 6, region=split[part], length=60, focus=1.0)
        grid = {window[:2] for _, window in every_window(scene, 6, split[part])}
        for number in range(60):
            sample = chips[number]
            assert tuple(sample["window"][1:3].tolist()) in grid
        assert (2 in chips._focused) == any(0 <= 30 - row < 6 and 0 <= 40 - col < 6 for row, col in grid)


def every_window(scene, size, region):
    return Chips(scene, size, stride=1, region=region).windows + [
        (0, Window(*Places(scene.shape, (size, size), region.blocks_of(scene)).at(n), size, size))
        for n in range(Places(scene.shape, (size, size), region.blocks_of(scene)).count)
    ]


# ------------------------------------------------------------------ what is refused


def test_errors(scene, raster, rare):
    named = {"classes": ["a", "b", "c", "d"]}
    for options, text in (
        ({"stride": 8, "length": 5}, "give stride, .*, or length, .*, not both"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"stride": (4, 4, 4)}, r"stride must be a number of pixels, or a pair of them, got \(4, 4, 4\)"),
        ({"fill": -1}, r"fill=-1 is no value of the rasters' type, uint16"),
        ({"fill": 0.5}, "fill=0.5 is no value"),
        ({"min_valid": 1.5}, "min_valid must be a share, from 0 to 1, got 1.5"),
        ({"focus": 0.5}, "focus is for chips at random: give their number with length=…"),
        ({"focus": 0.5, "length": 3, "focus_classes": ["e"], **named}, "has 'e', which is no class: there are a"),
        ({"focus": 0.5, "length": 3, "focus_classes": [9]}, "no chip can have a pixel of class 9"),
        ({"focus": 0.5, "length": 3, "focus_classes": ["a"]}, "has 'a', which is no class: none are named"),
        ({"classes": []}, "classes is empty"),
        ({"classes": "ab"}, "a mapping of values to names, or a sequence of names, got 'ab'"),
        ({"classes": ["a", "a"]}, r"classes has a name twice: \['a', 'a'\]"),
        ({"ignore_index": 1, **named}, r"ignore_index=1 is also the target of class 'b': choose one that"),
        ({"ignore_values": (2,), **named}, "label value 2 is a class and in ignore_values"),
        ({"bands": ["red"]}, r"has no band 'red'; its bands are B02, B03, B8A"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            Chips(scene, 16, **options)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Chips(scene, 0)
    with pytest.raises(ValueError, match=r"there is no scene: pass one or several, as Scene\(image, label\)"):
        Chips([], 16)
    with pytest.raises(TypeError, match=r"must be of type Scene, got 'a\.tif': write Scene\(image, label\)"):
        Chips(["a.tif"], 16)
    with pytest.raises(ValueError, match=r"image\.tif: 3 bands.* has a label, and .* has none"):
        Chips([Scene(scene.image), scene], 16)
    with pytest.raises(ValueError, match="focus needs scenes with labels"):
        Chips(Scene(scene.image), 16, length=3, focus=0.5)
    empty = Scene(raster("e.tif", np.zeros((1, H, W), np.uint8), nodata=0), raster("el.tif", np.ones((H, W), np.uint8)))
    with pytest.raises(
        ValueError, match=r"no chip of 16 x 16 pixels is valid in a share of 0\.5 of its pixels: lower min_valid"
    ):
        Chips(empty, 16, min_valid=0.5)
    with pytest.raises(ValueError, match=r"no chip can have a labelled pixel, .*: leave focus out"):
        Chips(empty, 16, length=3, focus=0.5)


def test_importing_is_light():
    code = (
        "import sys, torch, numpy; before = set(sys.modules)\n"
        "import ununennium.data\n"
        "new = set(sys.modules) - before\n"
        "print(*[m for m in new if m.split('.')[0] in ('rasterio', 'affine', 'scipy', 'pandas')"
        " or m.startswith(('ununennium.training', 'ununennium.models', 'ununennium.prediction'))])\n"
        "print(sorted(ununennium.data.__all__))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, exported = run.stdout.split("\n")[:2]
    assert heavy == ""
    assert exported == str(
        ["BandStatistics", "Chips", "Region", "Scene", "Split", "Window", "band_statistics", "block_split"]
    )


@pytest.mark.parametrize("stride", [None, 5, 3])
def test_a_pixel_that_is_to_count_once_has_one_target(raster, draws, stride):
    labels = draws.integers(0, 3, (23, 30)).astype(np.uint8)
    scene = Scene(raster("a.tif", labels), raster("l.tif", labels))
    split = block_split([scene], {"a": 0.5, "b": 0.5}, 9)
    for region in (None, split["a"]):
        chips = Chips([scene, scene], 7, stride=stride, classes=["x", "y", "z"], once=True, region=region)
        usual = Chips([scene, scene], 7, stride=stride, classes=["x", "y", "z"], region=region)
        times, held = np.zeros((2, 2, 23, 30), int)
        for index, (number, window) in enumerate(chips.windows):
            place = np.s_[number, window.row : window.row + 7, window.col : window.col + 7]
            times[place] += chips[index]["mask"].numpy() != 255
            held[place] = 1
            assert torch.equal(chips[index]["image"], usual[index]["image"])
            assert torch.equal(chips[index - len(chips)]["mask"], chips[index]["mask"])
        assert np.array_equal(times, held)
    with pytest.raises(ValueError, match=r"once is for chips on a grid, .*: leave once or length out"):
        Chips(scene, 7, length=3, once=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 16.0}, "size must be an integer of at least 1, got 16.0"),
        ({"size": (16, True)}, "size must be an integer of at least 1, got True"),
        ({"size": "16"}, "size must be an integer of at least 1, got '1'"),
        ({"stride": 2.7}, "stride must be an integer of at least 1, got 2.7"),
        ({"length": 2.7}, "length must be an integer of at least 1, got 2.7"),
        ({"length": True}, "length must be an integer of at least 1, got True"),
        ({"ignore_index": 254.9}, "ignore_index must be an integer, got 254.9"),
        ({"ignore_values": [1.9]}, "a label value in ignore_values must be an integer, got 1.9"),
        ({"classes": {1.9: "water"}}, "a label value in classes must be an integer, got 1.9"),
        ({"classes": {True: "water"}}, "a label value in classes must be an integer, got True"),
        ({"focus": 0.5, "length": 3, "focus_classes": [2.7]}, "a label value in focus_classes must be an integer"),
        ({"bands": [1.9]}, "a band's place must be an integer, got 1.9"),
        ({"bands": [True]}, "a band's place must be an integer, got True"),
    ],
)
def test_what_counts_is_an_integer(options, text, scene):
    with pytest.raises(TypeError, match=text):
        Chips(scene, **{"size": 16, **options})


def test_numpy_integers_are_integers(scene):
    names = {np.uint8(value): f"class {value}" for value in range(4)}
    options = {"bands": [np.int32(1)], "classes": names, "ignore_index": np.uint8(255), "ignore_values": np.array([4])}
    chips = Chips(scene, (np.int64(8), 16), stride=np.uint8(8), **options)
    assert chips.size == (8, 16)
    assert chips.bands == scene.bands[1:2]
    assert chips.class_values == (0, 1, 2, 3)
    assert chips.ignore_index == 255
    assert len(Chips(scene, np.array([8, 8]), length=np.int16(5), **options)) == 5
