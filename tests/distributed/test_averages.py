"""Averaged weights in several processes: the same in all, sharded or not, and read by any other number of them."""

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from processes import run
from safetensors.torch import load_file
from test_same_result import Tiles
from test_sharded import Normed, StopsAt
from torch import nn
from torch.utils.data import DataLoader

from ununennium.training import (
    Callback,
    CheckpointCallback,
    EMACallback,
    GradualUnfreeze,
    SWACallback,
    Trainer,
    export_weights,
    lr_range_test,
)
from ununennium.training.checkpoint import read
from ununennium.training.distributed import whole

GLOBAL, EPOCHS = 6, 3


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1))


class Averages(Callback):
    """What the model is in a validation, and in its rests."""

    def __init__(self):
        self.seen = []

    def on_epoch_end(self, trainer, epoch, logs):
        with trainer.evaluating():
            self.seen.append({k: whole(v).clone() for k, v in trainer.model.state_dict().items()})
        self.seen.append({k: whole(v).clone() for k, v in trainer.model.state_dict().items()})


def make(folder, world, distributed, average, *, model=plain, callbacks=(), **kwargs):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    model = model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(
        model, optimizer, nn.CrossEntropyLoss(ignore_index=255), DataLoader(Tiles(32), GLOBAL // world, shuffle=True),
        DataLoader(Tiles(7, turned=False), max(GLOBAL // world, 1)),
        callbacks=[average, *callbacks, CheckpointCallback(folder, every_n_steps=1, keep_last=100)], seed=2,
        device="cpu", gradient_accumulation_steps=2, gradient_clip_norm=0.5, distributed=distributed, progress=False,
        metrics=[], **kwargs,
    )  # fmt: skip


def ema():
    return EMACallback(0.9, 3)


def result(trainer):
    trainer._checkpoints.writer.wait()
    average = trainer.callbacks.callbacks[0]
    averaged = {k: whole(v).clone() for k, v in average.state_dict()["averaged"].items()}
    weights = {k: whole(v).clone() for k, v in trainer.model.state_dict().items()}
    return {"averaged": averaged, "weights": weights, "history": trainer.history}


def fit(rank, world, folder, distributed, kind="ema", model=plain, resume="auto", stop=None, watch=False):
    average = ema() if kind == "ema" else SWACallback(0.02, 1, anneal_epochs=1)
    watching = Averages()
    callbacks = [*([StopsAt(stop)] if stop else []), *([watching] if watch else [])]
    trainer = make(folder, world, distributed, average, model=model, callbacks=callbacks)
    with suppress(KeyboardInterrupt):
        trainer.fit(EPOCHS, resume=resume)
    return {**result(trainer), "seen": watching.seen}


def same(one, other, parts=("averaged", "weights")):
    for part in parts:
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), (part, name)


def close(one, other, tolerance=1e-10):
    for part in ("averaged", "weights"):
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=0, atol=tolerance)
    for name, values in one["history"].items():
        assert other["history"][name] == pytest.approx(values, rel=1e-8), name


@pytest.mark.parametrize(("kind", "distributed"), [("ema", True), ("ema", "fsdp"), ("swa", True), ("swa", "fsdp")])
def test_several_processes_average_what_one_does(tmp_path, kind, distributed):
    alone = fit(0, 1, tmp_path / "one", False, kind)
    found = run(2, fit, tmp_path / "r", tmp_path / "two", distributed, kind)
    same(*found)
    assert found[0]["history"] == found[1]["history"]
    close(alone, found[0])
    assert not torch.equal(alone["averaged"]["0.weight"], alone["weights"]["0.weight"]) or kind == "swa"


@pytest.mark.parametrize("distributed", [True, "fsdp"])
def test_statistics_are_process_0s_in_all_and_validation_puts_everything_back(tmp_path, distributed):
    """With BatchNorm, whose averages each process has of its own until the batches of an epoch are over."""
    found = run(2, fit, tmp_path / "r", tmp_path / "c", distributed, "ema", Normed, "auto", None, True)
    same(*found, parts=("averaged",))
    for number, (a, b) in enumerate(zip(found[0]["seen"], found[1]["seen"], strict=True)):
        assert all(torch.equal(a[name], b[name]) for name in a), number
    averaged = load_file(tmp_path / "c" / "last" / "averaged.safetensors") if distributed is True else None
    if averaged is not None:
        assert all(torch.equal(averaged[k], v) for k, v in found[0]["averaged"].items())
    for k, v in found[0]["averaged"].items():
        assert torch.equal(found[0]["seen"][-2][k], v)
        assert torch.equal(found[0]["seen"][-1][k], found[0]["weights"][k])


@pytest.mark.parametrize("distributed", [True, "fsdp"])
def test_left_inside_an_epoch_it_ends_with_the_same_bits(tmp_path, distributed):
    expected = run(2, fit, tmp_path / "r", tmp_path / "whole", distributed, "ema", Normed)
    run(2, fit, tmp_path / "a", tmp_path / "c", distributed, "ema", Normed, "auto", 4)
    found = run(2, fit, tmp_path / "b", tmp_path / "c", distributed, "ema", Normed)
    for one, other in zip(expected, found, strict=True):
        same(one, other)
        assert one["history"] == other["history"]


class Scaled(nn.Sequential):
    """With a parameter of its own, which stays gathered after a forward that nothing goes backward from."""

    def __init__(self):
        super().__init__(*plain())
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x):
        return self.scale * super().forward(x)


class Looks(Callback):
    """Runs the model inside an epoch: as it is, averaged, and as it is."""

    def __init__(self):
        self.outputs = []

    def on_batch_end(self, trainer, batch_idx, logs):
        if batch_idx != 3:
            return
        images = torch.ones(1, 3, 4, 4, dtype=torch.float64)
        before = {name: whole(v).clone() for name, v in trainer.model.state_dict().items()}
        for averaged in (False, True, False):
            with trainer.evaluating() if averaged else torch.no_grad():
                self.outputs.append(trainer.model(images))
        own, expected = Scaled().double(), Scaled().double()
        own.load_state_dict(before)
        state = trainer.callbacks.callbacks[0].state_dict()["averaged"]
        expected.load_state_dict({name: whole(v) for name, v in state.items()})
        self.outputs += [own(images).detach(), expected(images).detach()]


def look(rank, world, folder, distributed):
    watch = Looks()
    trainer = make(folder, world, distributed, ema(), model=Scaled, callbacks=[watch])
    trainer.fit(EPOCHS)
    return {**result(trainer), "outputs": watch.outputs}


@pytest.mark.parametrize("distributed", [True, "fsdp"])
def test_a_look_at_the_averaged_model_inside_an_epoch_changes_nothing(tmp_path, distributed):
    """Sharded weights that were gathered are gathered anew: the averages for it, the raw ones after it."""
    expected = run(2, fit, tmp_path / "r", tmp_path / "plain", distributed, "ema", Scaled)
    for one, other in zip(expected, run(2, look, tmp_path / "s", tmp_path / "looked", distributed), strict=True):
        same(one, other)
        for first, averaged, again, own, mean in zip(*[iter(other["outputs"])] * 5, strict=True):
            torch.testing.assert_close(first, own, rtol=0, atol=1e-12)
            torch.testing.assert_close(averaged, mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(again, own, rtol=0, atol=1e-12)


def loaded(rank, world, path, distributed):
    trainer = make(path.parent / f"unused{world}{distributed}", world, distributed, ema())
    trainer.load(path)
    with trainer.evaluating():
        seen = {k: whole(v).clone() for k, v in trainer.model.state_dict().items()}
    return {**result(trainer), "seen": seen}


def test_shards_are_read_by_any_other_number_of_processes_and_exported_to_one_file(tmp_path):
    found = run(2, fit, tmp_path / "r", tmp_path / "c", "fsdp")[0]
    last = (tmp_path / "c" / "last").resolve()
    shards = sorted(p.name for p in last.glob("averaged*"))
    assert shards == ["averaged.0.safetensors", "averaged.1.safetensors"]
    assert all(load_file(last / name) for name in shards)
    sizes = [sum(v.numel() for v in load_file(last / name).values()) for name in shards]
    assert max(sizes) < 0.8 * sum(sizes)
    for world, distributed in ((1, False), (3, "fsdp"), (2, True)):
        kind = (tmp_path / f"r{world}", last, distributed)
        read_by = [loaded(0, 1, last, False)] if world == 1 else run(world, loaded, *kind)
        for each in read_by:
            same(found, each)
            assert all(torch.equal(each["seen"][k], v) for k, v in found["averaged"].items())
    export_weights(last, tmp_path / "w.safetensors")
    exported = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(exported[k], v) for k, v in found["averaged"].items())
    assert all(torch.equal(read(last).model[k], v) for k, v in found["weights"].items())


def unfreeze(rank, world, folder, distributed):
    watch = Gradients()
    trainer = make(folder, world, distributed, GradualUnfreeze({1: "0"}), callbacks=[watch])
    trainer.fit(EPOCHS)
    weights = {k: whole(v).clone() for k, v in trainer.model.state_dict().items()}
    return weights, watch.first, trainer.history


class Gradients(Callback):
    def __init__(self):
        self.first = []

    def on_epoch_end(self, trainer, epoch, logs):
        self.first.append(whole(dict(trainer.model.named_parameters())["0.weight"]).detach().clone())


@pytest.mark.parametrize("distributed", [True, "fsdp"])
def test_parts_are_freed_in_several_processes_as_in_one(tmp_path, distributed):
    weights, first, history = unfreeze(0, 1, tmp_path / "one", False)
    assert not torch.equal(first[1], first[0])
    for other, moved, figures in run(2, unfreeze, tmp_path / "r", tmp_path / "two", distributed):
        for name, value in weights.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10)
        assert torch.equal(moved[0], first[0])
        assert figures["train_loss"] == pytest.approx(history["train_loss"], rel=1e-9)


def range_test(rank, world, folder, distributed):
    trainer = make(folder, world, distributed, ema())
    before = {k: whole(v).clone() for k, v in trainer.model.state_dict().items()}
    found = lr_range_test(trainer, 1e-4, 10.0, 12)
    assert all(torch.equal(whole(v), before[k]) for k, v in trainer.model.state_dict().items())
    history = trainer.fit(1)
    return found.rates, found.losses, found.suggestion, history


@pytest.mark.parametrize("distributed", [True, "fsdp"])
def test_a_range_test_in_several_processes_is_that_of_one(tmp_path, distributed):
    rates, losses, _, history = range_test(0, 1, tmp_path / "one", False)
    for found in run(2, range_test, tmp_path / "r", tmp_path / "two", distributed):
        assert found[0] == rates
        assert found[1] == pytest.approx(losses, rel=1e-8)
        assert found[3]["train_loss"] == pytest.approx(history["train_loss"], rel=1e-9)
