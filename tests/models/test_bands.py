"""Bands by name, without models."""

import pytest
import torch

from ununennium._band_names import same_band
from ununennium.models._bands import FilterMap, check_bands, match_bands

ALL = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8a", "B9", "B10", "B11", "B12")


@pytest.mark.parametrize(
    "alike",
    [
        ["B8A", "B8a", "b8a", "B08A", " b08a"],
        ["B2", "B02", "b02", "B002"],
        ["B10", "b10", "B010"],
        ["VV", "vv"],
        ["SR_B4", "sr_b4", "SR_B04"],
        ["red", "Red", "RED"],
        ["B6_VCID_1", "b06_vcid_01"],
        ["B02_20m", "B2_20m"],
        ["10m B02", "10m B2"],
    ],
)
def test_spellings_of_one_band(alike):
    assert len({same_band(name) for name in alike}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("B8", "B8A"),
        ("B1", "B10"),
        ("B1", "B11"),
        ("B4", "SR_B4"),
        ("B10", "B1"),
        ("red", "B4"),
        ("650.05 nm", "650.5 nm"),
        ("B10_20m", "B1_20m"),
        ("B8A_20m", "B8_20m"),
    ],
)
def test_bands_that_differ(one, other):
    assert same_band(one) != same_band(other)


# The wavelengths (nm) that STAC's electro-optical extension gives to common names, against Sentinel-2A's.
CENTERS = {"B1": 443, "B2": 490, "B3": 560, "B4": 665, "B5": 704, "B6": 740, "B7": 783, "B8": 842, "B8A": 865,
           "B9": 945, "B10": 1375, "B11": 1610, "B12": 2190}  # fmt: skip
COMMON = {"coastal": (400, 450), "blue": (450, 530), "green": (510, 600), "red": (620, 690), "rededge071": (690, 730),
          "rededge075": (730, 760), "rededge078": (760, 790), "nir": (750, 1000), "nir08": (860, 870),
          "nir09": (930, 960), "cirrus": (1350, 1390), "swir16": (1550, 1750), "swir22": (2050, 2350)}  # fmt: skip


@pytest.mark.parametrize("common", COMMON)
def test_a_common_name_is_a_band_of_its_wavelengths(common):
    low, high = COMMON[common]
    assert low < CENTERS[same_band(common, sentinel2=True)] < high


def test_common_names_mean_different_bands():
    assert len({same_band(common, sentinel2=True) for common in COMMON}) == len(CENTERS)


@pytest.mark.parametrize("name", ["rededge", "swir", "pan", "thermal", "nir2", "yellow"])
def test_names_that_mean_several_bands_or_none_mean_themselves(name):
    assert same_band(name, sentinel2=True) == name.upper()


def test_filters_are_copied_bit_by_bit():
    filters = torch.randn(4, 3, 5, 5, dtype=torch.float32) * 1e-3
    mapped = FilterMap((2, None, 0), 3, "mean")(filters)
    assert torch.equal(mapped[:, 0], filters[:, 2])
    torch.testing.assert_close(mapped[:, 1], (filters[:, 0] + filters[:, 1] + filters[:, 2]) / 3)
    assert torch.equal(mapped[:, 2], filters[:, 0])
    assert not FilterMap((2, None, 0), 3, "zero")(filters)[:, 1].any()


@pytest.mark.parametrize(
    ("places", "nothing"), [((0, 1, 2), True), ((0, 1), False), ((0, 2, 1), False), ((0, 1, 2, None), False)]
)
def test_only_the_same_bands_in_the_same_order_change_nothing(places, nothing):
    assert FilterMap(places, 3, "zero").changes_nothing is nothing


def test_common_names_are_read_where_they_are_sentinel2s():
    bands = ("nir", "B03", "red")
    found = match_bands(bands, 3, "it", ALL, "raise", sentinel2=True)
    assert [ALL[place] for place in found.places] == ["B8", "B3", "B4"]
    with pytest.raises(ValueError, match=r"2 of 3 bands have no namesake in it\. Unmatched: nir, red\. Matched: B03\."):
        match_bands(bands, 3, "it", ALL, "raise", sentinel2=False)


def test_two_names_of_one_band():
    with pytest.raises(ValueError, match="'nir' and 'B08' are both B8"):
        match_bands(("nir", "B2", "B08"), 3, "it", ALL, "raise", sentinel2=True)


@pytest.mark.parametrize(
    ("bands", "error", "match"),
    [
        ("B2", TypeError, "sequence of names"),
        ([1, 2], TypeError, "sequence of names"),
        (["B2"], ValueError, "1 names, but in_channels is 2.*Got B2"),
        (["B2", "B3", "B4"], ValueError, "3 names, but in_channels is 2"),
        (["B8A", "b08a"], ValueError, "'B8A' and 'b08a' are both B8A"),
        (["B8A", "B8A"], ValueError, "'B8A' and 'B8A' are both B8A"),
    ],
)
def test_bands_that_are_none(bands, error, match):
    with pytest.raises(error, match=match):
        check_bands(bands, 2)
