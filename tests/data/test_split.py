"""Spatial splits: distances between all windows, balance of classes, what is kept and refused."""

import json
import pickle
from itertools import combinations, product

import numpy as np
import pytest
import rasterio
import torch

from ununennium.data import Chips, Region, Scene, Split, band_statistics, block_split
from ununennium.data._places import Places

PARTS = {"train": 0.5, "val": 0.25, "test": 0.25}


@pytest.fixture
def make(raster):
    """Return a function that makes scenes of labels, at a row and column of the first one's grid."""

    def scene(name, labels, at=(0, 0), **options):
        origin = (500_000 + 10 * at[1], 5_000_000 - 10 * at[0])
        image = raster(f"{name}/image.tif", labels.astype(np.uint8), origin=origin, **options)
        return Scene(image, raster(f"{name}/label.tif", labels.astype(np.uint8), origin=origin))

    return scene


def part_map(split, shape, at=(0, 0)):
    """Return each pixel's part, from what the split is saved as: a block's remainder belongs to the last."""
    (grid,) = json.loads(split.to_json())["grids"]
    height, width = grid["shape"]
    block = split.block
    parts = np.full((height, width), -1)
    for number, name in enumerate(split):
        for i, j in grid["blocks"][name]:
            bottom = height if i == height // block - 1 else (i + 1) * block
            right = width if j == width // block - 1 else (j + 1) * block
            parts[i * block : bottom, j * block : right] = number
    return parts[at[0] : at[0] + shape[0], at[1] : at[1] + shape[1]], parts


def brute_force(split, part, shape, size, at=(0, 0)):
    """Return every position that a window of a part may have, by looking at every pixel."""
    own, whole = part_map(split, shape, at)
    found = []
    for row, col in product(range(shape[0] - size[0] + 1), range(shape[1] - size[1] + 1)):
        top, left, b = row + at[0], col + at[1], split.buffer
        near = whole[max(top - b, 0) : top + size[0] + b, max(left - b, 0) : left + size[1] + b]
        inside = own[row : row + size[0], col : col + size[1]]
        if (inside == part).all() and not (near > part).any():
            found.append((row, col))
    return found


def all_positions(scene, size, region):
    places = Places(scene.shape, size, region.blocks_of(scene))
    positions = [places.at(number) for number in range(places.count)]
    assert positions == sorted(set(positions), key=positions.index)
    return positions


# ------------------------------------------------------------------ distance


@pytest.mark.parametrize(
    ("block", "buffer", "size"), [(9, 0, (5, 6)), (9, 2, (4, 3)), (12, 5, (6, 6)), (8, 9, (3, 2)), (8, 3, (8, 8))]
)
def test_no_two_windows_of_different_parts_are_closer_than_the_buffer(make, draws, block, buffer, size):
    scene = make("a", draws.integers(0, 3, (43, 52)))
    split = block_split(scene, PARTS, block, buffer, seed=3)
    positions = {name: all_positions(scene, size, split[name]) for name in split}
    for number, name in enumerate(split):
        assert sorted(positions[name]) == brute_force(split, number, scene.shape, size)
        if positions[name]:
            grid = Chips(scene, size, stride=2, region=split[name]).windows
            assert {window[:2] for _, window in grid} <= set(positions[name])
    assert positions["test"]
    for one, other in combinations(split, 2):
        first = np.array(positions[one]).reshape(-1, 2)[:, None]
        second = np.array(positions[other]).reshape(-1, 2)[None]
        between = np.maximum(first - second - np.array(size), second - first - np.array(size))
        assert (between.max(axis=-1) >= buffer).all(), (one, other)


def test_random_chips_of_a_part_are_all_its_positions(make, draws):
    scene = make("a", draws.integers(0, 3, (30, 41)))
    split = block_split(scene, PARTS, block=10, buffer=2, seed=1)
    for number, name in enumerate(split):
        chips = Chips(scene, (7, 5), region=split[name], length=1500)
        allowed = brute_force(split, number, scene.shape, (7, 5))
        torch.manual_seed(0)
        drawn = [tuple(chips[n]["window"].tolist()[1:3]) for n in range(1500)]
        assert set(drawn) <= set(allowed)
        counts = np.array([drawn.count(place) for place in allowed])
        expected = 1500 / len(allowed)
        freedom = len(allowed) - 1
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_without_a_buffer_the_grids_of_all_parts_cover_everything_once_by_block(make, draws):
    scene = make("a", draws.integers(0, 3, (43, 52)))
    split = block_split(scene, PARTS, block=10)
    own, _ = part_map(split, scene.shape)
    for number, name in enumerate(split):
        covered = np.zeros(scene.shape, bool)
        for _, (row, col, height, width) in Chips(scene, 7, region=split[name]).windows:
            covered[row : row + height, col : col + width] = True
        np.testing.assert_array_equal(covered, own == number)


def test_the_last_part_loses_nothing_to_the_buffer(make, draws):
    scene = make("a", draws.integers(0, 3, (40, 50)))
    near, far = (block_split(scene, PARTS, 10, buffer, seed=1) for buffer in (0, 3))
    assert json.loads(near.to_json())["grids"] == json.loads(far.to_json())["grids"]
    counts = [[len(Chips(scene, 5, stride=1, region=split[name])) for name in split] for split in (near, far)]
    assert counts[0][2] == counts[1][2]
    for number, name in enumerate(PARTS):
        own, _ = part_map(far, scene.shape)
        assert near.report["parts"][name]["kept"] == 1
        assert (
            far.report["parts"][name]["kept"]
            == len(brute_force(far, number, scene.shape, (1, 1))) / (own == number).sum()
        )
    assert counts[0][0] > counts[1][0]


# ------------------------------------------------------------------ several scenes


def test_neighbouring_and_repeated_scenes_share_their_blocks(make, draws):
    # Some begin or end where a block does, so that the blocks that their windows may not come near are in others.
    places = {"west": (5, 0), "east": (0, 30), "again": (5, 0), "south": (45, 4), "corner": (38, 40)}
    scenes = {name: make(name, draws.integers(0, 3, (36, 34)), at) for name, at in places.items()}
    split = block_split([scenes.pop("east"), *scenes.values()], PARTS, block=9, buffer=3, seed=2)
    scenes["east"] = make("east", draws.integers(0, 3, (36, 34)), places["east"])
    size, windows = (6, 5), {}
    for number, name in enumerate(split):
        windows[name] = []
        for which, at in places.items():
            positions = all_positions(scenes[which], size, split[name])
            assert sorted(positions) == brute_force(split, number, (36, 34), size, at)
            windows[name] += [(row + at[0], col + at[1]) for row, col in positions]
        assert all_positions(scenes["west"], size, split[name]) == all_positions(scenes["again"], size, split[name])
    for one, other in combinations(split, 2):
        first, second = np.array(windows[one])[:, None], np.array(windows[other])[None]
        between = np.maximum(first - second - np.array(size), second - first - np.array(size))
        assert (between.max(axis=-1) >= 3).all()


def test_blocks_of_several_grids_are_counted_each_for_itself(make, raster, draws):
    first, second = np.zeros((40, 40), np.uint8), draws.integers(1, 3, (50, 30)).astype(np.uint8)
    image = raster("b/image.tif", second, crs="EPSG:32755")
    other = Scene(image, raster("b/label.tif", second, crs="EPSG:32755"))
    split = block_split([make("a", first), other], PARTS, block=10)
    grids = json.loads(split.to_json())["grids"]
    for name in split:
        report = split.report["parts"][name]
        blocks = [second[10 * i : 10 * i + 10, 10 * j : 10 * j + 10] for i, j in grids[1]["blocks"][name]]
        assert report["classes"]["0"] == 100 * len(grids[0]["blocks"][name])
        assert report["classes"]["1"] == sum(int((block == 1).sum()) for block in blocks)
        assert report["blocks"] == len(grids[0]["blocks"][name]) + len(blocks)
        assert abs(report["class_shares"]["0"] - PARTS[name]) < 0.1


def test_a_far_scene_of_the_same_grid_costs_nothing(make, draws):
    scenes = [make("a", draws.integers(0, 3, (40, 40))), make("b", draws.integers(0, 3, (40, 40)), at=(40_000, 30_003))]
    split = block_split(scenes, PARTS, block=10, buffer=2)
    assert sum(part["blocks"] for part in split.report["parts"].values()) == 32
    assert len(split.to_json()) < 2500
    assert all(len(Chips(scenes, 5, region=split[name])) for name in split)


def test_scenes_that_overlap_on_other_grids_are_refused(make, raster, draws):
    first = make("a", draws.integers(0, 3, (40, 40)))
    shifted = Scene(raster("s.tif", np.ones((40, 40), np.uint8), origin=(500_204, 5_000_000)))
    coarse = Scene(raster("c.tif", np.ones((20, 20), np.uint8), origin=(500_200, 5_000_000), pixel=20))
    beside = Scene(raster("d.tif", np.ones((40, 40), np.uint8), origin=(500_404, 5_000_000)))
    turned = Scene(raster("e.tif", np.ones((40, 40), np.uint8), crs="EPSG:32632", origin=(972_000, 5_013_000)))
    plain = Scene(first.image)
    for other in (shifted, coarse):
        with pytest.raises(ValueError, match=r"image\.tif and .*[sc]\.tif overlap, but on different pixel grids"):
            block_split([plain, other], PARTS, 10)
        block_split([plain, other], PARTS, 10, allow_overlap=True)
    block_split([plain, beside, turned], PARTS, 10)


UTM33 = "EPSG:32633"
LOCAL = 'LOCAL_CS["a local grid",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'


def test_scenes_in_a_local_coordinate_system_are_split_and_overlap_only_their_like(raster):
    def scene(name, crs, origin, pixel=10):
        return Scene(raster(name, np.ones((40, 40), np.uint8), crs=crs, origin=origin, pixel=pixel))

    local, shifted = scene("l.tif", LOCAL, (0, 0)), scene("m.tif", LOCAL, (204, 0))
    assert set(block_split(local, PARTS, 10)) == set(PARTS)
    block_split([local, scene("p.tif", UTM33, (0, 0), pixel=20)], PARTS, 10)
    with pytest.raises(ValueError, match=r"l\.tif and .*m\.tif overlap"):
        block_split([local, shifted], PARTS, 10)


def test_scenes_without_georeference_are_told_apart_by_their_files(raster, draws):
    plain = rasterio.Affine.identity()
    scenes = [Scene(raster(f"{n}.tif", np.ones((8, 8), np.uint8), crs=None, transform=plain)) for n in range(12)]
    split = Split.from_json(block_split(scenes, PARTS, 8).to_json())
    held = [{number for number, _ in Chips(scenes, 8, region=split[name]).windows} for name in split]
    assert set.union(*held) == set(range(12))
    assert [len(part) for part in held] == [6, 3, 3]


# ------------------------------------------------------------------ balance


@pytest.fixture
def clustered(make, draws):
    """Six classes in clusters, some rare."""
    labels = np.zeros((120, 120), np.uint8)
    for value, (count, radius) in enumerate([(40, 9), (25, 6), (12, 5), (6, 4), (3, 4)], start=1):
        for row, col in draws.integers(0, 120, (count, 2)):
            labels[max(row - radius, 0) : row + radius, max(col - radius, 0) : col + radius] = value
    return make("c", labels), labels


def imbalance(shares):
    wanted = np.array(list(PARTS.values()))
    return float(((shares - wanted) ** 2 / wanted).sum())


def test_classes_are_balanced_better_than_by_chance(clustered, draws):
    scene, labels = clustered
    split = block_split(scene, PARTS, block=12)
    blocks = labels.reshape(10, 12, 10, 12).swapaxes(1, 2).reshape(100, -1)
    counts = np.stack([(blocks == value).sum(axis=1) for value in range(6)], axis=1)
    by_chance = []
    for _ in range(300):
        given = draws.permutation(np.repeat([0, 1, 2], [50, 25, 25]))
        held = np.stack([counts[given == part].sum(axis=0) for part in range(3)], axis=1)
        by_chance.append(imbalance(held / counts.sum(axis=0)[:, None]))
    parts = split.report["parts"]
    shares = np.array([[parts[name]["class_shares"][str(value)] for name in PARTS] for value in range(6)])
    assert imbalance(shares) < min(by_chance) / 2
    assert (abs(shares - list(PARTS.values())) < 0.05).all()


def test_the_report_counts_what_is_there(clustered):
    scene, labels = clustered
    labels = labels.copy()
    names = {5: "e", 0: "z", 1: "a", 2: "b", 3: "c", 9: "nowhere"}
    split = block_split(scene, PARTS, block=17, classes=names, ignore_values=(4,))
    own, _ = part_map(split, scene.shape)
    parts = split.report["parts"]
    for number, name in enumerate(split):
        report, here = parts[name], labels[own == number]
        assert report["classes"] == {label: int((here == value).sum()) for value, label in names.items()}
        assert report["pixels"] == int((here != 4).sum())
        assert report["share"] == report["pixels"] / (labels != 4).sum()
        assert report["class_shares"]["e"] == report["classes"]["e"] / (labels == 5).sum()
        assert report["class_shares"]["nowhere"] is None
    assert sum(part["blocks"] for part in parts.values()) == 49
    table = str(split).splitlines()
    assert table[0].split() == list(PARTS)
    assert table[2].split() == ["kept", *["100.0%"] * 3]
    assert table[4].split()[0] == "e"
    assert table[4].split()[1:3] == [
        f"{parts['train']['classes']['e']:,}",
        f"{parts['train']['class_shares']['e']:.1%}",
    ]
    assert table[-1].split() == ["nowhere", "0", "-", "0", "-", "0", "-"]


def test_pixels_without_data_do_not_count(make, raster, draws):
    labels = draws.integers(0, 2, (30, 40)).astype(np.uint8)
    image = draws.integers(0, 3, (2, 30, 40)).astype(np.uint8)
    scene = Scene(raster("i.tif", image, nodata=0, bands=("a", "b")), raster("l.tif", labels, nodata=1))
    for bands, known in ((None, (image > 0).all(axis=0)), (["b"], image[1] > 0)):
        parts = block_split(scene, PARTS, 8, bands=bands).report["parts"]
        assert sum(part["pixels"] for part in parts.values()) == (known & (labels == 0)).sum()
    bare = block_split(Scene(scene.image), PARTS, 8).report["parts"]
    assert sum(part["pixels"] for part in bare.values()) == (image > 0).all(axis=0).sum()
    assert bare["train"]["classes"] == {}


def test_every_part_gets_a_block_even_of_few(make):
    scene = make("a", np.zeros((16, 24)))
    split = block_split(scene, {"train": 0.96, "val": 0.02, "test": 0.02}, 8)
    assert [part["blocks"] for part in split.report["parts"].values()] == [4, 1, 1]


# ------------------------------------------------------------------ kept, and made again


def test_a_split_is_a_function_of_its_seed_and_survives_json_and_pickle(clustered, tmp_path):
    scene, _ = clustered
    split = block_split(scene, PARTS, 12, 2, seed=5)
    assert block_split(scene, PARTS, 12, 2, seed=5).to_json() == split.to_json()
    assert block_split(scene, PARTS, 12, 2, seed=6).to_json() != split.to_json()
    split.save(tmp_path / "split.json")
    for twin in (Split.load(tmp_path / "split.json"), pickle.loads(pickle.dumps(split))):
        assert twin.to_json() == split.to_json()
        assert str(twin) == str(split)
        assert repr(twin) == repr(split) == f"Split({PARTS}, block=12, buffer=2, seed=5)"
        for name in split:
            assert Chips(scene, 7, region=twin[name]).windows == Chips(scene, 7, region=split[name]).windows
    for region in (pickle.loads(pickle.dumps(split["val"])), Region.load(tmp_path / "split.json", "val")):
        assert repr(region) == "Region('val', block=12, buffer=2)"
        assert Chips(scene, 7, region=region).windows == Chips(scene, 7, region=split["val"]).windows
    chips = Chips(scene, (7, 5), region=split["val"], length=4)
    assert repr(chips) == "Chips(4 of 7 x 5 at random in part 'val', 1 bands, uint8)"
    assert (list(split), len(split)) == (list(PARTS), 3)
    for text in ("{}", "[]", "no", split.to_json().replace('"format": 1', '"format": 9')):
        with pytest.raises(ValueError, match=r"this is no split that Split\.to_json wrote"):
            Split.from_json(text)


# ------------------------------------------------------------------ statistics of a part


@pytest.mark.parametrize("options", [{"length": 5}, {"stride": 3}])
def test_statistics_of_a_part_count_each_of_its_pixels_once_and_no_other(raster, draws, options, monkeypatch):
    monkeypatch.setattr("ununennium.data.scene._STRIP", (16, 24))
    values = draws.integers(0, 1000, (2, 43, 52)).astype(np.uint16)
    scene = Scene(raster("i.tif", values, nodata=0))
    split = block_split(scene, PARTS, block=12, buffer=3)
    for number, name in enumerate(split):
        inside = np.zeros(scene.shape, bool)
        chips = Chips(scene, 6, region=split[name], **options)
        positions = (
            brute_force(split, number, scene.shape, (6, 6))
            if "length" in options
            else [w[:2] for _, w in chips.windows]
        )
        for row, col in positions:
            inside[row : row + 6, col : col + 6] = True
        held = values[:, inside & (values != 0).all(axis=0)]
        found = band_statistics(chips)
        assert found.count == held.shape[1]
        np.testing.assert_allclose(found.mean, held.mean(axis=1), rtol=1e-12)


# ------------------------------------------------------------------ what is refused


def test_errors(make, raster):
    scene = make("a", np.zeros((40, 40)))
    for fractions in ({"a": 0.5, "b": 0.6}, {"a": 1.2, "b": -0.2}, {}, {"a": 0.5}):
        with pytest.raises(ValueError, match=r"fractions must be positive and sum to 1, got .* \(sum "):
            block_split(scene, fractions, 10)
    for options, text in (
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"block": 10, "buffer": -1}, "buffer must be at least 0, got -1"),
        (
            {"block": 25},
            r"there are 1 blocks of 25 x 25 pixels for 3 parts, so that 'val' would be empty: choose smaller",
        ),
        (
            {"block": 10, "ignore_values": (0,)},
            r"no pixel of Scene\(.*image\.tif.* has data and a label: see that .*ignore_values",
        ),
        (
            {"block": 10, "classes": {1: "a"}},
            r"label\.tif: the label at row 0, column 0 is 0, .*none of the classes \(1\)",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            block_split(scene, PARTS, **options)
    for options, text in (
        ({"block": 20.5}, r"block must be an integer of at least 1, got 20\.5"),
        ({"block": True}, "block must be an integer of at least 1, got True"),
        ({"block": 10, "buffer": 2.0}, r"buffer must be an integer of at least 0, got 2\.0"),
        ({"block": 10, "seed": 1.9}, r"seed must be an integer of at least 0, got 1\.9"),
    ):
        with pytest.raises(TypeError, match=text):
            block_split(scene, PARTS, **options)
    with pytest.raises(ValueError, match=r"has a label, and .* has none: give all a label, or none"):
        block_split([scene, Scene(scene.image)], PARTS, 10)
    split = block_split(scene, PARTS, 10, 6)
    with pytest.raises(KeyError, match="the split has no part 'valid': its parts are train, val, test"):
        split["valid"]
    with pytest.raises(
        ValueError,
        match=r"chips of 12 x 8 pixels are larger than the split's blocks of 10 x 10 pixels: split with a b",
    ):
        Chips(scene, (12, 8), region=split["train"])
    with pytest.raises(
        ValueError, match=r"no chip of 10 x 10 pixels fits into part 'train' of the split \(block 10, buf"
    ):
        Chips(scene, 10, length=5, region=block_split(scene, PARTS, 10, 30)["train"])
    other = make("b", np.zeros((40, 40)), at=(0, 7))
    for elsewhere in (other, Scene(raster("c.tif", np.zeros((40, 40), np.uint8), pixel=20))):
        with pytest.raises(ValueError, match=r"is not among the scenes that were split"):
            Chips(elsewhere, 8, region=split["train"])
