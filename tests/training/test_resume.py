"""Killed anywhere and resumed, a run ends with the same bits (traps 9-13)."""

import json
import math
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from victim import ACCUMULATION, BATCH, EPOCHS, SAMPLES, STEPS, Augmented, Log, build, digest, network, start_victim

from ununennium.losses import DiceLoss
from ununennium.metrics import IoU
from ununennium.training import (
    Callback,
    CheckpointCallback,
    CheckpointError,
    EarlyStoppingCallback,
    LRSchedulerCallback,
    Trainer,
)
from ununennium.training.checkpoint import read
from ununennium.training.errors import DataOrderError
from ununennium.training.loading import EpochLoader

BATCHES = -(-SAMPLES // BATCH)


def whole_run(folder, **kwargs):
    """Train without being stopped, keeping every checkpoint; return the Trainer, its digest and the checkpoints."""
    random.seed(1), np.random.seed(1)
    trainer = build(folder, seed=3, unseeded=False, checkpoints={"keep_last": 1000}, **kwargs)
    trainer.fit(EPOCHS)
    return trainer, digest(trainer), checkpoints_in(folder)


def checkpoints_in(folder):
    return sorted((p for p in folder.glob("step-*") if not p.is_symlink()), key=lambda p: p.name.split("-")[2])


def resumed(checkpoint, folder, **kwargs):
    """Go on from a checkpoint to the end, in another folder; return the Trainer and its digest."""
    trainer = build(folder, checkpoints={"keep_last": 1000}, **kwargs)
    trainer.fit(EPOCHS, resume=checkpoint)
    return trainer, digest(trainer)


def position(checkpoint):
    return json.loads((checkpoint / "manifest.json").read_text())["position"]


@pytest.mark.parametrize("precision", [False, True, "fp16"])
def test_every_checkpoint_leads_to_the_same_bits(tmp_path, precision):
    """Every optimizer step is a legal place to die; rates, patience, best value and scale are compared, too."""
    _, expected, checkpoints = whole_run(tmp_path / "whole", mixed_precision=precision)
    if precision == "fp16":
        scales = {tuple(read(c).training["precision"][k] for k in ("scale", "_growth_tracker")) for c in checkpoints}
        assert scales == {(8.0 * 2.0 ** (step // 3), step % 3) for step in range(1, STEPS + 1)}
    places = [(position(c)["epoch"], position(c)["batch"]) for c in checkpoints]
    inside = [(epoch, batch) for epoch in range(EPOCHS) for batch in (4, 8, 12, BATCHES)]
    assert places == sorted([*inside, *((epoch, 0) for epoch in range(1, EPOCHS + 1))])
    for checkpoint in checkpoints:
        trainer, found = resumed(checkpoint, tmp_path / f"from-{checkpoint.name}", mixed_precision=precision)
        assert found == expected, checkpoint
        assert trainer.state.seed == 3


def test_checkpoints_lead_to_the_same_mean_of_the_last_epochs_and_the_same_freed_layers(tmp_path):
    whole, expected, checkpoints = whole_run(tmp_path / "whole", average="swa")
    assert checkpoints[-1].name.startswith("step-00000016")
    for checkpoint in checkpoints[1::3]:
        trainer, found = resumed(checkpoint, tmp_path / f"from-{checkpoint.name}", average="swa")
        assert found == expected, checkpoint
        assert torch.equal(trainer.model[0].weight, whole.model[0].weight)


def test_workers_change_no_bit_before_or_after(tmp_path):
    _, expected, checkpoints = whole_run(tmp_path / "whole")
    _, in_workers, there = whole_run(tmp_path / "workers", workers=2)
    assert in_workers == expected
    for number, checkpoint in enumerate([checkpoints[1], checkpoints[3], there[7]]):
        assert resumed(checkpoint, tmp_path / f"{number}", workers=2)[1] == expected
    assert resumed(there[6], tmp_path / "none", workers=0)[1] == expected


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_batch_replayed_or_skipped_on_purpose_is_seen(tmp_path, monkeypatch, off_by):
    """The control: without it the tests above might compare what can't differ (trap 13)."""
    _, expected, checkpoints = whole_run(tmp_path / "whole")
    honest = EpochLoader.epoch

    def elsewhere(self, seed, epoch, start=0, digest=None, state=None):
        return honest(self, seed, epoch, start + off_by if start else 0)

    monkeypatch.setattr(EpochLoader, "epoch", elsewhere)
    assert resumed(checkpoints[1], tmp_path / "resumed")[1] != expected


@pytest.mark.parametrize("forgotten", ["figures", "random", "digest", "callbacks", "optimizer", "precision"])
def test_each_part_of_the_state_is_compared(tmp_path, monkeypatch, forgotten):
    """Controls again: a checkpoint that leaves something out ends elsewhere, or is refused."""
    from ununennium.training import checkpoint as package

    options = {"mixed_precision": "fp16"} if forgotten == "precision" else {}
    _, expected, checkpoints = whole_run(tmp_path / "whole", **options)
    contents = package.read(checkpoints[5])
    training = contents.training
    if forgotten == "figures":
        training["figures"]["train"]["loss"] |= {"host": (0.0, 0.0, math.inf)}
    if forgotten == "random":
        training["random"][2] = torch.get_rng_state()
    if forgotten == "digest":
        training["state"]["digest"] = "0" * 32
    if forgotten == "callbacks":
        training["callbacks"][2][1]["scheduler"]["last_epoch"] -= 1
    if forgotten == "optimizer":
        training["optimizer"]["state"] = {}
    if forgotten == "precision":
        training["precision"]["_growth_tracker"] = 0  # how many steps have gone well at this scale
    package.write(tmp_path / "less", contents)
    if forgotten == "digest":
        with pytest.raises(DataOrderError):
            resumed(tmp_path / "less", tmp_path / "resumed")
    else:
        assert resumed(tmp_path / "less", tmp_path / "resumed", **options)[1] != expected


def test_the_samples_are_those_of_the_whole_run_and_none_is_loaded_again(tmp_path):
    """Trap 9: neither replayed nor skipped, and what was passed is never loaded."""
    whole_data = Augmented()
    whole, _, checkpoints = whole_run(tmp_path / "whole", data=whole_data)
    for checkpoint in checkpoints[::3]:
        data = Augmented()
        trainer, _ = resumed(checkpoint, tmp_path / checkpoint.name, data=data)
        logs = [next(c for c in t.callbacks.callbacks if isinstance(c, Log)) for t in (whole, trainer)]
        assert logs[0].samples == logs[1].samples
        at = position(checkpoint)
        passed = at["epoch"] * SAMPLES + min(at["batch"] * BATCH, SAMPLES)
        assert data.loaded == whole_data.loaded[passed:]


def kill_until_it_ends(folder, workers, kills, draw, **environment):
    """Start the victim again and again, and kill it at random; return how it ended, and how often it was killed."""
    killed = 0
    while True:
        victim = start_victim(folder, workers, **environment)
        if killed < kills:
            victim.stdout.readline()
            time.sleep(draw.uniform(0, 0.3 if workers == 0 else 0.8))
            victim.send_signal(signal.SIGKILL)
        out, errors = victim.communicate(timeout=120)
        if victim.returncode == 0:
            return json.loads(out.splitlines()[-1]), killed
        assert victim.returncode == -signal.SIGKILL, errors
        killed += 1


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, workers):
    kill_at_random(tmp_path, workers, kills=2)


def test_killed_at_random_moments_the_mean_of_the_last_epochs_has_the_same_bits(tmp_path):
    kill_at_random(tmp_path, 0, kills=1, AVERAGE="swa")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_fifty_times(tmp_path, workers):
    kill_at_random(tmp_path, workers, kills=50)


def kill_at_random(tmp_path, workers, kills, **environment):
    """The victim takes a second or two: several runs of it are killed until so many kills have met one."""
    draw = random.Random(workers)
    expected, _ = kill_until_it_ends(tmp_path / "whole", workers, 0, draw, **environment)
    met = 0
    while met < kills:
        found, killed = kill_until_it_ends(tmp_path / f"{met}", workers, kills - met, draw, **environment)
        assert found == expected
        met += max(killed, 1)


def test_the_same_command_line_serves_the_first_start_and_every_other(tmp_path):
    first = build(tmp_path, seed=3)
    first.fit(1, resume="auto")
    assert first.state.optimizer_steps == 4
    second = build(tmp_path)
    second.fit(2, resume="auto")
    assert second.state.optimizer_steps == 8
    assert (second.state.seed, second.state.run) == (3, first.state.run)
    third = build(tmp_path)
    history = third.fit(2, resume="auto")
    assert third.state.optimizer_steps == 8
    assert len(history["train_loss"]) == 2


def test_a_pointer_is_resumed_from_and_the_seed_of_the_arguments_gives_way(tmp_path):
    build(tmp_path, seed=3).fit(1)
    trainer = build(tmp_path / "other", seed=99)
    trainer.fit(2, resume=tmp_path / "last")
    assert trainer.state.seed == 3


def test_a_checkpoint_that_does_not_fit_is_named_and_one_that_is_not_there_once(tmp_path):
    build(tmp_path, seed=3).fit(1)
    with pytest.raises(CheckpointError) as caught:
        other_loader(build(tmp_path / "other"), batch_size=3).fit(2, resume=tmp_path / "last")
    assert caught.value.__notes__ == [f"The checkpoint is {tmp_path / 'last'}."]
    with pytest.raises(CheckpointError, match="there is no checkpoint at") as caught:
        build(tmp_path / "other").fit(2, resume=tmp_path / "nope")
    assert not hasattr(caught.value, "__notes__")


def test_auto_without_a_folder_to_look_in_says_so():
    model = nn.Linear(2, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), [1], progress=False)
    with pytest.raises(ValueError, match=r"looks in the folder of a CheckpointCallback, and there is none"):
        trainer.fit(1, resume="auto")


def other_loader(trainer, **changes):
    loader = trainer.train_loader
    arguments = {"dataset": loader.dataset, "batch_size": BATCH, "shuffle": True} | changes
    trainer.train_loader = DataLoader(**arguments)
    trainer._train_batches = EpochLoader(trainer.train_loader, stream=0)
    return trainer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: other_loader(t, batch_size=3), r"train_loader=.*'batch_size': 2.*this one has .*'batch_size': 3"),
        (lambda t: other_loader(t, dataset=Subset(Augmented(), range(20))), r"'samples': 27.*'samples': 20"),
        (lambda t: other_loader(t, drop_last=True), r"'batches': 14.*'batches': 13"),
        (lambda t: setattr(t, "gradient_accumulation_steps", 2) or t, r"gradient_accumulation_steps=4, this one has 2"),
        (lambda t: setattr(t, "gradient_clip_norm", None) or t, r"gradient_clip_norm=0\.5, this one has None"),
    ],
)
def test_what_can_not_be_exact_is_refused_by_name(tmp_path, change, message):
    build(tmp_path, seed=3).fit(1)
    trainer = change(build(tmp_path / "other"))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        trainer.fit(2, resume=tmp_path / "last")
    assert "Trainer.load_weights" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    trainer.load_weights(tmp_path / "last")
    assert not all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


WEIGHTED = {"weight": torch.tensor([1.0, 2.0, 3.0])}


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            nn.CrossEntropyLoss(),
            nn.CrossEntropyLoss(label_smoothing=0.25),
            r"'label_smoothing': 0\.0.*this one .*: 0\.25",
        ),
        (
            nn.CrossEntropyLoss(**WEIGHTED),
            nn.CrossEntropyLoss(torch.ones(3)),
            r"'weight': \[1\.0, 2\.0, 3\.0\].*this one",
        ),
        (DiceLoss(), DiceLoss(smooth=1.0), r"'smooth': 0\.0.*this one .*'smooth': 1\.0"),
        (partial(F.cross_entropy, label_smoothing=0.5), F.cross_entropy, r"loss_fn='partial', this one"),
        (partial(F.cross_entropy, ignore_index=7, **WEIGHTED), partial(F.cross_entropy, ignore_index=7), r"'weight'"),
        (partial(F.cross_entropy, label_smoothing=0.5), partial(F.cross_entropy, label_smoothing=0.0), r"0\.5\}, this"),
    ],
)
def test_a_loss_with_other_options_is_refused(tmp_path, first, then, message):
    def run(loss_fn):
        saver = CheckpointCallback(tmp_path, "train_loss")
        batches = [(torch.ones(2, 4, 5, 5), torch.tensor(0).expand(2, 5, 5))]
        model = nn.Conv2d(4, 3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return Trainer(model, optimizer, loss_fn, batches, callbacks=[saver], device="cpu", progress=False)

    run(first).fit(1)
    with pytest.raises(CheckpointError, match=message):
        run(then).fit(2, resume="auto")
    run(first).fit(2, resume="auto")


def test_another_precision_is_refused(tmp_path):
    build(tmp_path, seed=3).fit(1)
    with pytest.raises(CheckpointError, match=r"mixed_precision='float32', this one has 'bfloat16'"):
        build(tmp_path / "other", mixed_precision=True).fit(2, resume=tmp_path / "last")


def test_a_compiled_model_goes_on_inside_the_epoch_where_a_plain_one_was_left(tmp_path):
    _, expected, checkpoints = whole_run(tmp_path / "whole")
    inner = network()
    trainer = build(tmp_path / "compiled", model=torch.compile(inner, backend="eager"))
    trainer.fit(EPOCHS, resume=checkpoints[6])
    trainer.model = inner
    assert digest(trainer) == expected


def test_a_checkpoint_of_format_1_goes_on_at_its_epoch():
    folder = Path(__file__).parent / "checkpoint" / "format-1"
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    batches = [(torch.ones(2, 2), torch.ones(2, 1)), (torch.full((2, 2), 2.0), torch.zeros(2, 1))]
    schedule = LRSchedulerCallback(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    saver = CheckpointCallback("unused", "train_loss")
    trainer = Trainer(
        model, optimizer, nn.MSELoss(), batches, callbacks=[schedule, saver], device="cpu", progress=False
    )
    trainer.load(folder)
    assert trainer.history["train_loss"] == pytest.approx([0.6976700723171234, 0.458806648850441])
    assert model.weight.tolist() == [pytest.approx([0.4750, -0.2015], abs=1e-4)]
    assert (trainer.state.seed, trainer.state.epoch, trainer.state.batch) == (5, 2, 0)
    assert saver.best == pytest.approx(0.458806648850441)
    assert optimizer.param_groups[0]["lr"] == 0.025


class StopsAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_batch_end(self, trainer, batch_idx, logs):
        if trainer.state.optimizer_steps == self.step:
            trainer.stop()


def test_a_run_that_was_asked_to_stop_inside_an_epoch_closes_it_after_a_resume(tmp_path):
    random.seed(1), np.random.seed(1)
    keep = {"keep_last": 1000}
    whole = build(tmp_path / "whole", seed=3, unseeded=False, checkpoints=keep, callbacks=[StopsAt(6)])
    whole.fit(EPOCHS)
    assert whole.state.optimizer_steps == 6
    checkpoint = next(c for c in checkpoints_in(tmp_path / "whole") if position(c)["batch"] == 8 and "06" in c.name)
    assert position(checkpoint) == {"epoch": 1, "batch": 8, "optimizer_steps": 6}
    trainer = build(tmp_path / "again", checkpoints=keep)  # and nobody who would ask again
    trainer.fit(EPOCHS, resume=checkpoint)
    assert digest(trainer) == digest(whole)


class Count:
    """A metric of the user's own that has no state_dict."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.pixels, self.seen = torch.zeros(()), []

    def update(self, outputs, targets):
        self.pixels = self.pixels + targets.numel()
        self.seen.append(len(targets))

    def compute(self):
        return self.pixels + len(self.seen)


def test_metrics_of_every_kind_go_on_inside_the_epoch(tmp_path):
    def metrics():
        tm = torchmetrics.classification.MulticlassJaccardIndex(3, ignore_index=255)
        curve = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassAccuracy(3, ignore_index=255)])
        cat = torchmetrics.classification.MulticlassAUROC(3, ignore_index=255)  # keeps every prediction
        return {"iou": IoU(3, ignore_index=255), "torch": tm, "collection": curve, "auroc": cat, "count": Count()}

    whole, expected, checkpoints = whole_run(tmp_path / "whole", metrics=metrics())
    assert set(whole.history) > {"train_iou", "train_torch", "train_auroc", "train_count"}
    for checkpoint in (checkpoints[1], checkpoints[8]):
        assert resumed(checkpoint, tmp_path / checkpoint.name, metrics=metrics())[1] == expected


def test_other_metrics_inside_an_epoch_are_refused(tmp_path):
    _, _, checkpoints = whole_run(tmp_path / "whole", metrics=[IoU(3, ignore_index=255)])
    message = r"left inside an epoch, and its metrics can't go on.*\['iou'\], these are \['iou', 'count'\]"
    with pytest.raises(CheckpointError, match=message):
        resumed(checkpoints[1], tmp_path / "a", metrics={"iou": IoU(3, ignore_index=255), "count": Count()})
    with pytest.raises(CheckpointError, match=r"not of num_classes=4"):
        resumed(checkpoints[1], tmp_path / "b", metrics=[IoU(4, ignore_index=255)])


def test_a_metric_that_no_checkpoint_could_hold_is_found_before_the_first_step(tmp_path):
    class Holds(Count):
        def __init__(self):
            super().__init__()
            self.function = print

    trainer = build(tmp_path, metrics={"iou": IoU(3, ignore_index=255), "holds": Holds()})
    with pytest.raises(TypeError, match=r"of the metric .* is or holds a builtins\.builtin_function_or_method"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 0


def test_saving_between_the_batches_of_a_step_is_refused(tmp_path):
    class Saves(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            if batch_idx == 1:
                trainer.save(tmp_path / "inside")

    with pytest.raises(
        ValueError, match=r"2 batches have gone into gradients.*save where trainer\.state\.open_batches"
    ):
        build(tmp_path / "c", callbacks=[Saves()]).fit(1)
    assert not (tmp_path / "inside").exists()


def test_a_checkpoint_from_a_hook_goes_on_from_there(tmp_path):
    class Saves(Callback):
        saves_state = True

        def on_batch_end(self, trainer, batch_idx, logs):
            if trainer.state.optimizer_steps == 5 and not trainer.state.open_batches:
                trainer.save(tmp_path / "mine")

    whole, expected, _ = whole_run(tmp_path / "whole", callbacks=[Saves()])
    assert position(tmp_path / "mine") == {"epoch": 1, "batch": 4, "optimizer_steps": 5}
    assert resumed(tmp_path / "mine", tmp_path / "resumed")[1] == expected
    assert whole.state.epoch == EPOCHS


def test_hooks_of_a_resumed_epoch_go_on_with_its_batches(tmp_path):
    events = []

    class Hears(Callback):
        def on_epoch_start(self, trainer, epoch):
            events.append(("epoch", epoch, trainer.state.batch))

        def on_batch_start(self, trainer, batch_idx):
            events.append(("batch", batch_idx))

    _, _, checkpoints = whole_run(tmp_path / "whole")
    resumed(checkpoints[6], tmp_path / "resumed", callbacks=[Hears()])  # epoch 1, batch 8
    assert events[:7] == [("epoch", 1, 8), *(("batch", n) for n in range(8, BATCHES))]
    assert events[7] == ("epoch", 2, 0)


class Stream(IterableDataset):
    """Draws in this process; can tell where it is, if it is asked."""

    def __init__(self):
        self.given = []

    def __iter__(self):
        for i in range(20):
            self.given.append(i)
            yield torch.full((3, 8, 8), random.random() + i), torch.randint(0, 3, (8, 8))


class StatefulLoader:
    """A loader with a memory, as torchdata's over iterable datasets."""

    def __init__(self):
        self.position, self.given = 0, []

    def __iter__(self):
        torch.rand(())  # the seed of its workers
        return self._batches()

    def _batches(self):
        while self.position < 10:
            self.position += 1
            self.given.append(self.position)
            yield torch.randn(2, 3, 8, 8) + random.random(), torch.randint(0, 3, (2, 8, 8))
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        torch.rand(())
        self.position = state["position"]


@pytest.mark.parametrize("kind", ["iterable dataset", "with a memory"])
def test_iterables_go_on_too(tmp_path, kind):
    """Without a memory they are run through again to where they were; with one they are asked for it."""

    def trainer_of(folder, source):
        model = network()
        saver = CheckpointCallback(folder, "train_loss", every_n_steps=1, keep_last=1000)
        loader = DataLoader(source, BATCH) if kind == "iterable dataset" else source
        return Trainer(
            model, torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss(), loader, callbacks=[saver],
            gradient_accumulation_steps=ACCUMULATION, device="cpu", progress=False, metrics=None, seed=1,
        )  # fmt: skip

    make = Stream if kind == "iterable dataset" else StatefulLoader
    torch.manual_seed(0)
    whole = trainer_of(tmp_path / "whole", make())
    whole.fit(2)
    expected = {k: v.clone() for k, v in whole.model.state_dict().items()}
    checkpoints = checkpoints_in(tmp_path / "whole")
    assert len(checkpoints) == 8
    for checkpoint in checkpoints:
        source = make()
        trainer = trainer_of(tmp_path / checkpoint.name, source)
        trainer.fit(2, resume=checkpoint)
        assert trainer.history == whole.history
        assert all(torch.equal(v, expected[k]) for k, v in trainer.model.state_dict().items())
        if kind == "with a memory" and position(checkpoint)["batch"] == 4:
            assert source.given[:6] == list(range(5, 11))


def test_an_iterable_that_ends_before_the_place_says_so():
    loader = EpochLoader([1, 2, 3], 0)
    assert [b.batch for b in loader.epoch(1, 0, start=2)] == [3]
    assert list(loader.epoch(1, 0, start=3)) == []
    with pytest.raises(DataOrderError, match=r"ended after 3 batches, and the run was left after 4"):
        list(loader.epoch(1, 0, start=4))


def test_what_the_next_fit_does_after_a_load_is_what_resume_does(tmp_path):
    _, expected, checkpoints = whole_run(tmp_path / "whole")
    trainer = build(tmp_path / "loaded", checkpoints={"keep_last": 1000})
    trainer.load(checkpoints[2])
    torch.manual_seed(8)
    trainer.fit(EPOCHS)
    assert digest(trainer) == expected


def test_a_fresh_start_after_an_interrupted_one_begins_anew(tmp_path):
    class Fails(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            if trainer.state.epoch == 1 and batch_idx == 5:
                raise RuntimeError("user")

    trainer = build(tmp_path, callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="user"):
        trainer.fit(3)
    trainer.fit(1)
    assert len(trainer.history["train_loss"]) == 1
    assert os.listdir(tmp_path).count("last") == 1


class Scores(Callback):
    """Adds figures of any numeric type."""

    log_names = ("score",)

    def on_epoch_end(self, trainer, epoch, logs):
        logs["score"] = [np.float32(0.1), np.float64(0.9), torch.tensor(0.2), 0][epoch]


def test_figures_of_any_numeric_type_are_saved_as_floats(tmp_path):
    trainer, expected, checkpoints = whole_run(tmp_path / "whole", callbacks=[Scores()])
    assert trainer.history["score"] == pytest.approx([0.1, 0.9, 0.2, 0.0])
    assert resumed(checkpoints[9], tmp_path / "resumed", callbacks=[Scores()])[1] == expected

    class Word(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            logs["word"] = "good"

    with pytest.raises(TypeError, match=r"logs hold numbers, but a callback has set 'word' to 'good'"):
        build(tmp_path / "word", callbacks=[Word()]).fit(1)


def test_two_checkpoint_callbacks_remember_both_bests(tmp_path):
    """Each checkpoint holds what all have judged, whichever is resumed from (trap 12)."""

    def trainer_of(epochs):
        second = CheckpointCallback(tmp_path / "score", "score", mode="max")
        trainer = build(tmp_path / "iou", seed=3, callbacks=[Scores(), second])
        trainer.fit(epochs, resume="auto")
        return second

    trainer_of(2)
    best = (tmp_path / "score" / "best").resolve()
    assert trainer_of(3).best == pytest.approx(0.9)
    assert (tmp_path / "score" / "best").resolve() == best
    assert best.is_dir()


class StopsAfter(Callback):
    def on_epoch_end(self, trainer, epoch, logs):
        if epoch == 1:
            trainer.stop()


def test_a_run_that_was_stopped_is_over_also_for_a_resume(tmp_path):
    first = build(tmp_path, seed=3, callbacks=[StopsAfter()])
    first.fit(EPOCHS)
    assert first.state.epoch == 2
    second = build(tmp_path)
    assert len(second.fit(EPOCHS, resume="auto")["train_loss"]) == 2
    third = build(tmp_path)
    third.load(tmp_path / "last")
    third.state.stopping = False
    assert len(third.fit(EPOCHS)["train_loss"]) == EPOCHS


class Unfreezes(Callback):
    """Frees what the script has frozen, in one epoch and never again."""

    def on_epoch_start(self, trainer, epoch):
        if epoch == 1 and not trainer.state.batch:
            trainer.model[0].weight.requires_grad_(True)


def frozen():
    model = network()
    model[0].weight.requires_grad_(False)
    return model


def test_what_a_callback_has_unfrozen_stays_so(tmp_path):
    random.seed(1), np.random.seed(1)
    keep = {"keep_last": 1000}
    torch.manual_seed(0)
    whole = build(tmp_path / "whole", seed=3, unseeded=False, checkpoints=keep, model=frozen(), callbacks=[Unfreezes()])
    whole.fit(EPOCHS)
    for checkpoint in checkpoints_in(tmp_path / "whole")[2::3]:
        again = build(tmp_path / checkpoint.name, checkpoints=keep, model=frozen(), callbacks=[Unfreezes()])
        again.fit(EPOCHS, resume=checkpoint)
        assert digest(again) == digest(whole), checkpoint
        whole_state = whole.state.optimizer_steps
    assert whole_state == EPOCHS * 4


class Drifts(torch.nn.Module):
    """A buffer that the state_dict leaves out and the forward changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
        return x * (1 + 0.01 * self.seen)


def test_buffers_that_the_state_dict_leaves_out_come_back(tmp_path):
    random.seed(1), np.random.seed(1)
    torch.manual_seed(0)
    keep = {"keep_last": 1000}
    whole = build(tmp_path / "whole", seed=3, checkpoints=keep, model=nn.Sequential(Drifts(), *network()))
    whole.fit(EPOCHS)
    for checkpoint in checkpoints_in(tmp_path / "whole")[4::6]:
        again = build(tmp_path / checkpoint.name, checkpoints=keep, model=nn.Sequential(Drifts(), *network()))
        again.fit(EPOCHS, resume=checkpoint)
        assert again.history == whole.history


def test_a_checkpoint_of_a_run_that_has_not_gone_on_yet_leads_to_the_same_end(tmp_path):
    _, expected, checkpoints = whole_run(tmp_path / "whole")
    between = build(tmp_path / "between")
    between.load(checkpoints[6])
    torch.manual_seed(4)
    between.save(tmp_path / "again")
    assert resumed(tmp_path / "again", tmp_path / "resumed")[1] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 32}, r"OneCycleLR had total_steps=16, this one has 32"),
        ({"step_on": "epoch"}, r"OneCycleLR had step_on='batch', this one has 'epoch'"),
        ({"weight_decay": 0.5}, r"optimizer weight_decay=0\.01, this one has 0\.5"),
        ({"monitor": "val_dice"}, r"CheckpointCallback monitored 'val_iou', this one 'val_dice'"),
        ({"stopping": "val_iou"}, r"EarlyStoppingCallback monitored 'val_loss', this one 'val_iou'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_a_checkpoint_would_silently_override_are_refused_by_name(tmp_path, change, message):
    def trainer_of(folder, total_steps=16, step_on="batch", weight_decay=0.01, monitor="val_iou", stopping="val_loss"):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=total_steps)
        loader = DataLoader(Augmented(9), BATCH)
        callbacks = [
            LRSchedulerCallback(schedule, step_on),
            EarlyStoppingCallback(stopping),
            CheckpointCallback(folder, monitor),
        ]
        loss_fn = nn.CrossEntropyLoss(ignore_index=255)
        return Trainer(model, optimizer, loss_fn, loader, loader, callbacks=callbacks, device="cpu", progress=False)

    trainer_of(tmp_path).fit(1)
    trainer_of(tmp_path / "same").fit(2, resume=tmp_path / "last")
    with pytest.raises(CheckpointError, match=message):
        trainer_of(tmp_path / "other", **change).fit(2, resume=tmp_path / "last")


def test_a_callback_whose_memory_does_not_load_is_named(tmp_path):
    class Breaks(Log):
        def load_state_dict(self, state):
            raise KeyError("samples")

    build(tmp_path, seed=3, callbacks=[Log()]).fit(1)
    with pytest.raises(CheckpointError):
        build(tmp_path / "a", callbacks=[Breaks()]).fit(2, resume=tmp_path / "last")  # another class is found first
    Breaks.__qualname__, Breaks.__module__ = Log.__qualname__, Log.__module__
    with pytest.raises(KeyError) as caught:
        build(tmp_path / "b", callbacks=[Breaks()]).fit(2, resume=tmp_path / "last")
    assert "load_state_dict of victim.Log" in caught.value.__notes__[0]


def test_a_relative_folder_stays_the_same_wherever_the_process_goes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = build("checkpoints", seed=3)
    trainer.fit(1, resume="auto")
    monkeypatch.chdir("elsewhere")
    trainer.fit(2, resume="auto")
    assert trainer.state.optimizer_steps == 8
    assert os.listdir(tmp_path / "elsewhere") == []
