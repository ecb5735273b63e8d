"""The Trainer's loop: history, validation, counters, hooks, modes, metrics (traps 7, 8, 14, 17, 18)."""

import inspect
import math
import random
from collections import namedtuple
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.metrics import f1_score, jaccard_score
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate
from waiting import FromHookToHook

from ununennium.losses import DiceLoss
from ununennium.metrics import IoU
from ununennium.models import RasterModel, create_model
from ununennium.training import (
    BatchError,
    Callback,
    CheckpointCallback,
    EMACallback,
    LRSchedulerCallback,
    NonFiniteError,
    ProgressCallback,
    Trainer,
)
from ununennium.training.checkpoint import read
from ununennium.training.step import Stepper

IGNORE = 255


def make_trainer(model, train_loader, val_loader=None, loss_fn=None, optimizer=None, **kwargs):
    kwargs = {"device": "cpu", "progress": False, "seed": 0, **kwargs}
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, loss_fn or nn.CrossEntropyLoss(), train_loader, val_loader, **kwargs)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


class Log(Callback):
    """Write down every hook with the counters it saw."""

    def __init__(self):
        self.events = []

    def on_train_start(self, trainer):
        self.events.append("train start")

    def on_train_end(self, trainer):
        self.events.append("train end")

    def on_epoch_start(self, trainer, epoch):
        self.events.append(f"epoch start {epoch}: {trainer.state.epoch}")

    def on_epoch_end(self, trainer, epoch, logs):
        self.events.append(f"epoch end {epoch}: {trainer.state.epoch} {len(trainer.history['train_loss'])}")

    def on_batch_start(self, trainer, batch_idx):
        self.events.append(f"batch start {batch_idx}: {trainer.state.batch} {trainer.state.optimizer_steps}")

    def on_batch_end(self, trainer, batch_idx, logs):
        self.events.append(f"batch end {batch_idx}: {trainer.state.batch} {trainer.state.optimizer_steps}")


def test_hooks_come_in_order_and_see_counters_that_have_advanced(make_model, make_data):
    log = Log()
    trainer = make_trainer(
        make_model(), DataLoader(make_data(6), batch_size=2), callbacks=[log], gradient_accumulation_steps=2
    )
    trainer.fit(2)
    epoch = [
        "batch start 0: 0 {0}", "batch end 0: 1 {0}",
        "batch start 1: 1 {0}", "batch end 1: 2 {1}",
        "batch start 2: 2 {1}", "batch end 2: 3 {2}",
    ]  # fmt: skip
    expected = ["train start"]
    for number, steps in enumerate([(0, 1, 2), (2, 3, 4)]):
        expected += [f"epoch start {number}: {number}", *(line.format(*steps) for line in epoch)]
        expected += [f"epoch end {number}: {number + 1} {number + 1}"]
    assert log.events == [*expected, "train end"]


def test_callbacks_run_in_list_order_and_savers_last(make_model, loader, tmp_path):
    calls = []

    class Named(Callback):
        def __init__(self, name):
            self.name = name

        def on_epoch_end(self, trainer, epoch, logs):
            calls.append(self.name)

    class Saver(CheckpointCallback):
        def on_epoch_end(self, trainer, epoch, logs):
            calls.append("saver")

    saver = Saver(tmp_path, monitor="train_loss")
    make_trainer(make_model(), loader, callbacks=[saver, Named("a"), Named("b")]).fit(1)
    assert calls == ["a", "b", "saver"]


def test_train_end_comes_even_after_an_error(make_model, loader):
    log = Log()

    class Fails(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            raise RuntimeError("user's own")

        def on_train_end(self, trainer):
            raise ValueError("while closing")

    with pytest.raises(RuntimeError, match="user's own") as caught:
        make_trainer(make_model(), loader, callbacks=[Fails(), log]).fit(1)
    assert log.events[-1] == "train end"
    assert "Then on_train_end raised ValueError: while closing" in caught.value.__notes__


def test_history_has_one_figure_per_epoch_and_true_means(make_model, make_data):
    """Means are sums over valid pixels divided once, whatever the batches: not means of batch means."""
    data = make_data(samples=9, ignored=0.9)
    loader = DataLoader(data, batch_size=2)
    loss_fn = nn.CrossEntropyLoss(ignore_index=IGNORE)
    model = make_model()
    trainer = make_trainer(model, loader, loader, loss_fn, torch.optim.SGD(model.parameters(), lr=0.0))
    history = trainer.fit(3)
    images, masks = data.tensors
    true = float(loss_fn(model(images), masks).detach())
    assert set(history) == {"train_loss", "train_iou", "train_dice", "val_loss", "val_iou", "val_dice"}
    assert history["train_loss"] == pytest.approx([true] * 3, rel=1e-12)
    assert history["val_loss"] == pytest.approx([true] * 3, rel=1e-12)
    naive = np.mean([float(loss_fn(model(x), y).detach()) for x, y in loader])
    assert naive != pytest.approx(true, rel=1e-3)  # the test could tell


def test_default_metrics_equal_scikit_learn_and_leave_nodata_out(make_model, make_data):
    data = make_data(samples=9, ignored=0.9)
    loader = DataLoader(data, batch_size=2)
    model = make_model()
    trainer = make_trainer(model, loader, loader, DiceLoss(ignore_index=IGNORE))
    logs = {k: v[-1] for k, v in trainer.fit(2).items()}
    images, masks = data.tensors
    predictions = model(images).argmax(1)[masks != IGNORE].numpy()
    truth = masks[masks != IGNORE].numpy()
    assert logs["val_iou"] == pytest.approx(jaccard_score(truth, predictions, average="macro"), abs=1e-6)
    assert logs["val_dice"] == pytest.approx(f1_score(truth, predictions, average="macro"), abs=1e-6)


@pytest.mark.parametrize(
    ("outputs", "targets", "names"),
    [
        ((4, 3, 5, 5), torch.zeros(4, 5, 5, dtype=torch.long), {"iou", "dice"}),
        ((4, 3), torch.zeros(4, dtype=torch.long), {"iou", "dice"}),
        ((4, 1, 5, 5), torch.zeros(4, 5, 5, dtype=torch.long), {"iou", "dice"}),
        ((4, 1, 5, 5), torch.zeros(4, 1, 5, 5), set()),
        ((4, 3, 5, 5), torch.rand(4, 3, 5, 5), set()),
        ((4, 3, 5, 5), torch.zeros(4, 3, 5, 5, dtype=torch.long), set()),
    ],
)
def test_default_metrics_are_for_class_logits_and_integer_classes(outputs, targets, names):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(outputs[1:]))

        def forward(self, x):
            return self.value.expand(len(x), *outputs[1:])

    model = Constant()
    loader = DataLoader(TensorDataset(torch.zeros(4, 1), targets), batch_size=2)
    trainer = make_trainer(model, loader, loader, lambda o, t: o.mean())
    assert set(trainer.validate()) == {"val_loss"} | {f"val_{n}" for n in names}


def test_metrics_by_list_dict_and_none(make_model, loader):
    model = make_model()
    assert set(make_trainer(model, loader, loader, metrics=[]).validate()) == {"val_loss"}
    assert set(make_trainer(model, loader, loader, metrics=[IoU(4)]).validate()) == {"val_loss", "val_iou"}
    named = {"mean": IoU(4), "each": IoU(4, average="none", class_names=["a", "b", "c", "d"])}
    logs = make_trainer(model, loader, loader, metrics=named).validate()
    assert set(logs) == {"val_loss", "val_mean", "val_each/a", "val_each/b", "val_each/c", "val_each/d"}


def test_torchmetrics_beside_ours_give_the_same(make_model, loader):
    theirs = torchmetrics.JaccardIndex(task="multiclass", num_classes=4)
    history = make_trainer(make_model(), loader, loader, metrics={"ours": IoU(4), "theirs": theirs}).fit(2)
    assert history["val_ours"] == pytest.approx(history["val_theirs"], abs=1e-6)
    assert history["train_ours"] == pytest.approx(history["train_theirs"], abs=1e-6)


def test_training_figures_survive_a_validation_inside_the_epoch(make_model, make_data):
    class Nosy(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            trainer.validate()

    data = make_data(8)
    quiet, nosy = (
        make_trainer(make_model(), DataLoader(data, 2), DataLoader(data, 4), callbacks=callbacks).fit(1)
        for callbacks in ([], [Nosy()])
    )
    assert quiet == nosy


@pytest.mark.parametrize("batch_size", [1, 7, 101])
def test_every_pixel_of_the_validation_set_counts_once(make_model, make_data, batch_size):
    """Trap 14, one process: 101 tiles give confusion matrices with 101·H·W entries."""

    class Entries(IoU):
        name = "entries"

        def compute(self):
            return self.confusion.compute().sum()

    data = make_data(101)
    trainer = make_trainer(make_model(), DataLoader(data, 4), DataLoader(data, batch_size), metrics=[Entries(4)])
    assert trainer.validate()["val_entries"] == 101 * 6 * 6


def test_what_a_prediction_says_at_an_ignored_pixel_changes_nothing(make_data):
    """Trap 17, through the whole Trainer: figures and gradients are equal bit for bit."""
    data = make_data(samples=6, ignored=0.9)
    masks = data.tensors[1]
    loader = DataLoader(TensorDataset(torch.arange(6), masks), batch_size=2)
    results = []
    for garbage in (0.0, 1e30):
        logits = nn.Parameter(torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
        with torch.no_grad():
            logits.copy_(torch.where((masks == IGNORE)[:, None], logits * 0 + garbage, logits))

        class Table(nn.Module):
            def __init__(self, table):
                super().__init__()
                self.table = table

            def forward(self, index):
                return self.table[index]

        model = Table(logits)
        start = logits.detach().clone()
        history = make_trainer(model, loader, loader, DiceLoss(ignore_index=IGNORE)).fit(1)
        step = torch.where((masks == IGNORE)[:, None], torch.zeros_like(start), logits.detach())
        assert torch.equal(
            logits.detach()[(masks == IGNORE)[:, None].expand_as(start)],
            start[(masks == IGNORE)[:, None].expand_as(start)],
        )
        results.append((history, step))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_modes_of_every_module_are_put_back(make_data):
    """Trap 18: frozen BatchNorm stays frozen, in validation and in training; random state too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4)).double()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    seen = []
    model[3].register_forward_hook(lambda m, a, b: seen.append([m.training for m in model.modules()]))
    statistics = model[1].running_mean.clone(), model[3].running_mean.clone()

    def collate(samples):
        random.random(), np.random.rand(), torch.rand(())
        return default_collate(samples)

    loader = DataLoader(make_data(4), batch_size=2, shuffle=True, collate_fn=collate)
    trainer = make_trainer(model, loader, loader)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trainer.validate()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert seen == [[False] * 5] * 2
    assert [m.training for m in model.modules()] == flags
    seen.clear()
    trainer.fit(1)
    assert seen == [flags] * 2 + [[False] * 5] * 2
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(model[1].running_mean, statistics[0])
    assert not torch.equal(model[3].running_mean, statistics[1])


def draw():
    random.random(), np.random.rand(), torch.rand(())


def random_states():
    return random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()


def are_same(states, others):
    (python, (key, place), torchs), (other, (other_key, other_place), other_torchs) = states, others
    return python == other and (key == other_key).all() and place == other_place and torch.equal(torchs, other_torchs)


class DrawsInForward(nn.Module):
    def forward(self, x):
        if not self.training:
            draw()
        return x


class DrawsInUpdate(IoU):
    def update(self, outputs, targets):
        draw()
        super().update(outputs, targets)


class Fails(IoU):
    def update(self, outputs, targets):
        raise RuntimeError("broken")


@pytest.mark.parametrize("fails", [False, True], ids=["", "and validation fails"])
@pytest.mark.parametrize("who", ["model", "metric", "val_transform"])
def test_modes_and_random_state_are_as_before_whatever_draws_in_validation(make_model, loader, who, fails):
    """Trap 18: outside the loader, which draws from generators of its own."""
    model = nn.Sequential(make_model(), DrawsInForward()) if who == "model" else make_model()
    model[0].eval()
    flags = [m.training for m in model.modules()]
    metrics = {"drawing": DrawsInUpdate(4) if who == "metric" else IoU(4)}
    options = {"val_transform": lambda batch: (draw(), batch)[1]} if who == "val_transform" else {}
    metrics |= {"failing": Fails(4)} if fails else {}
    trainer = make_trainer(model, loader, loader, metrics=metrics, **options)
    with trainer.evaluating():  # the control: something is drawn
        before = random_states()
        _, result = trainer.evaluate(next(iter(loader)))
        metrics["drawing"].update(result.outputs, result.targets)
        drawn = random_states()
    assert not are_same(before, drawn)
    assert are_same(before, random_states())
    with pytest.raises(RuntimeError, match="broken") if fails else nullcontext():
        trainer.validate()
    assert are_same(before, random_states())
    assert [m.training for m in model.modules()] == flags


def test_what_draws_in_validation_does_not_change_what_is_trained(make_data):
    """The first epoch's validation lies before the second one's dropout."""

    def trained(*drawing):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), *drawing).double()
        make_trainer(model, DataLoader(make_data(8), 2, shuffle=True), DataLoader(make_data(4), 2)).fit(2)
        return weights_of(model)

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(DrawsInForward()), strict=True))


def test_a_model_left_in_eval_mode_is_trained_in_train_mode_and_given_back(make_data):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5)).double().eval()
    seen = []
    model[1].register_forward_hook(lambda m, a, b: seen.append(m.training))
    make_trainer(model, DataLoader(make_data(2), batch_size=2)).fit(1)
    assert seen == [True]
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_batch_leaves_the_weights_unchanged_and_is_named(make_model, make_data, accumulation, value):
    """Trap 7."""
    data = make_data(12)
    data.tensors[0][8:10] = value
    model = make_model()
    seen = []

    class Watch(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            seen.append(weights_of(model))

    trainer = make_trainer(
        model, DataLoader(data, 2), callbacks=[Watch()], gradient_accumulation_steps=accumulation, metrics=[]
    )
    with pytest.raises(
        NonFiniteError, match=rf"loss is nan at optimizer step {4 // accumulation} \(epoch 0, batch 4\)"
    ):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 4 // accumulation
    for now, then in zip(weights_of(model), seen[3 // accumulation * accumulation - (accumulation > 1)], strict=True):
        assert torch.equal(now, then)
    assert all(bool(w.isfinite().all()) for w in weights_of(model))


def test_a_gradient_that_is_not_finite_is_named_when_clipping_looks_at_it(make_model, loader):
    model = make_model()
    before = weights_of(model)
    loss_fn = nn.CrossEntropyLoss()

    def kinked(outputs, targets):  # finite, with an infinite slope
        return loss_fn(outputs, targets) + (outputs - outputs.detach()).abs().sum().sqrt()

    with pytest.raises(NonFiniteError, match=r"norm of the gradient is (nan|inf) at optimizer step 0"):
        make_trainer(model, loader, loss_fn=kinked, gradient_clip_norm=1.0).fit(1)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))


def test_start_epoch_sees_that_epochs_order(make_model, make_data):
    """Trap 8: the order differs from epoch to epoch, and ``start_epoch=k`` sees epoch k's."""

    class Orders(Callback):
        def __init__(self):
            self.seen = {}

        def on_epoch_start(self, trainer, epoch):
            self.seen[epoch] = self.current = []

    def run(epochs, start_epoch=0, seed=5):
        orders = Orders()

        class Watching(Trainer):
            def compute_loss(self, batch):
                orders.current += batch[0][:, 0, 0, 0].tolist()
                return super().compute_loss(batch)

        model = make_model()
        loader = DataLoader(make_data(10), batch_size=2, shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Watching(model, optimizer, nn.CrossEntropyLoss(), loader, callbacks=[orders], seed=seed, progress=False).fit(
            epochs, start_epoch
        )
        return orders.seen

    whole = run(4)
    assert len({tuple(order) for order in whole.values()}) == 4
    assert run(4, start_epoch=2) == {2: whole[2], 3: whole[3]}
    assert run(1, seed=6)[0] != whole[0]


def test_epochs_is_the_final_count_and_history_goes_on(make_model, loader):
    trainer = make_trainer(make_model(), loader)
    first = trainer.fit(2)
    assert len(first["train_loss"]) == 2
    second = trainer.fit(5, start_epoch=2)
    assert len(second["train_loss"]) == 5
    assert second["train_loss"][:2] == first["train_loss"]
    again = trainer.fit(1)
    assert len(again["train_loss"]) == 1


def test_stop_closes_the_epoch_at_the_next_optimizer_step(make_model, make_data):
    class Stops(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            if batch_idx == 2:
                trainer.stop()

    loader = DataLoader(make_data(12), batch_size=1)
    trainer = make_trainer(make_model(), loader, loader, callbacks=[Stops()], gradient_accumulation_steps=2)
    history = trainer.fit(5)
    assert trainer.state.optimizer_steps == 2
    assert len(history["val_loss"]) == 1


def test_batches_of_every_customary_shape_train_alike(make_model, make_data):
    images, masks = make_data(8).tensors
    pair = namedtuple("Pair", "image mask")
    kinds = {
        "tuple": lambda x, y: (x, y),
        "list": lambda x, y: [x, y],
        "namedtuple": lambda x, y: pair(x, y),
        "torchgeo": lambda x, y: {"image": x, "mask": y, "crs": "EPSG:32633", "bounds": object(), "transform": x[0]},
        "label": lambda x, y: {"image": x, "label": y},
        "target": lambda x, y: {"image": x, "target": y},
    }
    results = set()
    for kind in kinds.values():
        batches = [kind(images[i : i + 2], masks[i : i + 2]) for i in range(0, 8, 2)]
        results.add(repr(make_trainer(make_model(), batches, batches).fit(2)))
    assert len(results) == 1


def test_a_step_of_the_users_own_keeps_everything_working(make_model, make_data):
    """A model of two inputs and a loss of two parts: one method is overridden."""
    data = make_data(8, ignored=0.5)
    images, masks = data.tensors

    class Two(nn.Module):
        def __init__(self, one):
            super().__init__()
            self.one = one

        def forward(self, a, b):
            return {"main": self.one(a) + self.one(b), "extra": self.one(a)}

    class TwoInputs(Trainer):
        def compute_loss(self, batch):
            outputs = self.model(batch["a"], *batch["more"])
            loss = self.loss_fn(outputs["main"], batch["y"]) + 0.5 * self.loss_fn(outputs["extra"], batch["y"])
            return loss, outputs["main"], batch["y"]

    def run(size, accumulation):
        batches = [
            {"a": images[i : i + size], "more": (images[i : i + size] * 2,), "y": masks[i : i + size], "id": "x"}
            for i in range(0, 8, size)
        ]
        model = Two(make_model())
        loss_fn = nn.CrossEntropyLoss(ignore_index=IGNORE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = TwoInputs(
            model, optimizer, loss_fn, batches, batches, gradient_accumulation_steps=accumulation, progress=False
        )
        return trainer.fit(1)

    small, big = run(2, 4), run(8, 1)
    assert set(small) == {"train_loss", "train_iou", "train_dice", "val_loss", "val_iou", "val_dice"}
    for name in small:
        assert small[name] == pytest.approx(big[name], rel=1e-12)


def test_a_step_without_targets_counts_samples(make_model, make_data):
    class Autoencoder(Trainer):
        def compute_loss(self, batch):
            outputs = self.model(batch)
            return (outputs - batch).pow(2).mean(), outputs, None

    images = make_data(5, channels=4).tensors[0]
    model = make_model(channels=4)
    trainer = Autoencoder(
        model, torch.optim.SGD(model.parameters(), lr=0.0), nn.MSELoss(), DataLoader(images, 2), progress=False
    )
    history = trainer.fit(1)
    assert set(history) == {"train_loss"}
    assert history["train_loss"][0] == pytest.approx(float((model(images) - images).pow(2).mean().detach()), rel=1e-12)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(ignore_index=IGNORE), DiceLoss(ignore_index=IGNORE)], ids=["cross-entropy", "dice"]
)
def test_from_hook_to_hook_nobody_waits_for_the_device(
    make_model, make_data, monkeypatch, as_on_an_accelerator, loss_fn, accumulation
):
    """Not the step, nor metrics, clipping, a schedule by batches, averages, progress, nor what hands on the loss."""

    def counted(cells, minlength):  # which is how metrics count where a size would have to be waited for
        return torch.zeros(minlength, dtype=torch.int64).scatter_add_(0, cells.long(), torch.ones_like(cells).long())

    monkeypatch.setattr(torch, "bincount", counted)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    with FromHookToHook() as watched:
        usual = [LRSchedulerCallback(schedule, step_on="batch"), EMACallback(decay=0.9), ProgressCallback()]
        trainer = make_trainer(
            model, DataLoader(make_data(10, ignored=0.5), 2), DataLoader(make_data(4), 2), loss_fn, optimizer,
            callbacks=[watched.first, *usual, watched.last], gradient_accumulation_steps=accumulation,
            gradient_clip_norm=1.0,
        )  # fmt: skip
        history = trainer.fit(2)
    assert watched.batches == 9
    assert schedule.last_epoch == trainer.state.optimizer_steps == 2 * -(-5 // accumulation)
    assert {"train_loss", "train_iou"} <= set(history)


@pytest.mark.parametrize(
    "read",
    [
        float, int, bool, lambda loss: loss.item(), lambda loss: loss.tolist(), lambda loss: loss.cpu(),
        lambda loss: loss.to("cpu"), lambda loss: loss.numpy(), lambda loss: f"{loss:.3f}", str,
        lambda loss: torch.tensor(0.0), lambda loss: loss.reshape(1).nonzero(),
    ],
)  # fmt: skip
def test_a_callback_that_waits_for_the_device_is_seen(make_model, loader, as_on_an_accelerator, read):
    """The control."""

    class Reads(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            read(logs["train_loss"])

    with FromHookToHook() as watched:
        trainer = make_trainer(make_model(), loader, callbacks=[watched.first, Reads(), watched.last])
        with pytest.raises(AssertionError):
            trainer.fit(1)
    assert watched.batches == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_callbacks_are_given_the_steps_own_loss_detached(make_model, loader, accumulation):
    losses, given = [], []

    class Keeps(Trainer):
        def compute_loss(self, batch):
            result = super().compute_loss(batch)
            losses.append(result[0])
            return result

    class Takes(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            given.append(logs["train_loss"])

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"callbacks": [Takes()], "gradient_accumulation_steps": accumulation, "device": "cpu", "progress": False}
    Keeps(model, optimizer, nn.CrossEntropyLoss(), loader, **options).fit(1)
    assert len(given) == len(losses) == 10
    for loss, own in zip(given, losses, strict=True):
        assert (type(loss), loss.ndim, loss.requires_grad, loss.dtype) == (torch.Tensor, 0, False, torch.float64)
        assert loss.data_ptr() == own.data_ptr()  # no copy, nor a number that was read and wrapped again


def test_nan_is_kept_in_the_history_where_nothing_was_valid(make_model, make_data):
    data, empty = make_data(4), make_data(4)
    empty.tensors[1][:] = IGNORE
    loss_fn = nn.CrossEntropyLoss(ignore_index=IGNORE)
    history = make_trainer(make_model(), DataLoader(data, 2), DataLoader(empty, 2), loss_fn).fit(1)
    assert math.isnan(history["val_loss"][0])
    assert math.isnan(history["val_iou"][0])


def test_on_an_accelerator_the_epochs_end_names_the_first_bad_batch(make_model, make_data, monkeypatch, tmp_path):
    data = make_data(20)
    data.tensors[0][8:10] = torch.nan
    begin = Stepper.begin
    monkeypatch.setattr(Stepper, "begin", lambda self, *p: begin(self, *p) or setattr(self, "looks", False))
    saver = CheckpointCallback(tmp_path, monitor="train_loss")
    trainer = make_trainer(make_model(), DataLoader(data, 2), callbacks=[saver])
    with pytest.raises(NonFiniteError, match=r"epoch 0 was not finite from batch 4 on"):
        trainer.fit(1)
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_ruined_the_weights_is_told_from_a_bad_batch(make_model, loader):
    def kinked(outputs, targets):
        return (outputs * 0).abs().mean().sqrt()

    with pytest.raises(NonFiniteError, match=r"weights were not finite before this step.*set gradient_clip_norm"):
        make_trainer(make_model(), loader, loss_fn=kinked, metrics=None).fit(1)


def test_a_callback_that_leaves_eval_mode_behind_does_not_change_the_next_epoch(make_data):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).double()
    model[2].eval()
    seen = []
    model[1].register_forward_hook(lambda m, a, b: seen.append([part.training for part in model.modules()]))

    class Plots(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            trainer.model.eval()

    make_trainer(model, DataLoader(make_data(4), batch_size=4), callbacks=[Plots()]).fit(2)
    assert seen == [[True, True, True, False]] * 2


def test_a_loss_module_is_evaluated_in_eval_mode(make_model, loader):
    seen = []

    class Loss(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            seen.append(self.training)
            return super().forward(outputs, targets)

    loss_fn = Loss()
    make_trainer(make_model(), loader, loader, loss_fn).fit(1)
    assert seen == [True] * 10 + [False] * 10
    assert loss_fn.training


def test_stop_before_the_first_epoch_trains_nothing(make_model, loader):
    class Stops(Callback):
        def on_train_start(self, trainer):
            trainer.stop()

    trainer = make_trainer(make_model(), loader, callbacks=[Stops()])
    assert trainer.fit(3) == {}
    assert trainer.state.optimizer_steps == 0


def test_metrics_see_outputs_without_their_graph(make_model, loader):
    class Watch(IoU):
        def update(self, outputs, targets):
            assert not outputs.requires_grad
            super().update(outputs, targets)

    make_trainer(make_model(), loader, loader, metrics=[Watch(4)]).fit(1)


def test_loaders_without_a_length(make_model, make_data):
    images, masks = make_data(6).tensors

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(zip(images, masks, strict=True))

    loader = DataLoader(Endless(), batch_size=2)
    history = make_trainer(make_model(), loader, loader).fit(2)
    assert len(history["val_loss"]) == 2


def test_a_progress_callback_of_ones_own_replaces_the_default(make_model, loader, capsys):
    make_trainer(make_model(), loader, callbacks=[ProgressCallback()], progress=True).fit(1)
    assert len(capsys.readouterr().out.splitlines()) == 4  # once the seed, the columns, the epoch, the best


def test_a_memory_that_no_checkpoint_holds_is_found_before_the_first_step(make_model, loader):
    class Remembers(Callback):
        def state_dict(self):
            return {"log": [1, lambda: 2]}

        def load_state_dict(self, state):
            pass

    trainer = make_trainer(make_model(), loader, callbacks=[Remembers()])
    with pytest.raises(TypeError, match=r"Remembers\.state_dict\(\)\.log\.1 is a builtins\.function"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 0


def test_transforms_of_batches_are_applied_on_their_side_alone_and_their_draws_are_resumed(
    make_model, make_data, tmp_path
):
    seen = {True: [], False: []}

    def transform(training):
        def apply(batch):
            images, masks = batch
            factor = torch.rand(()) if training else torch.rand(()).round() + 1
            seen[training].append(float(images.sum() * factor))
            return images * factor, masks

        return apply

    def fit(epochs, folder, **kwargs):
        torch.manual_seed(3)
        model = make_model()
        trainer = Trainer(
            model, torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss(ignore_index=255),
            DataLoader(make_data(), 2, shuffle=True), DataLoader(make_data(), 2), device="cpu", seed=1, progress=False,
            callbacks=[CheckpointCallback(folder)], train_transform=transform(True), val_transform=transform(False),
        )  # fmt: skip
        return trainer.fit(epochs, **kwargs), model

    whole, model = fit(2, tmp_path / "whole")
    assert len(seen[True]) == len(seen[False]) == 20
    assert len(set(seen[True])) == 20
    fit(1, tmp_path / "parts")
    parts, other = fit(2, tmp_path / "parts", resume="auto")
    assert parts == whole
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_batch_that_a_transform_spoils_is_explained_as_the_step_saw_it(make_model, loader):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = nn.CrossEntropyLoss(ignore_index=255)
    wrong = Trainer(
        model, optimizer, loss_fn, loader, progress=False, train_transform=lambda batch: (batch[0][:, :2], batch[1])
    )
    with pytest.raises(BatchError, match=r"3 .*2|2 .*3"):
        wrong.fit(1)
    with pytest.raises(TypeError, match="val_transform must be a callable that takes a batch"):
        Trainer(model, optimizer, loss_fn, loader, loader, progress=False, val_transform=0.5)


def test_a_checkpoint_knows_what_its_model_is_made_of_and_its_configuration(make_data, loader, tmp_path):
    network = create_model("unet_resnet18", in_channels=3, num_classes=4)
    model = RasterModel(network, ["B4", "B3", "B2"], [1, 2, 3], [4, 5, 6], class_names=list("abcd")).double()
    config = {"data": {"scenes": ["a.tif"], "classes": {1: "forest"}}}
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), loader, progress=False, config=config
    )
    info = read(trainer.save(tmp_path / "c")).info
    assert info["config"] == config
    assert info["model"] == model.model_config
    again = RasterModel.from_config(info["model"])
    again.load_state_dict(read(tmp_path / "c").model)
    assert torch.equal(again.std, torch.tensor([4.0, 5.0, 6.0]))
    with pytest.raises(TypeError, match=r"config\.path"):
        Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), loader, progress=False,
            config={"path": tmp_path}, callbacks=[CheckpointCallback(tmp_path / "d", monitor="train_loss")],
        ).fit(1)  # fmt: skip


@pytest.mark.parametrize("window", [1, 2])
def test_from_fit_to_backward_it_is_three_calls(window):
    found = []
    model = nn.Linear(2, 3)

    def look(gradient):
        frames = [frame.frame for frame in inspect.stack()]
        ours = [f.f_code.co_name for f in frames if f.f_globals.get("__name__", "").startswith("ununennium.")]
        found.append(ours[: ours.index("fit") + 1])

    model.weight.register_hook(look)
    batches = [(torch.ones(2, 2), torch.tensor([0, 2]))] * 4
    make_trainer(model, batches, gradient_accumulation_steps=window).fit(1)
    assert found[1:] == [["train", "_fit_epoch", "fit"]] * 3  # the first goes under a guard


def test_metrics_may_come_from_a_generator(make_model, loader):
    history = make_trainer(make_model(), loader, loader, metrics=(metric for metric in [IoU(4)])).fit(1)
    assert {"train_iou", "val_iou"} <= history.keys()
