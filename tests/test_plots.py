"""Pictures: which bands they show, and what their pixels say."""

import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest

from test_palette import VISIONS, least_distance
from ununennium import plots
from ununennium.palette import palette, rgb


def share(picture, color):
    """The share of a picture's pixels that have a colour."""
    return float((picture == np.array(rgb(color), np.uint8)).all(-1).mean())


def example(target, prediction, **more):
    target, prediction = np.asarray(target), np.asarray(prediction)
    picture = np.full((*target.shape, 3), 40, np.uint8)
    return plots.Example(picture, target, prediction, more.pop("compared", np.ones(target.shape, bool)), **more)


# Bands


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["B1 blue", "B2 green", "B3 red", "B4 nir infrared"], [2, 1, 0]),
        (["Red", "Green", "Blue"], [0, 1, 2]),
        (["B01", "B02", "B03", "B04", "B05"], [3, 2, 1]),
        (["B2", "B3", "B4", "B8"], [2, 1, 0]),  # Sentinel-2
        (["B8", "B4", "B3"], [0, 1, 2]),  # without blue: near infrared as red
        (["nir", "swir16", "red", "green"], [0, 2, 3]),
        (["B1", "B2", "B3", "B4", "B5", "B7"], [2, 1, 0]),  # Landsat 5 and 7
        (["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B6", "SR_B7"], [3, 2, 1]),  # Landsat 8
        (["B8A", "B11", "B04", "B03", "B02"], [2, 3, 4]),
        (["red edge", "RedEdge 2", "green", "blue", "red"], [4, 2, 3]),
        (["coastal blue", "blue", "green", "red"], [3, 2, 1]),
        (["400.5 nm", "460.0 nm", "540.0 nm", "655.1 nm", "2400.0 nm"], [3, 2, 1]),
        (["B1", "B2", "B3", "B4"], [2, 1, 0]),  # as files without names are read: in order of wavelength
        (["B1", "B2", "B3"], [0, 1, 2]),
        (["", "", ""], [0, 1, 2]),
        (["VV", "VH"], [0]),
        (["B1", "B2"], [0]),
    ],
)
def test_bands_for_a_picture(names, expected):
    assert plots.rgb_bands(names) == expected


def test_a_composite_is_stretched_over_its_valid_pixels():
    image = np.arange(3 * 101 * 4, dtype=np.int32).reshape(3, 101, 4)
    valid = np.ones((101, 4), bool)
    image[:, :, 3], valid[:, 3] = 10**6, False
    image[1, 5, 0] = 10**5
    picture = plots.composite(image, [2, 1, 0], valid)
    assert (picture.shape, picture.dtype) == ((101, 4, 3), np.uint8)
    assert (picture[:, 3] == 255).all()
    pixels = image[2][valid].astype(float)
    low, high = np.percentile(pixels, (2, 98))
    np.testing.assert_array_equal(
        picture[:, :3, 0], np.round(255 * ((image[2, :, :3] - low) / (high - low)).clip(0, 1))
    )
    assert picture[0].tolist()[0] == [0, 0, 0]


def test_a_composite_of_one_band_is_grey_and_gaps_are_white():
    image = np.array([[[0.0, 1.0], [2.0, np.nan]]])
    picture = plots.composite(image, [0])
    assert (picture[..., 0] == picture[..., 2]).all()
    assert (picture[1, 1] == 255).all()
    assert (plots.composite(np.full((1, 2, 2), np.nan), [0]) == 255).all()
    assert not plots.composite(np.full((1, 2, 2), 7.0), [0]).any()  # of one value


# Predictions


def test_classes_have_their_colours_and_errors_theirs():
    target = np.zeros((40, 40), int)
    target[:, 20:] = 1
    target[:10] = 255
    prediction = np.full((40, 40), 2)
    prediction[:20] = target[:20]
    prediction[:10] = 2
    colors = ["#123456", "#654321", "#abcdef"]
    drawn = plots.draw_classes([example(target, prediction, compared=target != 255)], ["a", "b", "c"], colors)
    panel = 4 * plots.DPI**2 * 2.5**2 / (drawn.shape[0] * drawn.shape[1]) / 4  # the share of one of the four
    # target: 3/8 a, 3/8 b; prediction: 1/8 a, 1/8 b, 3/4 c; errors: 1/4 unlabelled, 1/4 right, 1/2 wrong; legends
    expected = {"#123456": 0.5, "#654321": 0.5, "#abcdef": 0.75, plots.RIGHT: 0.25, plots.WRONG: 0.5, plots.GREY: 0.5}
    for color, part in expected.items():
        assert share(drawn, color) == pytest.approx(part * panel, rel=0.05, abs=0.002), color


def test_what_is_not_judged_is_neither_right_nor_wrong_and_no_data_is_white():
    target = np.zeros((20, 20), int)
    judged = np.zeros((20, 20), bool)
    judged[:, :10] = True
    valid = np.ones((20, 20), bool)
    valid[:10] = False
    some = plots.draw_classes([example(target, target, judged=judged, valid=valid)], ["a", "b"])
    every = plots.draw_classes([example(target, target)], ["a", "b"])
    legend = 0.002
    assert share(some, plots.RIGHT) == pytest.approx(share(every, plots.RIGHT) / 4, abs=legend)
    assert share(some, palette(1)[0]) == pytest.approx(share(every, palette(1)[0]) / 2, abs=legend)


def test_labels_outside_the_classes_are_unlabelled():
    drawn = plots.draw_classes([example(np.full((9, 9), -7), np.full((9, 9), 900))], ["a", "b"])
    assert share(drawn, plots.GREY) > 0.3


def test_of_very_many_classes_the_legend_names_those_that_are_seen():
    target = np.full((9, 9), 3)
    few, many = (plots.draw_classes([example(target, target)], [f"class {n}" for n in range(c)]) for c in (20, 90))
    assert many.shape[0] < few.shape[0]


def test_a_large_difference_of_values_is_coloured_and_what_is_unknown_grey():
    target = np.zeros((30, 30))
    prediction = np.zeros((30, 30))
    prediction[:15] = np.nan
    known = np.ones((30, 30), bool)
    known[:, :15] = False
    drawn = plots.draw_values([example(target, prediction, compared=known)])
    panel = plots.DPI**2 * 2.5**2 / (drawn.shape[0] * drawn.shape[1])
    assert share(drawn, plots.GREY) == pytest.approx((0.5 + 0.5 + 0.75) * panel, rel=0.05)


@pytest.mark.parametrize("right", [True, False, None])
def test_a_scene_says_whether_it_is_right_in_a_colour(right):
    picture = np.zeros((8, 8, 3), np.uint8)
    drawn = plots.draw_scenes([picture], ["forest"], [right], ["here"])
    for said, color in ((True, plots.TRAINING), (False, plots.WRONG)):
        assert (share(drawn, color) > 0) == (right is said)


@pytest.mark.parametrize("vision", VISIONS)
def test_right_wrong_and_no_label_are_told_apart(vision):
    assert least_distance([plots.RIGHT, plots.WRONG, plots.GREY], vision) > 12
    assert least_distance([plots.TRAINING, plots.VALIDATION], vision) > 40


# Figures


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"train_loss": [0.5]},
        {"train_loss": [1.0, 0.5], "val_loss": [np.nan, np.nan]},
        {"train_loss": [1e30, np.inf, np.nan], "val_iou": [0.1, np.nan, 0.3]},
        {"lr": [1.0], "val_iou/water": [0.5]},
    ],
)
def test_curves_of_whatever_there_is(history):
    drawn = plots.draw_curves(history, best=2)
    assert drawn.dtype == np.uint8
    values = [v for name in plots.curve_names(history) for v in history.get(f"val_{name}", [])]
    assert (share(drawn, plots.VALIDATION) > 0) == bool(np.isfinite(values).any())


def test_each_figure_has_one_curve_for_both_parts():
    names = ["train_loss", "train_iou", "val_loss", "val_iou", "val_iou/water", "lr", "nonfinite_steps", "val_f1_score"]
    assert plots.curve_names(names) == ["loss", "iou", "f1_score"]
    assert [plots.title_of(n) for n in ("loss", "iou", "f1_score")] == ["Loss", "IoU", "F1 score"]


def test_a_confusion_matrix_is_normalised_by_row():
    strong, weak = (plots.draw_confusion(np.array(m), ["a", "b"]) for m in ([[9, 1], [0, 10]], [[900, 100], [0, 10]]))
    numbers = slice(0, int(0.6 * strong.shape[1]))
    np.testing.assert_array_equal(strong[:, numbers].shape[0], weak[:, numbers].shape[0])
    darkest = (8, 48, 107)  # of the colours, for 100 %
    assert share(strong, "#" + "".join(f"{v:02x}" for v in darkest)) > 0.05
    empty = plots.draw_confusion(np.array([[0, 0], [0, 10]]), ["a", "b"])
    assert share(empty, plots.GREY) > 10 * max(share(strong, plots.GREY), 0.001)  # a class that is not there


def test_names_that_mean_something_to_matplotlib(recwarn):
    names = ["$\\frac{$", "_hidden", "water $a_b$ land", "水", "a\nb", "x" * 300]
    target = np.arange(36).reshape(6, 6) % 6
    plots.draw_classes([example(target, target, title="$\\frac{$")], names)
    plots.draw_confusion(np.eye(6, dtype=int), names)
    plots.draw_scenes([np.zeros((4, 4, 3), np.uint8)], ["$\\frac{$"], [True], ["_place"])
    plots.draw_curves({"val_$x^2": [1.0], "val__y": [1.0]})
    assert not recwarn.list


def test_the_users_style_is_neither_used_nor_changed():
    before = plots.draw_curves({"train_loss": [1.0, 2.0]})
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30}), warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = dict(matplotlib.rcParams)
        np.testing.assert_array_equal(plots.draw_curves({"train_loss": [1.0, 2.0]}), before)
        assert dict(matplotlib.rcParams) == settings


def test_png_keeps_every_pixel():
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    import io

    read = matplotlib.image.imread(io.BytesIO(plots.png(picture)))
    np.testing.assert_array_equal(np.round(255 * read).astype(np.uint8), picture)


def test_matplotlib_comes_with_the_first_picture():
    code = "import sys, ununennium.plots; assert 'matplotlib' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
