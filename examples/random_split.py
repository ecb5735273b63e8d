"""How much of a random split's validation pixels the training has seen, against a split by blocks.

The scene is Indian Pines: ``pip install "ununennium[demo]"``, then ``python examples/random_split.py``.
"""

import tempfile
from pathlib import Path

import numpy as np

from ununennium.data import Chips, Scene, Window, block_split
from ununennium.demo import write_indian_pines

CHIP, BLOCK, BUFFER, SHARE = 16, 24, 0, 0.7


def pixels_of(scene, windows, rim=0):
    """Return which pixels lie in windows, or not more than ``rim`` pixels beside them."""
    seen = np.zeros(scene.shape, dtype=bool)
    for row, col, height, width in windows:
        seen[max(row - rim, 0) : row + height + rim, max(col - rim, 0) : col + width + rim] = True
    return seen


def report(name, scene, labelled, train, val):
    """Print how many labelled validation pixels are in a training chip, and how many chips touch or overlap one."""
    trained, touched = pixels_of(scene, train), pixels_of(scene, train, rim=1)
    validated = pixels_of(scene, val) & labelled
    touching = np.mean([touched[w.row : w.row + w.height, w.col : w.col + w.width].any() for w in val])
    print(
        f"{name:28} {len(train):5} and {len(val):4} chips; of the labelled validation pixels "
        f"{(trained & validated).sum() / validated.sum():6.1%} are in a training chip; {touching:6.1%} of the "
        "validation chips overlap or touch one"
    )


def main():
    """Compare random splits of chips at three strides with a split by blocks."""
    with tempfile.TemporaryDirectory() as folder:
        image, label = write_indian_pines(Path(folder))
        scene = Scene(image, label)
        _, labelled = scene.read_label(Window(0, 0, *scene.shape))
        draw = np.random.default_rng(0)
        for stride in (1, CHIP // 2, CHIP):
            windows = [window for _, window in Chips(scene, CHIP, stride=stride).windows]
            order = draw.permutation(len(windows))
            cut = round(SHARE * len(windows))
            train, val = ([windows[i] for i in part] for part in (order[:cut], order[cut:]))
            report(f"at random, stride {stride}", scene, labelled, train, val)
        split = block_split(scene, {"train": SHARE, "val": 1 - SHARE}, BLOCK, BUFFER)
        parts = [[w for _, w in Chips(scene, CHIP, stride=1, region=split[part]).windows] for part in ("train", "val")]
        report(f"by blocks of {BLOCK}", scene, labelled, *parts)


if __name__ == "__main__":
    main()
