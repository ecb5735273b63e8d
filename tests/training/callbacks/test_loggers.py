"""What is written down of a run: right, once, whatever happens to the run."""

import csv
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from logging_victim import EPOCHS, MAKE, STEPS, build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from waiting import NoSynchronisation

from ununennium.training import Callback, CheckpointCallback, CSVLogger, Logger, TensorBoardLogger, Trainer
from ununennium.training.callbacks import logger as base
from ununennium.training.callbacks.logger import flattened

SCRIPT = Path(__file__).with_name("logging_victim.py")
OF_THE_MACHINE = {"chips_per_second", "data_wait", "seconds", "memory"}
WHOLE = [("step", s) for s in range(1, EPOCHS * STEPS + 1)] + [("epoch", s * STEPS) for s in range(1, EPOCHS + 1)]
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")


# What is in the logs: of (kind, step) by name all values, in order


def in_csv(folder):
    found = defaultdict(list)
    for kind in ("step", "epoch"):
        path = folder / "log" / f"{kind}s.csv"
        if not path.exists():
            continue
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name not in OF_THE_MACHINE:
                        found[kind, int(row["step"]), name].append(float(value))
    return found


def in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "log"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found = defaultdict(list)
    for tag in events.Tags()["scalars"]:
        kind, _, name = tag.partition("/")
        for event in events.Scalars(tag):
            if name not in OF_THE_MACHINE:
                found[kind, event.step, name].append(event.value)
    return found


def in_mlflow(folder):
    found = defaultdict(list)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
        for key, step, value in database.execute("select key, step, value from metrics order by timestamp"):
            kind, _, name = key.partition("/")
            if name not in OF_THE_MACHINE:
                found[kind, step, name].append(value)
    return found


def in_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    from ununennium.training.callbacks.wandb_logger import _records

    found, ids = defaultdict(list), set()
    for path in sorted((folder / "log").glob("wandb/offline-run-*/*.wandb")):
        ids.add(path.name)
        for content in _records(path.read_bytes()):
            record = Record.FromString(content)
            figures = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for kind in ("step", "epoch"):
                if f"{kind}/train_loss" in figures:
                    step = int(figures[f"{kind}/optimizer_step"])
                    for key, value in figures.items():
                        name = key.removeprefix(f"{kind}/")
                        if key.startswith(kind) and name not in OF_THE_MACHINE:
                            found[kind, step, name].append(float(value))
    assert len(ids) == 1
    return found


READ = {"csv": in_csv, "tensorboard": in_tensorboard, "mlflow": in_mlflow, "wandb": in_wandb}


def assert_whole(found, expected=None):
    """Every step and epoch once, with the values that the uncut run has, bit for bit."""
    assert sorted({(kind, step) for kind, step, _ in found}) == sorted(WHOLE)
    assert {len(values) for values in found.values()} == {1}
    assert {name for kind, _, name in found if kind == "step"} >= {"train_loss", "lr", "gradient_norm"}
    assert {name for kind, _, name in found if kind == "epoch"} >= {"train_loss", "val_loss", "val_iou", "epoch"}
    if expected is not None:
        assert found == expected


# What a row holds


class Notes(Logger):
    """All that a logger needs to be."""

    def __init__(self, every_n_steps=1):
        super().__init__(every_n_steps)
        self.rows = []

    def write(self, step, values):
        self.rows.append((step, dict(values)))


class Remembers(Callback):
    def __init__(self):
        self.losses, self.rates, self.norms = [], [], []

    def on_batch_start(self, trainer, batch_idx):
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])

    def on_batch_end(self, trainer, batch_idx, logs):
        self.losses.append(float(logs["train_loss"]))
        self.norms.append(float(trainer.gradient_norm))


@pytest.mark.parametrize("after", [False, True], ids=["before the scheduler", "after the scheduler"])
def test_one_method_is_enough_and_gets_everything(tmp_path, after):
    notes, truth = Notes(), Remembers()
    where = {"loggers": [notes]} if after else {"loggers": [], "first": [notes]}
    trainer = build(tmp_path, callbacks=[truth], accumulation=1, **where)
    trainer.fit(2)
    steps = [(step, values) for step, values in notes.rows if "step/lr" in values]
    assert [step for step, _ in steps] == list(range(1, 19))
    assert [values["step/train_loss"] for _, values in steps] == truth.losses
    assert [values["step/lr"] for _, values in steps] == truth.rates  # with which the step was made
    assert [values["step/gradient_norm"] for _, values in steps] == truth.norms
    epochs = [(step, values) for step, values in notes.rows if "epoch/epoch" in values]
    assert [(step, values["epoch/epoch"]) for step, values in epochs] == [(9, 1.0), (18, 2.0)]
    for name, figures in trainer.history.items():
        assert [values[f"epoch/{name}"] for _, values in epochs] == figures
    assert all(values["epoch/chips_per_second"] > 0 for _, values in epochs)
    assert all(0 <= values["epoch/data_wait"] <= 1 for _, values in epochs)
    assert [step for step, _ in notes.rows] == sorted(step for step, _ in notes.rows)


def test_figures_that_later_callbacks_add_are_in(tmp_path):
    class Adds(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            logs["score"] = np.float32(epoch + 0.5)

    notes = Notes()
    build(tmp_path, [notes], callbacks=[Adds()]).fit(2)
    assert [values["epoch/score"] for _, values in notes.rows if "epoch/epoch" in values] == [0.5, 1.5]


def test_the_loss_of_a_step_is_over_all_targets_of_its_batches():
    """Not a mean of means (trap 2)."""
    images = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    masks = torch.randint(0, 2, (6, 4, 4))
    masks[2:4, 1:] = 255
    masks[4:] = 255
    model = nn.Conv2d(2, 2, 1).double()
    before = [F.cross_entropy(model(images[a:b]), masks[a:b], ignore_index=255).item() for a, b in [(0, 4), (0, 6)]]
    notes = Notes()
    loader = DataLoader(TensorDataset(images, masks), 2)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.0), nn.CrossEntropyLoss(ignore_index=255)
    common = {"callbacks": [notes], "device": "cpu", "progress": False}
    Trainer(model, optimizer, loss_fn, loader, gradient_accumulation_steps=2, **common).fit(1)
    assert notes.rows[0][1]["step/train_loss"] == pytest.approx(before[0], rel=1e-14)
    notes.rows.clear()
    Trainer(model, optimizer, loss_fn, loader, gradient_accumulation_steps=3, **common).fit(1)
    assert notes.rows[0][1]["step/train_loss"] == pytest.approx(before[1], rel=1e-14)


def test_every_nth_step_counts_over_epochs_and_parameter_groups_have_their_rates():
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": torch.tensor(0.5)}]
    notes = Notes(every_n_steps=3)
    batches = [(torch.ones(2, 2), torch.ones(2, 1))] * 4
    Trainer(model, torch.optim.SGD(groups), nn.MSELoss(), batches, callbacks=[notes], device="cpu", progress=False).fit(
        3
    )
    steps = [(step, values) for step, values in notes.rows if "epoch/epoch" not in values]
    assert [step for step, _ in steps] == [3, 6, 9, 12]
    assert set(steps[0][1]) == {"step/train_loss", "step/lr/0", "step/lr/1"}
    assert (steps[0][1]["step/lr/0"], steps[0][1]["step/lr/1"]) == (0.1, 0.5)


def test_a_step_that_did_not_happen_is_not_logged(tmp_path):
    class Spoils(Callback):
        def on_batch_start(self, trainer, batch_idx):
            with torch.no_grad():
                trainer.loss_fn.weight = torch.tensor([1.0, 1.0, math.inf if batch_idx == 3 else 1.0])

    notes = Notes()
    trainer = build(tmp_path, [notes], callbacks=[Spoils()], accumulation=1, on_nonfinite="skip")
    trainer.fit(1)
    assert trainer.state.nonfinite_steps == 1
    assert [step for step, values in notes.rows if "step/lr" in values] == list(range(1, 9))


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_a_cadence_that_is_none_is_refused(number):
    with pytest.raises((TypeError, ValueError), match=r"every_n_steps must be (an integer of )?at least 1"):
        CSVLogger("log", every_n_steps=number)


def test_a_logger_without_write_says_so(tmp_path):
    with pytest.raises(NotImplementedError, match=r"Logger has to define write\(step, values\)"):
        build(tmp_path, [Logger()]).fit(1)


# Once, whatever happens


@pytest.mark.parametrize("together", [0, 2, 64], ids=lambda n: f"{n + 1} rows at once")
def test_a_run_resumed_from_any_checkpoint_has_the_log_of_the_uncut_one(tmp_path, monkeypatch, together):
    """The log is left as it was at the very end, or as a kill after the next epoch would leave it."""
    monkeypatch.setattr(base, "_TOGETHER", together)
    names = ["csv", "tensorboard"]
    whole = tmp_path / "whole"
    build(whole, [MAKE[n](whole) for n in names], unseeded=False, checkpoints={"keep_last": 1000}).fit(EPOCHS)
    expected = {name: READ[name](whole) for name in names}
    for found in expected.values():
        assert_whole(found)
    checkpoints = sorted((whole / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[2]))
    assert len(checkpoints) == EPOCHS * (STEPS + 1)  # also before each validation
    for checkpoint in checkpoints[:: 1 if together == 2 else 4]:
        folder = tmp_path / checkpoint.name
        shutil.copytree(whole / "log", folder / "log")
        build(folder, [MAKE[n](folder) for n in names]).fit(EPOCHS, resume=checkpoint)
        for name in names:
            assert_whole(READ[name](folder), expected[name])


def start(folder, names, **environment):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **QUIET, **environment}, start_new_session=True,
    )  # fmt: skip


def killed_until_done(folder, names, kills):
    """Start the victim, and kill it and what it has started so many times at random moments; then let it end.

    What is killed before its first checkpoint leaves nothing to resume: the next start is a new run.
    """
    draw = random.Random()
    for kill in range(kills + 1):
        process = start(folder, names, SECONDS="0.05")
        try:
            assert process.stdout.readline() == "started\n", process.stderr.read()
            if kill < kills:
                while not (folder / "checkpoints" / "last").exists():
                    time.sleep(0.01)
                time.sleep(draw.uniform(0.0, 1.0) + (kill > 0) * draw.choice([0.0, 1.0, 3.0]))
            else:
                process.wait(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            _, errors = process.communicate()
        if process.returncode == 0:
            return
        assert process.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize(
    ("names", "kills"),
    [
        pytest.param(["csv", "tensorboard"], 1, id="csv+tensorboard"),
        pytest.param(["csv", "tensorboard"], 6, id="csv+tensorboard, often", marks=pytest.mark.soak),
        pytest.param(["mlflow"], 3, id="mlflow", marks=[needs_mlflow, pytest.mark.soak]),
        pytest.param(["wandb"], 3, id="wandb", marks=[needs_wandb, pytest.mark.soak]),
    ],
)
@pytest.mark.timeout(900)
def test_killed_at_random_moments_each_step_is_there_once(tmp_path, names, kills):
    process = start(tmp_path / "whole", names)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    killed_until_done(tmp_path / "killed", names, kills)
    for name in names:
        expected = READ[name](tmp_path / "whole")
        assert_whole(expected)
        assert_whole(READ[name](tmp_path / "killed"), expected)


RESUMES_IN_PLACE = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from logging_victim import EPOCHS, MAKE, build
whole, name = Path(sys.argv[2]), sys.argv[3]
build(whole, [MAKE[name](whole)], unseeded=False, checkpoints={"keep_last": 1000}).fit(2)
checkpoints = sorted((whole / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[2]))
for checkpoint in (checkpoints[7], checkpoints[5]):  # inside the second epoch, at the end of the first
    build(whole, [MAKE[name](whole)], checkpoints={"keep_last": 1000}).fit(EPOCHS, resume=checkpoint)
"""


@pytest.mark.parametrize("name", [pytest.param("mlflow", marks=needs_mlflow), pytest.param("wandb", marks=needs_wandb)])
def test_a_log_that_forgets_nothing_is_given_nothing_twice(tmp_path, name):
    """In a process of its own: what these packages do to one is theirs."""
    done = subprocess.run(
        [sys.executable, "-c", RESUMES_IN_PLACE, str(SCRIPT.parent), str(tmp_path), name],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **QUIET},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = READ[name](tmp_path)
    assert_whole(found)
    assert found["epoch", 10, "epoch"] == [2.0]


def test_a_signal_ends_the_log_and_a_resume_goes_on_with_it(tmp_path):
    class Interrupts(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            if trainer.state.optimizer_steps == 7 and not trainer.resumes and not trainer.state.open_batches:
                os.kill(os.getpid(), signal.SIGINT)

    names = ["csv", "tensorboard"]
    first = build(tmp_path, [MAKE[n](tmp_path) for n in names], callbacks=[Interrupts()], unseeded=False)
    with pytest.raises(KeyboardInterrupt):
        first.fit(EPOCHS)
    for name in names:
        assert max(step for kind, step, _ in READ[name](tmp_path) if kind == "step") == 7
    build(tmp_path, [MAKE[n](tmp_path) for n in names]).fit(EPOCHS, resume="auto")
    for name in names:
        assert_whole(READ[name](tmp_path))


def test_an_error_leaves_a_complete_log(tmp_path):
    class Fails(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            if trainer.state.optimizer_steps == 3:
                raise RuntimeError("user")

    loggers = [MAKE[name](tmp_path) for name in ("csv", "tensorboard")]
    trainer = build(tmp_path, loggers, callbacks=[Fails()], accumulation=1)
    with pytest.raises(RuntimeError, match="user"):
        trainer.fit(1)
    assert sorted({step for _, step, _ in in_csv(tmp_path)}) == [1, 2, 3]
    assert sorted({step for _, step, _ in in_tensorboard(tmp_path)}) == [1, 2, 3]
    assert loggers[0]._tables["step"]._file is None


def test_fits_that_follow_each_other_are_one_log(tmp_path):
    names = ["csv", "tensorboard"]
    trainer = build(tmp_path, [MAKE[n](tmp_path) for n in names])
    trainer.fit(1)
    trainer.fit(2, start_epoch=1)
    trainer.fit(3, start_epoch=2)
    for name in names:
        assert_whole(READ[name](tmp_path))
    assert len(list((tmp_path / "log").glob("earlier*"))) == 0


def test_a_new_run_moves_what_is_there_aside(tmp_path):
    for epochs in (1, 2, 1):
        build(tmp_path, [MAKE["csv"](tmp_path), MAKE["tensorboard"](tmp_path)]).fit(epochs)
    log = tmp_path / "log"
    lines = [len((log / p / "epochs.csv").read_text().splitlines()) - 1 for p in ("earlier-1", "earlier-2", ".")]
    assert lines == [1, 2, 1]
    assert sorted(p.name for p in log.iterdir() if p.is_dir()) == ["earlier-1", "earlier-2"]
    assert [len(list((log / p).glob("events*"))) for p in ("earlier-1", "earlier-2", ".")] == [1, 1, 1]


def test_a_logger_may_join_a_resumed_run(tmp_path):
    build(tmp_path, []).fit(1)
    build(tmp_path, [MAKE["csv"](tmp_path)]).fit(2, resume="auto")
    found = in_csv(tmp_path)
    assert sorted({step for kind, step, _ in found if kind == "step"}) == list(range(STEPS + 1, 2 * STEPS + 1))
    assert (tmp_path / "log" / "hyperparameters.json").exists()


def test_the_loggers_do_not_change_the_run(tmp_path):
    def weights(folder, loggers):
        trainer = build(folder, loggers, unseeded=False)
        trainer.fit(2)
        return trainer.history, list(trainer.model.state_dict().values())

    plain, logged = weights(tmp_path / "a", []), weights(tmp_path / "b", [MAKE["csv"](tmp_path), Notes()])
    assert plain[0] == logged[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], logged[1], strict=True))


# The files


def test_the_set_up_is_written_once(tmp_path):
    build(tmp_path, [MAKE[n](tmp_path) for n in ("csv", "tensorboard")], config={"bands": ["B02", "B03"]}).fit(1)
    kept = json.loads((tmp_path / "log" / "hyperparameters.json").read_text())
    assert (kept["seed"], kept["optimizer"], kept["config"]) == (3, "AdamW", {"bands": ["B02", "B03"]})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "log")).Reload()
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("hyperparameters"))
    assert '| config.bands | ["B02", "B03"] |' in text
    assert "| seed | 3 |" in text


def test_nested_settings_become_one_level():
    assert flattened({"a": {"b": {"c": 1}}, "lr": [0.1], "d": None, "e": [1, 2]}) == {
        "a.b.c": 1,
        "lr": 0.1,
        "e": [1, 2],
    }


def test_csv_rows_may_get_columns_and_lose_what_was_half_written(tmp_path):
    class Adds(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            if epoch:
                logs["late"] = 7.0

    build(tmp_path, [MAKE["csv"](tmp_path)], callbacks=[Adds()]).fit(2)
    with (tmp_path / "log" / "epochs.csv").open(newline="") as file:
        assert [row["late"] for row in csv.DictReader(file)] == ["", "7.0"]
    steps = tmp_path / "log" / "steps.csv"
    before = steps.read_text()
    steps.write_text(before + "11,0.1\n1")
    build(tmp_path, [MAKE["csv"](tmp_path)], callbacks=[Adds()]).fit(2, resume="auto")
    assert steps.read_text() == before


def test_tensorboard_has_the_images(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, 3:] = 255, 128, 0

    class Draws(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            for callback in trainer.callbacks.callbacks:
                if isinstance(callback, Logger):
                    callback.log_image(trainer, "preview", image)

    folder = tmp_path / "whole"
    build(folder, [MAKE["tensorboard"](folder)], first=[Draws()], checkpoints={"keep_last": 100}).fit(2)

    def images(folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "log"), size_guidance={"images": 0}).Reload()
        return events.Images("preview")

    assert [(i.step, i.height, i.width) for i in images(folder)] == [(5, 4, 6), (10, 4, 6)]
    import io

    from PIL import Image

    assert np.array_equal(Image.open(io.BytesIO(images(folder)[0].encoded_image_string)), image)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        again = tmp_path / checkpoint.name
        shutil.copytree(folder / "log", again / "log")
        build(again, [MAKE["tensorboard"](again)], first=[Draws()]).fit(2, resume=checkpoint)
        assert [i.step for i in images(again)] == [5, 10], checkpoint
        assert all(len(values) == 1 for values in in_tensorboard(again).values()), checkpoint


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8)])
def test_an_image_of_another_kind_is_refused(tmp_path, image):
    logger = CSVLogger(tmp_path)
    with pytest.raises(ValueError, match=r"image 'x' must be uint8 of shape \(H, W, 3\)"):
        logger.log_image(None, "x", image)


# Nobody waits for the device


def test_on_an_accelerator_no_step_waits_for_its_values(tmp_path, monkeypatch):
    """Run on the CPU, with the way of an accelerator: values are asked for, and read when many steps more were made."""
    events = []
    notes = Notes()

    def reader(tensor):
        values = tensor.tolist()
        events.append(("asked", step[0]))

        def read():
            events.append(("read", step[0]))
            return values

        return read

    step = [0]
    guarded = [True]

    def within(hook):
        def call(self, trainer, *args):
            step[0] = trainer.state.optimizer_steps
            with NoSynchronisation() if guarded[0] else nullcontext():
                return hook(self, trainer, *args)

        return call

    monkeypatch.setattr(Logger, "on_batch_start", within(Logger.on_batch_start))
    monkeypatch.setattr(Logger, "on_batch_end", within(Logger.on_batch_end))
    monkeypatch.setattr(Logger, "_is_host", staticmethod(lambda device: False))
    monkeypatch.setattr(base, "_TOGETHER", 4)
    monkeypatch.setattr(base, "reader", reader)
    build(tmp_path, [notes], accumulation=1, checkpoints={"every_n_steps": 1}).fit(2)
    first, second = events[:2]
    assert first[0] == "asked"
    assert second == ("read", first[1] + 4)
    assert [step for step, values in notes.rows if "step/lr" in values] == list(range(1, 19))


# Several processes


def in_two_processes(rank, world, folder):
    torch.set_num_threads(1)
    notes, csv_logger, board = Notes(), CSVLogger(folder / "log"), TensorBoardLogger(folder / "log")
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    data = TensorDataset(torch.randn(12, 2), torch.randint(0, 2, (12,)))
    saver = CheckpointCallback(folder / "c", "train_loss")
    options = {"callbacks": [notes, csv_logger, board, saver], "distributed": True, "device": "cpu", "progress": True}
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), DataLoader(data, 2), seed=1, **options
    )
    csv_logger.log_image(trainer, "nothing", np.zeros((1, 1, 3), np.uint8))
    trainer.fit(1)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), DataLoader(data, 2), seed=1, **options
    )
    trainer.fit(2, resume="auto")
    return notes.rows


def test_of_two_processes_one_writes(tmp_path):
    sys.path.append(str(Path(__file__).parents[2] / "distributed"))
    from processes import run

    rows, none = run(2, in_two_processes, tmp_path / "results", tmp_path)
    assert none == []
    assert [step for step, values in rows if "step/lr" in values] == [1, 2, 3, 4, 5, 6]
    assert [line.split(",")[0] for line in (tmp_path / "log" / "steps.csv").read_text().splitlines()[1:]] == list(
        "123456"
    )
    assert len((tmp_path / "log" / "epochs.csv").read_text().splitlines()) == 3
