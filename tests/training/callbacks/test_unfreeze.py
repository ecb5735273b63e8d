"""Parts of a model that are frozen at first, and freed at their epochs."""

import copy

import pytest
import torch
from test_ema import data, trainer_of
from torch import nn
from torch.utils.data import DataLoader

from ununennium.training import Callback, CheckpointCallback, CheckpointError, GradualUnfreeze


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.encoder = nn.Sequential(
                nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
            )
            self.head = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.head(self.encoder(x))


SCHEDULE = {1: "encoder.1", 2: ["encoder"]}


class Watch(Callback):
    def __init__(self):
        self.weights, self.modes, self.gradients = [], [], []

    def on_batch_end(self, trainer, batch_idx, logs):
        model = trainer.model
        self.modes.append((model.encoder[0][1].training, model.head[0].training))
        self.gradients.append([name for name, p in model.named_parameters() if p.grad is not None])

    def on_epoch_end(self, trainer, epoch, logs):
        self.weights.append(copy.deepcopy(trainer.model.state_dict()))


def make(callbacks, model=None, **kwargs):
    model = Net() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    return trainer_of(callbacks, model, optimizer=optimizer, **kwargs)


def same(one, other, prefix):
    return all(torch.equal(v, other[k]) for k, v in one.items() if k.startswith(prefix))


def test_each_part_is_freed_at_its_epoch_and_nothing_moves_it_before():
    """Neither gradient, weight decay, nor statistics; the head, and what is named inside a part, go by themselves."""
    watch, model = Watch(), Net()
    first = copy.deepcopy(model.state_dict())
    make([watch, GradualUnfreeze(SCHEDULE)], model).fit(3)
    zeroth, one, two = watch.weights
    assert same(first, zeroth, "encoder")
    assert not same(first, zeroth, "head.1.weight")
    assert same(zeroth, one, "encoder.0")
    assert not same(zeroth, one, "encoder.1.0.weight")
    assert not same(one, two, "encoder.0.0.weight")
    assert not same(one, two, "encoder.0.1.running_mean")
    assert watch.modes == [(False, True)] * 12 + [(True, True)] * 6
    assert watch.gradients[0] == [name for name, _ in model.named_parameters() if name.startswith("head")]
    assert all(p.requires_grad for p in model.parameters())


def test_a_parameter_can_be_named():
    watch = Watch()
    make([watch, GradualUnfreeze({1: "head.1.bias"})]).fit(2)
    assert "head.1.bias" not in watch.gradients[0]
    assert "head.1.weight" in watch.gradients[0]
    assert "head.1.bias" in watch.gradients[6]


def test_what_was_frozen_before_stays_frozen():
    model = Net()
    model.encoder[0][0].weight.requires_grad_(False)
    make([GradualUnfreeze({1: "encoder"})], model).fit(2)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["encoder.0.0.weight"]


@pytest.mark.parametrize("frozen", [False, True])
def test_from_every_checkpoint_it_goes_on_with_the_same_bits(tmp_path, frozen):
    def trainer(folder):
        model = Net()
        model.encoder[1][0].bias.requires_grad_(not frozen)
        save = CheckpointCallback(folder, every_n_steps=1, keep_last=100)
        train = DataLoader(data(), 2, shuffle=True)
        return make([GradualUnfreeze(SCHEDULE), save], model, train=train, gradient_accumulation_steps=2)

    whole = trainer(tmp_path / "whole")
    history = whole.fit(3)
    for path in sorted((tmp_path / "whole").glob("step-*")):
        again = trainer(tmp_path / f"from-{path.name}")
        again.fit(3, resume=path)
        assert again.history == history
        assert same(whole.model.state_dict(), again.model.state_dict(), "")
        assert [p.requires_grad for p in again.model.parameters()] == [
            p.requires_grad for p in whole.model.parameters()
        ]


def test_a_validation_between_does_not_wake_frozen_statistics():
    class Validates(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            trainer.validate()

    watch = Watch()
    make([Validates(), watch, GradualUnfreeze({1: "encoder"})]).fit(1)
    assert watch.modes == [(False, True)] * 6


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({1: "encodr"}, r"the model has no part 'encodr': is one of 'encoder'"),
        ({1: "xyzzy"}, r"the model has no part 'xyzzy'; its parts are encoder, head"),
        ({1: ["encoder", "head"]}, r"in epoch 0 nothing would be trained"),
    ],
)
def test_what_can_not_be_meant_is_told_before_the_first_step(schedule, message):
    trainer = make([GradualUnfreeze(schedule)])
    with pytest.raises(ValueError, match=message):
        trainer.fit(2)
    assert trainer.state.optimizer_steps == 0


def test_parameters_that_no_optimizer_holds_are_named():
    model = Net()
    optimizer = torch.optim.AdamW(model.head.parameters())
    with pytest.raises(ValueError, match=r"does not hold 'encoder\.0\.0\.bias' and 5 more"):
        trainer_of([GradualUnfreeze(SCHEDULE)], model, optimizer=optimizer).fit(2)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ({0: "encoder"}, ValueError, "an epoch above 0, got 0"),
        ({"encoder": 1}, TypeError, "maps epochs, integers above 0"),
        ({1: "encoder", 2: "encoder"}, ValueError, "'encoder' is freed at epoch 1 and at 2"),
        ({}, ValueError, "names no part"),
        (["encoder"], TypeError, 'as {5: "encoder"} does, got '),
        ({1: 5}, TypeError, "names the parts that are freed at epoch 1, got 5"),
        ({1: ["encoder", 2]}, TypeError, "names the parts that are freed at epoch 1"),
    ],
)
def test_bad_schedules(schedule, error, message):
    with pytest.raises(error, match=message):
        GradualUnfreeze(schedule)


def test_another_schedule_is_refused(tmp_path):
    first = make([GradualUnfreeze(SCHEDULE)])
    first.fit(1)
    first.save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="GradualUnfreeze freed parts at"):
        make([GradualUnfreeze({1: "encoder"})]).fit(2, resume=tmp_path / "c")
