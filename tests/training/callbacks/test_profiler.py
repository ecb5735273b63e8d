"""A trace that opens, a table, and a run that goes on whatever happens."""

import json

import pytest
import torch
from test_ema import trainer_of

from ununennium.training import Callback, ProfilerCallback


@pytest.mark.parametrize(("first", "last"), [(1, 2), (0, 0)])
def test_the_trace_holds_the_steps_that_were_asked_for(tmp_path, first, last):
    trainer_of([ProfilerCallback(tmp_path / "p", first, last)], gradient_accumulation_steps=2).fit(2)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["trace-0.json", "trace-0.txt"]
    events = json.loads((tmp_path / "p" / "trace-0.json").read_text())["traceEvents"]
    forwards = [e for e in events if e.get("name") == "aten::cross_entropy_loss"]
    steps = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == last - first + 1
    assert len(forwards) == 2 * len(steps)
    table = (tmp_path / "p" / "trace-0.txt").read_text()
    assert "aten::convolution" in table
    assert "Self CPU" in table


def test_a_shorter_run_writes_what_there_is_and_a_run_that_is_too_short_nothing(tmp_path):
    trainer_of([ProfilerCallback(tmp_path / "a", 3, 100)]).fit(1)
    events = json.loads((tmp_path / "a" / "trace-0.json").read_text())["traceEvents"]
    assert len([e for e in events if e.get("name", "").startswith("Optimizer.step")]) == 3
    trainer_of([ProfilerCallback(tmp_path / "b", 50, 60)]).fit(1)
    assert not (tmp_path / "b").exists()


def test_a_second_fit_is_recorded_anew(tmp_path):
    trainer = trainer_of([ProfilerCallback(tmp_path, 0, 1)])
    trainer.fit(1)
    before = (tmp_path / "trace-0.json").stat().st_ino
    trainer.fit(2, start_epoch=1)
    assert (tmp_path / "trace-0.json").stat().st_ino != before


def test_training_is_the_same_to_the_bit(tmp_path):
    assert trainer_of([ProfilerCallback(tmp_path, 1, 2)]).fit(1) == trainer_of([]).fit(1)


def test_a_folder_that_can_not_be_written_to_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    trainer = trainer_of([ProfilerCallback(tmp_path / "file" / "in", 1, 2)])
    with pytest.warns(UserWarning, match=r"could not be profiled \(NotADirectoryError.*; the run goes on"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 6


def test_another_profiler_that_is_running_is_a_warning(tmp_path):
    trainer = trainer_of([ProfilerCallback(tmp_path, 1, 2)])
    with torch.profiler.profile() as theirs, pytest.warns(UserWarning, match="another profiler is running"):
        trainer.fit(1)
    assert any(event.key == "aten::cross_entropy_loss" for event in theirs.key_averages())
    assert trainer.state.optimizer_steps == 6


def test_it_ends_with_a_run_that_fails(tmp_path):
    class Fails(Callback):
        def on_batch_start(self, trainer, batch_idx):
            if batch_idx == 3:
                raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        trainer_of([ProfilerCallback(tmp_path, 1, 50), Fails()]).fit(1)
    assert (tmp_path / "trace-0.json").exists()
    trainer_of([ProfilerCallback(tmp_path, 1, 2)]).fit(1)  # no profiler was left running


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"first_step": -1}, ValueError, "first_step must be at least 0"),
        ({"first_step": 5, "last_step": 4}, ValueError, "last_step must be at least first_step"),
        ({"num_operators": 1.5}, TypeError, "num_operators must be an integer"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        ProfilerCallback(tmp_path, **arguments)
