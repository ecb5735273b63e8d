"""Early stopping counts as Keras does."""

import math

import pytest

from ununennium.training import EarlyStoppingCallback


def keras_epochs(values, patience, mode, min_delta):
    """Count the epochs run by Keras's rule, written down again: wait >= patience stops, an improvement resets."""
    best, wait = math.inf if mode == "min" else -math.inf, 0
    for epoch, value in enumerate(values):
        wait += 1
        if (value + min_delta < best) if mode == "min" else (value - min_delta > best):
            best, wait = value, 0
            continue
        if wait >= patience and epoch > 0:
            return epoch + 1
    return len(values)


RUNS = [
    [5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0],
    [5.0, 6.0, 4.0, 4.5, 4.6, 3.9, 3.8, 3.8, 3.8, 3.8],
    [1.0, 0.95, 0.9, 0.85, 0.8, 0.75],
    [0.0, 0.0, -1.0, 0.0, 0.0, 0.0],
    [1.0, math.nan, math.nan, 0.5, math.nan, math.nan, math.nan],
]


@pytest.mark.parametrize("values", RUNS)
@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("min_delta", [0.0, 0.06])
def test_as_keras(scripted, values, patience, mode, min_delta):
    stopping = EarlyStoppingCallback("figure", patience, mode, min_delta)
    trainer = scripted(values, [stopping])
    trainer.fit(len(values))
    epochs = keras_epochs(values, patience, mode, min_delta)
    assert len(trainer.history["figure"]) == epochs
    assert stopping.stopped_epoch == (epochs - 1 if stopping.wait >= patience else None)


def test_memory_survives_a_resume(scripted, tmp_path):
    """Best value and patience go on where they were, at every epoch (trap 12)."""
    values = [3.0, 2.0, 2.5, 2.4, 2.3, 2.2]
    for cut in range(1, 5):
        first = scripted(values, [EarlyStoppingCallback("figure", 3, "min")])
        first.fit(cut)
        first.save(tmp_path / f"cut{cut}")
        stopping = EarlyStoppingCallback("figure", 3, "min")
        second = scripted(values, [stopping])
        second.load(tmp_path / f"cut{cut}")
        assert second.fit(6)["figure"] == values[:5]
        assert stopping.best == 2.0
        assert stopping.stopped_epoch == 4


def test_auto_asks_the_metric(scripted, monkeypatch):
    trainer = scripted([0.1, 0.2, 0.3], [EarlyStoppingCallback("figure", 1)])
    monkeypatch.setattr(trainer, "higher_is_better", lambda name: True)
    assert len(trainer.fit(3)["figure"]) == 3
    trainer = scripted([0.1, 0.2, 0.3], [EarlyStoppingCallback("figure", 1)])
    assert len(trainer.fit(3)["figure"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "maximum"},
        {"patience": -1},
        {"patience": "3"},
        {"patience": 1.5},
        {"min_delta": -0.1},
        {"min_delta": math.nan},
        {"min_delta": math.inf},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        EarlyStoppingCallback(**arguments)


def test_a_run_that_was_stopped_stays_stopped_until_it_has_more_patience(scripted, tmp_path):
    values = [1.0, 2.0, 3.0, 0.5]
    first = scripted(values, [EarlyStoppingCallback("figure", 2, "min")])
    first.fit(4)
    first.save(tmp_path / "c")
    again = scripted(values, [EarlyStoppingCallback("figure", 2, "min")])
    again.load(tmp_path / "c")
    assert again.fit(4)["figure"] == values[:3]
    patient = scripted(values, [EarlyStoppingCallback("figure", 5, "min")])
    patient.load(tmp_path / "c")
    assert patient.fit(4)["figure"] == values
