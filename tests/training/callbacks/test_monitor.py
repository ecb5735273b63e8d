"""The one rule of what is better (trap 19)."""

import math

import pytest

from ununennium.training.callbacks.monitor import best_epoch, is_better


@pytest.mark.parametrize(
    ("value", "best", "mode", "min_delta", "expected"),
    [
        (1.0, None, "min", 0.0, True),
        (0.0, None, "max", 0.0, True),
        (0.0, 0.5, "min", 0.0, True),  # 0.0 is a value
        (0.5, 0.0, "min", 0.0, False),
        (-0.1, 0.0, "min", 0.0, True),
        (0.1, 0.0, "max", 0.0, True),
        (math.nan, None, "min", 0.0, False),  # NaN is never best
        (math.nan, 1.0, "max", 0.0, False),
        (math.inf, 1.0, "max", 0.0, True),
        (1.0, 1.0, "min", 0.0, False),
        (0.75, 1.0, "min", 0.25, False),  # min_delta has to be exceeded
        (0.7, 1.0, "min", 0.25, True),
        (1.25, 1.0, "max", 0.25, False),
        (1.3, 1.0, "max", 0.25, True),
    ],
)
def test_is_better(value, best, mode, min_delta, expected):
    assert is_better(value, best, mode, min_delta) is expected


@pytest.mark.parametrize(("mode", "expected"), [("max", (1, 0.7)), ("min", (3, 0.2))])
def test_the_best_epoch_is_the_first_of_equals_among_those_that_have_the_figure(mode, expected):
    values = [math.nan, 0.7, 0.5, 0.2, 0.7, 0.2]
    records = [*((number, {"val_iou": value}) for number, value in enumerate(values)), (6, {"train_loss": 9.0})]
    assert best_epoch(records, "val_iou", mode) == expected
    assert best_epoch(records, "val_oa", mode) is None
    assert best_epoch(records[:1], "val_iou", mode) is None
