"""Statistics of bands against NumPy on whole arrays."""

import errno
import json
import math
import os
import pickle

import numpy as np
import pytest

from ununennium.data import BandStatistics, Chips, Scene, band_statistics
from ununennium.data.statistics import _codes

H, W = 60, 71
QS = (0, 0.1, 2, 25, 50, 77.7, 98, 99.95, 100)


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr("ununennium.data.scene._STRIP", (16, 24))


def held(values, nodata):
    return values[:, (values != nodata).all(axis=0)].astype(np.float64)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16])
def test_of_small_integers_everything_is_exact(raster, draws, dtype):
    limits = np.iinfo(dtype)
    values = draws.integers(limits.min, limits.max, (3, H, W), endpoint=True).astype(dtype)
    values[1] = draws.integers(5, 9, (H, W))
    found = band_statistics(Scene(raster("a.tif", values, nodata=7), bands="abc"))
    known = held(values, 7)
    assert found.is_exact
    assert (found.bands, found.count, found.dtype) == (("a", "b", "c"), known.shape[1], dtype)
    assert found.min == tuple(known.min(axis=1))
    assert found.max == tuple(known.max(axis=1))
    np.testing.assert_allclose(found.mean, known.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(found.std, known.std(axis=1), rtol=1e-13)
    for q in QS:
        np.testing.assert_allclose(found.percentile(q), np.percentile(known, q, axis=1), rtol=1e-13)


def test_exact_means_exact():
    """A billion large values with a spread that float32 and careless float64 sums lose."""
    found = BandStatistics(["a"], "uint16")
    found.update(np.array([[65_534, 65_535]], np.uint16))
    for _ in range(40):
        found = found + found
    assert found.count == 2**41
    assert found.mean == (65_534.5,)
    assert found.std == (0.5,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint32])
def test_of_other_types_moments_are_float64_and_percentiles_within_a_256th(raster, draws, dtype):
    values = (
        draws.normal(0, 1, (3, H, W)) * np.array([3e4, 1.0, 50])[:, None, None]
        + np.array([1e5, 0.2, 9e5])[:, None, None]
    )
    values = np.abs(values).astype(dtype) if np.dtype(dtype).kind == "u" else values.astype(dtype)
    values[0, :5] = 77
    found = band_statistics(Scene(raster("a.tif", values, nodata=77)))
    known = held(values, 77)
    assert not found.is_exact
    assert found.count == known.shape[1]
    assert found.min == tuple(known.min(axis=1))
    assert found.max == tuple(known.max(axis=1))
    np.testing.assert_allclose(found.mean, known.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(found.std, known.std(axis=1), rtol=1e-11)
    for q in QS:
        for got, band in zip(found.percentile(q), known, strict=True):
            place = np.sort(band)[[math.floor(q / 100 * (len(band) - 1)), math.ceil(q / 100 * (len(band) - 1))]]
            assert abs(got - np.percentile(band, q)) <= np.abs(place).max() * 2**-8 + 1e-38


def test_codes_are_in_the_order_of_values():
    values = np.array([-np.finfo(np.float64).max, -1e30, -2, -1, -1e-40, -0.0, 0.0, 1e-40, 1, 1.01, 2, 1e30, 1e300])
    codes = _codes(values, is_exact=False).astype(int)
    assert (np.diff(codes) >= 0).all()
    assert codes[5] == codes[6]
    assert len(set(codes.tolist())) >= 10
    assert 0 <= codes.min() <= codes.max() < 2**16


def test_percentiles_of_negative_values_and_zero():
    found = BandStatistics(["a"], "float32")
    values = np.array([[-4.0, -2.0, 0.0, 2.0, 4.0]], np.float32)
    found.update(values)
    for q in (0, 25, 50, 75, 100):
        assert abs(found.percentile(q)[0] - np.percentile(values, q)) <= 4 * 2**-8


def test_infinite_and_missing_values_do_not_count(raster, draws):
    values = draws.normal(size=(2, H, W)).astype(np.float32)
    values[0, :3], values[1, 5], values[1, 6] = np.nan, np.inf, -np.inf
    found = band_statistics(Scene(raster("a.tif", values)))
    known = values[:, np.isfinite(values).all(axis=0)].astype(np.float64)
    assert found.count == known.shape[1] == (H - 5) * W
    np.testing.assert_allclose(found.std, known.std(axis=1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_parts_are_merged_as_the_whole(draws, dtype):
    values = (1e4 + 100 * draws.normal(size=(2, 5000))).astype(dtype)
    whole = BandStatistics(["a", "b"], np.dtype(dtype).name)
    whole.update(values)
    parts = []
    for part in np.split(values, [7, 7, 900, 4000], axis=1):
        parts.append(BandStatistics(["a", "b"], np.dtype(dtype).name))
        parts[-1].update(part)
    joined = (parts[3] + parts[1]) + (parts[0] + (parts[4] + parts[2]))
    assert (joined.count, joined.min, joined.max) == (whole.count, whole.min, whole.max)
    assert [joined.percentile(q) for q in QS] == [whole.percentile(q) for q in QS]
    exact = 0 if joined.is_exact else 1e-12
    np.testing.assert_allclose(joined.mean, whole.mean, rtol=exact)
    np.testing.assert_allclose(joined.std, whole.std, rtol=exact)
    np.testing.assert_allclose(joined.std, values.astype(np.float64).std(axis=1), rtol=1e-12)


def test_a_small_spread_far_from_zero_is_kept(draws):
    """Where the sum of squares minus the square of the sum has no digit left."""
    values = 1e9 + draws.normal(size=(1, 4000))
    found = BandStatistics(["a"], "float64")
    for part in np.split(values, 8, axis=1):
        found.update(part)
    np.testing.assert_allclose(found.std, values.std(axis=1), rtol=1e-6)


def test_several_scenes_bands_and_chips(raster, draws):
    first = draws.integers(0, 99, (3, H, W)).astype(np.uint8)
    second = draws.integers(-9, 99, (2, 20, 30)).astype(np.int16)
    scenes = [
        Scene(raster("a.tif", first, bands=("x", "B02", "B03"))),
        Scene(raster("b.tif", second, bands=("b3", "B2"))),
    ]
    found = band_statistics(scenes, ["B2", "B3"])
    known = np.concatenate([first[1:].reshape(2, -1), second[::-1].reshape(2, -1)], axis=1).astype(np.float64)
    assert (found.bands, found.dtype) == (("B02", "B03"), np.int16)
    np.testing.assert_allclose(found.mean, known.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(found.std, known.std(axis=1), rtol=1e-13)
    for options in ({"length": 3}, {"stride": 7}):
        chips = Chips(scenes, 16, bands=["B2", "B3"], **options)
        assert band_statistics(chips).to_json() == found.to_json()
        assert band_statistics(chips, ["b03"]).mean == found.mean[1:]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_json_and_pickle_keep_everything(draws, dtype, tmp_path):
    found = BandStatistics(["a", "b"], np.dtype(dtype).name)
    assert BandStatistics.from_json(found.to_json()).count == 0
    found.update((50 + 9 * draws.normal(size=(2, 500))).astype(dtype))
    found.save(tmp_path / "statistics.json")
    more = (50 + 9 * draws.normal(size=(2, 80))).astype(dtype)
    for twin in (BandStatistics.load(tmp_path / "statistics.json"), pickle.loads(pickle.dumps(found))):
        assert twin.to_json() == found.to_json()
        assert [twin.percentile(q) for q in QS] == [found.percentile(q) for q in QS]
        twin.update(more)
    found.update(more)
    assert (twin.mean, twin.std, twin.min, twin.max) == (found.mean, found.std, found.min, found.max)
    assert json.loads(found.to_json())["mean"] == list(found.mean)
    for text in ("{}", "no", "[1]", found.to_json().replace('"format": 1', '"format": 2')):
        with pytest.raises(ValueError, match=r"these are no statistics that BandStatistics\.to_json wrote"):
            BandStatistics.from_json(text)


def test_how_statistics_are_shown(draws):
    found = BandStatistics(["red", "B8A"], "uint8")
    assert all(math.isnan(value) for value in (*found.mean, *found.std, *found.min, *found.max, *found.percentile(5)))
    found.update(np.array([[1, 2, 3], [4, 4, 4]], np.uint8))
    assert repr(found) == "BandStatistics(2 bands, uint8, 3 pixels)"
    rows = [line.split() for line in str(found).splitlines()]
    assert rows[0] == ["band", "mean", "std", "min", "max", "2%", "50%", "98%"]
    assert rows[2] == ["B8A", "4", "0", "4", "4", "4", "4", "4"]


def test_errors(raster):
    scene = Scene(raster("a.tif", np.zeros((1, 4, 4), np.uint8), nodata=0))
    with pytest.raises(
        ValueError, match=r"no pixel of Scene\(.*a\.tif.*\) has data in all of the bands B1: leave out bands"
    ):
        band_statistics(scene)
    with pytest.raises(ValueError, match=r"has no band 'red'"):
        band_statistics(scene, ["red"])
    with pytest.raises(
        ValueError, match=r"statistics differ in dtype: uint8 and int16 can't be merged: measure the same bands"
    ):
        BandStatistics(["a"], "uint8") + BandStatistics(["a"], "int16")
    with pytest.raises(
        ValueError, match=r"statistics differ in bands: \('a',\) and \('b',\) can't be merged: measure the same bands"
    ):
        BandStatistics(["a"], "uint8").merge(BandStatistics(["b"], "uint8"))
    with pytest.raises(ValueError, match="q must be a percentage, from 0 to 100, got 101"):
        BandStatistics(["a"], "uint8").percentile(101)


def test_what_is_kept_is_whole_or_as_it_was(tmp_path, monkeypatch):
    found = BandStatistics(["a"], "uint8")
    found.update(np.array([[1, 2, 3]], np.uint8))
    file = tmp_path / "new folder" / "statistics.json"
    found.save(file)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found.update(np.array([[4]], np.uint8))
    with pytest.raises(OSError, match="No space left"):
        found.save(file)
    assert BandStatistics.load(file).count == 3
    assert [each.name for each in file.parent.iterdir()] == ["statistics.json"]


@pytest.mark.parametrize(
    ("dtype", "values", "text"),
    [
        ("uint8", np.zeros((3, 5), np.uint8), r"values must be \(2, N\) in uint8.* got \(3, 5\): .* pixels of a, b"),
        ("uint8", np.zeros((1, 5), np.uint8), r"got \(1, 5\)"),
        ("uint8", np.zeros(5, np.uint8), r"got \(5,\)"),
        ("uint8", np.zeros((2, 5, 5), np.uint8), r"got \(2, 5, 5\)"),
        ("uint8", np.full((2, 5), 300, np.uint16), "in uint8.* got uint16: make the statistics with dtype='uint16'"),
        ("float32", np.zeros((2, 5)), "in float32.* got float64"),
        ("float32", np.array([[1, 2], [3, np.nan]], np.float32), "finite, got NaN or infinite ones: leave pixels"),
        ("float64", np.array([[1, np.inf], [3, 4]]), "finite, got NaN or infinite ones"),
    ],
)
def test_other_pixels_are_refused_and_change_nothing(dtype, values, text):
    found = BandStatistics(["a", "b"], dtype)
    found.update(np.array([[1, 2], [3, 4]], dtype))
    before = found.to_json()
    with pytest.raises(ValueError, match=text):
        found.update(values)
    assert found.to_json() == before
