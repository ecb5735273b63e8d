"""Stochastic weight averaging: the mean of the last epochs, its rates and statistics, and exactness around it."""

import copy
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_ema import Net, data, trainer_of
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader

from ununennium.training import Callback, CheckpointCallback, CheckpointError, LRSchedulerCallback, SWACallback

EPOCHS = 5


class Rates(Callback):
    def __init__(self):
        self.rates, self.weights = [], []

    def on_batch_end(self, trainer, batch_idx, logs):
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])

    def on_epoch_end(self, trainer, epoch, logs):
        self.weights.append(copy.deepcopy(trainer.model.state_dict()))


class Noisy(Net):
    def __init__(self):
        super().__init__()
        self.insert(0, nn.Dropout(0.2))


def by_hand(start, anneal):
    """PyTorch's own recipe, over the same batches in the same order."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = trainer_of([])._train_batches
    averaged, schedule, rates = AveragedModel(model), None, []
    for epoch in range(EPOCHS):
        if epoch == start:
            schedule = SWALR(optimizer, 0.02, anneal)
        for loaded in loader.epoch(0, epoch):
            images, masks = loaded.batch
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), masks).backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
        if schedule is not None:
            averaged.update_parameters(model)
            schedule.step()
    update_bn((loaded.batch for loaded in loader.epoch(0, EPOCHS - 1)), averaged)
    return averaged.module, rates, model


@pytest.mark.parametrize(("start", "anneal"), [(2, 2), (0, 0), (4, 1)])
def test_it_is_pytorchs_recipe(start, anneal):
    expected, rates, raw = by_hand(start, anneal)
    watch, swa = Rates(), SWACallback(0.02, start, anneal_epochs=anneal)
    trainer = trainer_of([watch, swa], validates=False)
    trainer.fit(EPOCHS)
    assert watch.rates == pytest.approx(rates, rel=1e-12)
    assert swa.num_averaged == EPOCHS - start
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    kept = swa.state_dict()["model"]
    for name, value in raw.state_dict().items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-6)


def test_other_schedulers_do_not_change_the_rate_of_the_averaged_epochs():
    expected = by_hand(2, 2)[1][2 * 6 :]

    def rates(make, step_on, before):
        watch, swa = Rates(), SWACallback(0.02, 2, anneal_epochs=2)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        other = LRSchedulerCallback(make(optimizer), step_on)
        trainer_of([watch, *([other, swa] if before else [swa, other])], model, optimizer=optimizer).fit(EPOCHS)
        return watch.rates

    for before in (True, False):
        found = rates(lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), "epoch", before)
        assert found[12:] == pytest.approx(expected, rel=1e-12)
        assert found[:12] == [0.05] * 12
    assert rates(lambda o: CosineAnnealingLR(o, 30), "batch", True)[24:] == pytest.approx([0.02] * 6)


def test_validation_is_of_the_raw_weights_until_the_end():
    plain = trainer_of([])
    watch, swa = Rates(), SWACallback(0.1, 2, anneal_epochs=0)
    trainer = trainer_of([watch, swa])
    assert trainer.fit(EPOCHS) == plain.fit(EPOCHS)  # its rate is the run's own: nothing else may differ
    for name, value in watch.weights[-1].items():
        assert torch.equal(plain.model.state_dict()[name], value)
    assert not torch.equal(trainer.model[0].weight, plain.model[0].weight)
    assert torch.equal(trainer.model.calls, plain.model.calls)


def test_the_order_and_all_that_is_random_go_on_as_if_nothing_had_been_looked_at():
    def make():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        train = DataLoader(data(), 2, shuffle=True)
        return trainer_of([swa := SWACallback(0.02, 1)], Noisy(), train=train), swa

    whole, _ = make()
    whole.fit(4)
    parts, swa = make()
    parts.fit(2)
    assert swa.num_averaged == 1
    parts.fit(4, start_epoch=2)
    assert parts.history == whole.history
    for a, b in zip(parts.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(parts.optimizer.state_dict()["state"][0]["momentum_buffer"],
                       whole.optimizer.state_dict()["state"][0]["momentum_buffer"])  # fmt: skip


def test_frozen_batchnorm_keeps_its_statistics():
    model = Net()
    model[1].running_mean.fill_(0.3)
    model[1].eval()
    trainer_of([SWACallback(0.02, 1)], model).fit(3)
    assert model[1].running_mean.tolist() == pytest.approx([0.3] * 4)
    assert not model[1].training
    assert model[1].momentum == 0.1


def test_a_run_that_is_stopped_ends_with_the_mean_of_what_there_is():
    class Stops(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            if epoch == 2:
                trainer.stop()

    watch, swa = Rates(), SWACallback(0.02, 1)
    trainer = trainer_of([watch, swa, Stops()])
    trainer.fit(9)
    mean = (watch.weights[1]["0.weight"] + watch.weights[2]["0.weight"]) / 2
    torch.testing.assert_close(trainer.model[0].weight, mean)
    assert trainer.model[1].num_batches_tracked == 6  # computed anew, over one epoch


def test_a_run_that_fails_is_left_with_the_raw_weights():
    class Fails(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            if epoch == 2:
                raise OSError("no space")

    watch = Rates()
    trainer = trainer_of([watch, SWACallback(0.02, 1), Fails()])
    with pytest.raises(OSError, match="no space"):
        trainer.fit(9)
    assert torch.equal(trainer.model[0].weight, watch.weights[2]["0.weight"])


@pytest.mark.parametrize("workers", [0, 2])
def test_from_every_checkpoint_it_ends_with_the_same_bits(tmp_path, workers):
    def make(folder):
        model = Noisy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = LRSchedulerCallback(OneCycleLR(optimizer, max_lr=0.1, total_steps=12), step_on="batch")
        save = CheckpointCallback(folder, every_n_steps=1, keep_last=100)
        swa = SWACallback(0.02, 1, anneal_epochs=2)
        train = DataLoader(data(), 2, shuffle=True, num_workers=workers)
        return trainer_of([swa, schedule, save], model, optimizer=optimizer, train=train,
                          gradient_accumulation_steps=2), swa  # fmt: skip

    torch.manual_seed(3)
    whole, swa = make(tmp_path / "whole")
    history = whole.fit(4)
    paths = sorted((tmp_path / "whole").glob("step-*"))
    for path in paths if workers == 0 else paths[7:8]:
        torch.manual_seed(4)
        again, other = make(tmp_path / f"from-{path.name}")
        again.fit(4, resume=path)
        assert again.history == history
        for name, value in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), (path, name)
        for name, value in swa.state_dict()["model"].items():
            assert torch.equal(other.state_dict()["model"][name], value), (path, name)
        rates = [[group["lr"] for group in t.optimizer.param_groups] for t in (whole, again)]
        assert rates[0] == rates[1]


def test_the_last_checkpoint_holds_the_mean_with_its_statistics_and_gives_it_when_asked(tmp_path):
    trainer = trainer_of([SWACallback(0.02, 1), CheckpointCallback(tmp_path)])
    trainer.fit(3)
    final = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    found = load_file(tmp_path / "last" / "averaged.safetensors")
    assert all(torch.equal(found[k], v) for k, v in final.items())
    other = trainer_of([])
    other.load_weights(tmp_path / "last")
    assert not torch.equal(other.model[0].weight, final["0.weight"])  # the figures are of the raw weights
    other.load_weights(tmp_path / "last", averaged=True)
    assert other.validate() == trainer.validate()
    trainer.save(tmp_path / "after")  # and what the model holds in the end is what is meant
    other.load_weights(tmp_path / "after")
    assert torch.equal(other.model[0].weight, final["0.weight"])
    longer = trainer_of([SWACallback(0.02, 1), CheckpointCallback(tmp_path / "b")])
    longer.fit(5, resume=tmp_path / "after")
    whole = trainer_of([SWACallback(0.02, 1)])
    whole.fit(5)
    assert torch.equal(whole.model[0].weight, longer.model[0].weight)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SWACallback(0, 2), ValueError, "swa_lr must be above 0"),
        (lambda: SWACallback(0.1, -1), ValueError, "start_epoch must be at least 0"),
        (lambda: SWACallback(0.1, 1.5), TypeError, "start_epoch must be an integer"),
        (lambda: SWACallback(0.1, 1, anneal_strategy="exp"), ValueError, '"cos" or "linear"'),
        (lambda: trainer_of([SWACallback(0.1, 3)]).fit(3), ValueError, "start_epoch=3 leaves no epoch of 3"),
        (lambda: trainer_of([SWACallback([0.1, 0.2], 1)]).fit(3), ValueError, "2 rates, and the optimizer 1"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_another_schedule_is_refused(tmp_path):
    first = trainer_of([SWACallback(0.02, 1)])
    first.fit(2)
    first.save(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"SWACallback had swa_lr=0\.02, this one has 0\.05"):
        trainer_of([SWACallback(0.05, 1)]).fit(3, resume=tmp_path / "c")
