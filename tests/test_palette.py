"""The palette, as it is seen with normal colour vision and without the red or the green cones."""

import itertools

import numpy as np
import pytest

from ununennium.palette import palette, rgb

# Machado, Oliveira, Fernandes (2009), "A physiologically-based model for simulation of color vision deficiency",
# severity 1.0, for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
WHITE = np.sum(TO_XYZ, axis=1)


def lab(colors, vision="normal"):
    """CIELAB (D65) of colours, "#rrggbb"."""
    srgb = np.array([rgb(color) for color in colors]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(VISIONS[vision])).clip(0, 1)
    xyz = seen @ np.transpose(TO_XYZ) / WHITE
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def least_distance(colors, vision="normal"):
    """The smallest CIE76 difference between two colours; 2.3 is just noticeable side by side."""
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab(colors, vision), 2))


def test_the_formula_gives_known_values():
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(lab(["#ffffff", "#000000", "#ff0000", "#0000ff"]), expected, atol=0.05)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize(("classes", "least"), [(7, 16), (10, 16), (24, 12)])
def test_classes_are_told_apart_from_each_other_and_from_what_is_no_class(vision, classes, least):
    assert least_distance([*palette(classes), "#ffffff"], vision) >= least


def test_more_classes_than_colours_vary_in_lightness():
    colors = palette(72)
    assert len(set(colors)) == 72
    light = lab(colors)[:, 0].reshape(3, 24)
    assert (light[1] < light[0] - 5).all()
    assert (light[2] > light[0] + 2).all()
    assert palette(73)[72] == colors[0]
    assert palette(24) == colors[:24]
