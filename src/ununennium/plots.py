"""Pictures of a run: chips with what is predicted of them, learning curves, the confusion matrix.

Every function that draws takes arrays and returns a picture: pixels (height, width, 3), uint8. matplotlib is imported
with the first one drawn, and its settings are left as they are.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from ununennium.palette import palette, rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]

GREY, RIGHT, WRONG = "#e0e0e0", "#a9c9e3", "#cc3300"
TRAINING, VALIDATION = "#0072b2", "#d55e00"
DPI = 120
MOST_IN_LEGEND = 24  # classes; of more, those that are seen
MOST_WRITTEN = 20  # classes up to which the cells of a confusion matrix say their percentage
_NAME = 28  # letters of a class's name that are shown


# ---- the bands of a picture ----------------------------------------------------------------------------------------

_WAVELENGTHS = (650.0, 550.0, 450.0)  # nm, of red, green and blue


def rgb_bands(bands: Sequence[str]) -> list[int]:
    """Choose the bands that are shown as red, green and blue by their names.

    Sought in this order: red, green and blue by name or by Sentinel-2's and Landsat 8's numbers (B4, B3, B2; B3, B2,
    B1 where the bands are those of Landsat 5 and 7); the nearest wavelengths of names such as "650.3 nm"; near
    infrared, red and green; the third, second and first of four bands or more that nothing else is known of; the first
    three of three. Of one or two bands the first, for a grey picture.

    Parameters
    ----------
    bands : sequence of str
        Names in the order of the channels.

    Returns
    -------
    list of int
        Three numbers of channels, or one.
    """
    known = [_meaning(name) for name in bands]
    numbers = [number for number, _ in known]
    unnamed = numbers == list(range(1, len(bands) + 1)) and len(bands) <= 4 and not any(words for _, words in known)
    thematic_mapper = {1, 2, 3, 4, 5, 7} <= set(numbers) and max(n or 0 for n in numbers) == 7 and 6 not in numbers
    colors = {"red": 3, "green": 2, "blue": 1, "nir": 4} if thematic_mapper else _SENTINEL_2

    def find(color: str) -> int | None:
        named = [band for band, (_, words) in enumerate(known) if color in words]
        numbered = [] if unnamed else [band for band, n in enumerate(numbers) if n == colors[color]]
        return next(iter(named or ([] if any(words for _, words in known) else numbered)), None)

    if (natural := [find(color) for color in ("red", "green", "blue")]) and None not in natural:
        return [band for band in natural if band is not None]
    lengths = [re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*nm\s*", name) for name in bands]
    if len(bands) >= 3 and all(lengths):
        values = np.array([float(length[1]) for length in lengths if length])
        return [int(np.abs(values - color).argmin()) for color in _WAVELENGTHS]
    if (false := [find(color) for color in ("nir", "red", "green")]) and None not in false:
        return [band for band in false if band is not None]
    return [2, 1, 0] if len(bands) > 3 else [0, 1, 2] if len(bands) == 3 else [0]


_SENTINEL_2 = {"red": 4, "green": 3, "blue": 2, "nir": 8}


def _meaning(name: str) -> tuple[int | None, set[str]]:
    """Return the number of a band and the colours in its name; those of a red edge are none."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    words = set(re.findall(r"[a-z]+", text))
    found = {"red", "green", "blue"} & words
    if words & {"nir", "infrared", "nearinfrared"} and not words & {"narrow", "swir", "shortwave", "short", "thermal"}:
        found = {"nir"}
    if words & {"edge", "rededge", "coastal", "shortwave", "short", "swir", "thermal"}:
        found = set()
    number = re.match(r"(?:sr[_ ])?b(?:and)?[ _-]?0*(\d+)(?![\da-z])", text)
    return (int(number[1]) if number else None), found


def composite(image: NDArray[Any], channels: Sequence[int], valid: NDArray[np.bool_] | None = None) -> Pixels:
    """Return a picture of three channels of an image, or of one in grey, stretched from the 2nd to the 98th percentile.

    Parameters
    ----------
    image : ndarray
        (C, H, W), of any type.
    channels : sequence of int
        Those shown as red, green and blue; or one.
    valid : ndarray of bool, optional
        Where the image has data (H, W): the pixels that the percentiles are of; others are white. By default where
        the channels are finite.
    """
    shown = image[list(channels)].astype(np.float64)
    known = np.logical_and(np.isfinite(shown).all(0), True if valid is None else valid)
    picture = np.full((*shown.shape[1:], 3), 255, np.uint8)
    if known.any():
        low, high = np.percentile(shown[:, known], (2, 98), axis=1)[..., None]
        stretched = ((shown[:, known] - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
        picture[known] = np.round(255 * np.repeat(stretched, 3 // len(channels), axis=0).T)
    return picture


# ---- predictions ---------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """A chip or a scene, its target and what is predicted of it.

    Attributes
    ----------
    picture : ndarray of uint8
        (H, W, 3).
    target, prediction : ndarray
        Class numbers or values (H, W).
    compared : ndarray of bool
        Where the target is one (H, W).
    valid : ndarray of bool, optional
        Where the image has data (H, W); all by default.
    title : str
        Where it lies.
    judged : ndarray of bool, optional
        Where, of the compared pixels, right and wrong are shown (H, W); everywhere by default.
    """

    picture: Pixels
    target: NDArray[Any]
    prediction: NDArray[Any]
    compared: NDArray[np.bool_]
    valid: NDArray[np.bool_] | None = None
    title: str = ""
    judged: NDArray[np.bool_] | None = None


P = ParamSpec("P")


def _drawn(draw: Callable[P, Figure]) -> Callable[P, Pixels]:
    """Render a figure in matplotlib's own style, whatever the user's is."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Pixels:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()
            warnings.filterwarnings("ignore", "Glyph .* missing")  # in a name; the legend has a box for it
            figure = draw(*args, **kwargs)
            figure.set_dpi(DPI)
            canvas: Any = FigureCanvasAgg(figure)
            canvas.draw()
            return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    return drawn


@_drawn
def draw_classes(
    examples: Sequence[Example],
    names: Sequence[str],
    colors: Sequence[str] | None = None,
    *,
    titles: Sequence[str] = ("Image", "Target", "Prediction", "Errors"),
    unlabelled: str = "no label",
    side: float = 2.5,
) -> Figure:
    """Draw image, target, prediction and errors of classes, a row an example, with a legend.

    Parameters
    ----------
    examples : sequence of Example
    names : sequence of str
        Of the K classes.
    colors : sequence of str, optional
        Of the classes, "#rrggbb"; by default `palette`.
    titles : sequence of 4 str
        Of the columns.
    unlabelled : str
        What the legend says of pixels that are not compared.
    side : float, default 2.5
        Width of a panel, inches.
    """
    colors = palette(len(names)) if colors is None else colors
    table = np.array([rgb(color) for color in colors] + [rgb(GREY)], np.uint8)
    rows = []
    seen: set[int] = set()
    for example in examples:
        target, prediction = (_numbers(a, len(names)) for a in (example.target, example.prediction))
        target = np.where(example.compared, target, len(names))
        seen |= set(np.unique(target).tolist()) | set(np.unique(prediction).tolist())
        verdict = np.where((target == prediction)[..., None], np.array(rgb(RIGHT)), np.array(rgb(WRONG)))
        judged = example.compared if example.judged is None else example.compared & example.judged
        verdict = np.where(judged[..., None], verdict, np.array(rgb(GREY))).astype(np.uint8)
        panels = [example.picture, table[target], table[prediction], verdict]
        rows.append([_blanked(panel, example.valid) for panel in panels])
    shown = [k for k in range(len(names)) if len(names) <= MOST_IN_LEGEND or k in seen]
    columns = _columns([names[k] for k in shown], 2.7 * side)
    lines = max(-(-len(shown) // columns), 3)
    figure, cells = _grid(rows, [example.title for example in examples], titles, side, 0.185 * lines + 0.08)
    for row, axes_of_row in zip(rows, cells, strict=True):
        for panel, axes in zip(row, axes_of_row, strict=True):
            axes.imshow(panel, interpolation="nearest", aspect="auto")
    _legend(figure, [(colors[k], names[k]) for k in shown], "lower left", columns)
    _legend(figure, [(RIGHT, "right"), (WRONG, "wrong"), (GREY, unlabelled)], "lower right", 1)
    return figure


@_drawn
def draw_values(examples: Sequence[Example], *, side: float = 2.5) -> Figure:
    """Draw image, target, prediction and their difference, of values, a row an example, with colour bars.

    Parameters
    ----------
    examples : sequence of Example
    side : float, default 2.5
        Width of a panel, inches.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = [a[e.compared & np.isfinite(a)] for e in examples for a in (e.target, e.prediction)]
    apart = [(e.prediction - e.target)[e.compared] for e in examples]
    low, high = _range(np.concatenate(values))
    most = max(np.abs(_range(np.concatenate(apart)))) or 1.0
    scales = [
        ScalarMappable(Normalize(low, high), "viridis"),
        ScalarMappable(Normalize(-most, most), "PuOr"),
    ]
    titles = ("Image", "Target", "Prediction", "Prediction - target")
    rows = [[e.picture, e.target, e.prediction, e.prediction - e.target] for e in examples]
    figure, cells = _grid(rows, [e.title for e in examples], titles, side, 0.5)
    for example, row, axes_of_row in zip(examples, rows, cells, strict=True):
        for number, (panel, axes) in enumerate(zip(row, axes_of_row, strict=True)):
            if number:
                colored = scales[number == 3].to_rgba(np.asarray(panel, np.float64), bytes=True)[..., :3]
                known = np.isfinite(panel) if number == 2 else example.compared & np.isfinite(panel)
                panel = np.where(known[..., None], colored, np.array(rgb(GREY), np.uint8))
            axes.imshow(_blanked(panel, example.valid), interpolation="nearest", aspect="auto")
    width, height = figure.get_size_inches()
    for first, last, scale in ((1, 2, scales[0]), (3, 3, scales[1])):
        left, right = cells[-1][first].get_position().x0, cells[-1][last].get_position().x1
        axes = figure.add_axes((left + 0.3 / width, 0.3 / height, right - left - 0.6 / width, 0.1 / height))
        figure.colorbar(scale, cax=axes, orientation="horizontal").ax.tick_params(labelsize=8)
    return figure


@_drawn
def draw_scenes(
    pictures: Sequence[Pixels],
    captions: Sequence[str],
    right: Sequence[bool | None],
    titles: Sequence[str] | None = None,
    *,
    side: float = 2.5,
) -> Figure:
    """Draw images of which each has one target, with a caption that says it and what is predicted.

    Parameters
    ----------
    pictures : sequence of ndarray
        (H, W, 3), uint8.
    captions : sequence of str
        Of one line or two.
    right : sequence of bool or None
        Whether the prediction is; None for values.
    titles : sequence of str, optional
        Where each lies.
    side : float, default 2.5
        Width of a picture, inches.
    """
    columns = min(4, len(pictures))
    rows = [list(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]
    places = list(titles or [""] * len(pictures))
    figure, cells = _grid(rows, [""] * len(rows), None, side, 0.0, gap=0.62, columns=columns)
    for number, picture in enumerate(pictures):
        axes = cells[number // columns][number % columns]
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        mark, color = {True: ("✓ ", TRAINING), False: ("✗ ", WRONG), None: ("", "black")}[right[number]]
        axes.set_title(mark + _plain(captions[number], 80), fontsize=9, color=color, loc="left", pad=3)
        axes.set_xlabel(_plain(places[number], 60), fontsize=6, labelpad=2)
    return figure


def _grid(
    rows: Sequence[Sequence[NDArray[Any]]],
    row_titles: Sequence[str],
    titles: Sequence[str] | None,
    side: float,
    below: float,
    *,
    gap: float = 0.12,
    columns: int | None = None,
) -> tuple[Figure, list[list[Any]]]:
    """Return a figure with axes for rows of pictures; laid out by hand, which takes a tenth of matplotlib's time."""
    from matplotlib.figure import Figure

    columns, margin, above = columns or len(rows[0]), 0.1, 0.3 if titles else 0.45
    heads = [0.22 if title else 0.0 for title in row_titles]
    heights = [side * row[0].shape[0] / row[0].shape[1] for row in rows]
    width = columns * side + (columns - 1) * 0.08 + 2 * margin
    height = above + sum(heads) + sum(heights) + gap * len(rows) + below
    figure = Figure(figsize=(width, height))
    cells: list[list[Any]] = []
    top = height - above
    for row, head, tall, title in zip(rows, heads, heights, row_titles, strict=True):
        if title:
            figure.text(margin / width, (top - 0.14) / height, _plain(title, 140), fontsize=7.5, color="0.3")
        top -= head
        cells.append([])
        for number in range(len(row)):
            left = margin + number * (side + 0.08)
            axes = figure.add_axes((left / width, (top - tall) / height, side / width, tall / height))
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(linewidth=0.5, color="0.7")
            if titles and len(cells) == 1:
                place = (left / width, (height - 0.2) / height)
                figure.text(*place, _plain(titles[number], 40), fontsize=9.5, weight="bold")
            cells[-1].append(axes)
        top -= tall + gap
    return figure, cells


def _legend(figure: Any, entries: Sequence[tuple[str, str]], where: str, columns: int) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=color, edgecolor="0.5", linewidth=0.5) for color, _ in entries]
    labels = [_plain(name) for _, name in entries]
    figure.legend(
        patches, labels, loc=where, bbox_to_anchor=(float(where.endswith("right")), 0), ncols=columns, frameon=False,
        fontsize=8, borderaxespad=0.4, handlelength=1.4, labelspacing=0.35,
    )  # fmt: skip


def _columns(names: Sequence[str], width: float) -> int:
    """Return how many columns of names fit into a width in inches."""
    longest = max((len(_shortened(name)) for name in names), default=1)
    return max(1, min(len(names), int(width / (0.075 * longest + 0.5))))


def _numbers(labels: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """Return class numbers, with ``num_classes`` for all that are none."""
    labels = labels.astype(np.int64)
    return np.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def _blanked(panel: NDArray[Any], valid: NDArray[np.bool_] | None) -> NDArray[Any]:
    return panel if valid is None else np.where(valid[..., None], panel, np.uint8(255))


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """Return the 2nd and 98th percentile of what is finite."""
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values.astype(np.float64), (2, 98)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


# ---- figures -------------------------------------------------------------------------------------------------------


@_drawn
def draw_curves(
    history: Mapping[str, Sequence[float]], epochs: Sequence[int] | None = None, best: int | None = None
) -> Figure:
    """Draw each figure of training and validation by epoch.

    Parameters
    ----------
    history : mapping of str to sequence of float
        ``train_<figure>`` and ``val_<figure>``, one value an epoch; NaN leaves a gap. Figures of single classes,
        ``<figure>/<class>``, and names that begin otherwise are left out.
    epochs : sequence of int, optional
        Numbers of the epochs; from 1 by default.
    best : int, optional
        The epoch to be marked.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = curve_names(history)
    columns = min(max(len(names), 1), 3)
    rows = max(-(-len(names) // columns), 1)
    figure = Figure(figsize=(3.9 * columns, 2.7 * rows + 0.3))
    left, right, bottom, top = 0.55 / (3.9 * columns), 0.1 / (3.9 * columns), 0.42, 0.58
    figure.subplots_adjust(
        left=left, right=1 - right, bottom=bottom / (2.7 * rows + 0.3), top=1 - top / (2.7 * rows + 0.3),
        wspace=0.2, hspace=0.42,
    )  # fmt: skip
    handles: dict[str, Any] = {}
    numbers = list(range(1, max(map(len, history.values()), default=0) + 1)) if epochs is None else list(epochs)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        for part, color, label in (("train", TRAINING, "training"), ("val", VALIDATION, "validation")):
            values = np.asarray(history.get(f"{part}_{name}", ()), np.float64)
            if np.isfinite(values).any():
                at = np.array(numbers[: len(values)])
                values = np.where(np.isfinite(values), values, np.nan)
                marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(values) <= 60 else {}
                handles.setdefault(label, axes.plot(at, values, color=color, linewidth=1.4, **marker)[0])
                if best is not None and part == "val" and best in at:
                    axes.plot([best], values[at == best], "o", color=color, markersize=7, fillstyle="none")
        if best is not None:
            marked = axes.axvline(best, color="0.55", linewidth=1, linestyle=":")
            handles.setdefault(f"best epoch ({best})", marked)
        axes.set_title(_plain(title_of(name), 40), fontsize=10, loc="left")
        if numbers:
            rim = max(0.03 * (numbers[-1] - numbers[0]), 0.2)
            axes.set_xlim(numbers[0] - rim, numbers[-1] + rim)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        if number >= len(names) - columns:
            axes.set_xlabel("epoch", fontsize=8)
    figure.legend(
        list(handles.values()), list(handles), loc="upper right", ncols=3, frameon=False, fontsize=8, borderaxespad=0.2
    )
    return figure


def curve_names(history: Iterable[str]) -> list[str]:
    """Return the figures that `draw_curves` draws: those of training or validation, without those of single classes.

    Parameters
    ----------
    history : iterable of str
        Names in a run's history, such as those of ``trainer.history``.
    """
    parts = (name.partition("_") for name in history if "/" not in name)
    return list(dict.fromkeys(figure for part, _, figure in parts if part in ("train", "val") and figure))


def title_of(name: str) -> str:
    """Return what a figure is called in a picture.

    Parameters
    ----------
    name : str
        As in the logs, without ``train_`` or ``val_``.
    """
    words = name.replace("_", " ")
    return "IoU" if name == "iou" else words[:1].upper() + words[1:]


@_drawn
def draw_confusion(matrix: NDArray[np.integer[Any]], names: Sequence[str]) -> Figure:
    """Draw a confusion matrix, normalised by true class.

    Parameters
    ----------
    matrix : ndarray of int
        Counts (K, K); rows are true classes, columns predicted ones.
    names : sequence of str
        Of the K classes.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(matrix, np.float64)
    support, classes = counts.sum(1), len(names)
    percent = np.divide(100 * counts, support[:, None], out=np.full_like(counts, np.nan), where=support[:, None] > 0)
    cell = min(max(5.0 / classes, 0.2 if classes > MOST_WRITTEN else 0.38), 0.8)
    longest = max(len(_shortened(name)) for name in names)
    size = max(cell * classes, 1.5)
    font = 8 if classes <= MOST_WRITTEN else 6.5
    label, numbers = longest * 0.0088 * font + 0.35, max(len(f"{int(n):,}") for n in support) * 0.0088 * font + 0.25
    below, above = label + 0.1, 0.5
    width, height = label + size + numbers + 0.95, above + size + below
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((label / width, below / height, size / width, size / height))
    shown = axes.imshow(np.ma.masked_invalid(percent), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_facecolor(GREY)
    shorts = [_plain(name) for name in names]
    axes.set_yticks(range(classes), shorts, fontsize=font)
    axes.set_xticks(range(classes), shorts, fontsize=font, rotation=90)
    axes.set_ylabel("true class", fontsize=9)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_title("Percent of each true class", fontsize=10, loc="left")
    axes.tick_params(length=2)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(classes), [f"{int(n):,}" for n in support], fontsize=font)
    beside.tick_params(length=0)
    beside.set_ylabel("support", fontsize=9)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    for row, col in np.argwhere(percent >= 0.5) if classes <= MOST_WRITTEN else ():
        value = percent[row, col]
        axes.text(
            col, row, f"{value:.0f}", ha="center", va="center", fontsize=min(font, 22 * cell),
            color="white" if value > 55 else "0.15",
        )  # fmt: skip
    bar = figure.add_axes(((width - 0.5) / width, below / height, 0.12 / width, min(size, 2.5) / height))
    figure.colorbar(shown, cax=bar).ax.tick_params(labelsize=7)
    bar.set_title("%", fontsize=8)
    return figure


# ---- files ---------------------------------------------------------------------------------------------------------


def png(pixels: Pixels) -> bytes:
    """Return a picture as PNG.

    Parameters
    ----------
    pixels : ndarray
        (H, W, 3), uint8.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _shortened(text: str, most: int = _NAME) -> str:
    text = " ".join(text.split(" ")) if "\n" in text else text
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _plain(text: str, most: int = _NAME) -> str:
    """Return a text as matplotlib is to be given it: cut, and with dollars that begin no formula."""
    text = _shortened(text, most).replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text  # a label with it would be left out
