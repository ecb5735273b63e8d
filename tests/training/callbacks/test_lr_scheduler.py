"""Schedulers step at the right time, and go on after a resume."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as sched

from ununennium.metrics import IoU
from ununennium.training import Callback, CheckpointCallback, CheckpointError, LRSchedulerCallback, Trainer
from ununennium.training.checkpoint import read


class Rates(Callback):
    def __init__(self):
        self.by_batch, self.by_epoch = [], []

    def on_batch_start(self, trainer, batch_idx):
        self.by_batch.append(trainer.optimizer.param_groups[0]["lr"])

    def on_epoch_start(self, trainer, epoch):
        self.by_epoch.append(trainer.optimizer.param_groups[0]["lr"])


def make():
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)


BATCHES = [(torch.ones(2, 2), torch.ones(2, 1))] * 5  # with accumulation 2: three steps an epoch, the last short
SCHEDULES = {
    "OneCycleLR": (lambda o: sched.OneCycleLR(o, max_lr=1.0, total_steps=12), "batch"),
    "CosineAnnealingLR": (lambda o: sched.CosineAnnealingLR(o, T_max=4), "epoch"),
    "CosineAnnealingLR by step": (lambda o: sched.CosineAnnealingLR(o, T_max=12), "batch"),
    "SequentialLR": (
        lambda o: sched.SequentialLR(o, [sched.LinearLR(o, 0.1, total_iters=2), sched.ExponentialLR(o, 0.5)], [2]),
        "epoch",
    ),
    "MultiStepLR": (lambda o: sched.MultiStepLR(o, [1, 3]), "epoch"),
    "ReduceLROnPlateau": (lambda o: sched.ReduceLROnPlateau(o, patience=0), "epoch"),
}


def expected_rates(make_scheduler, step_on, values, epochs=4, steps=3):
    """Return the rates of a hand-written loop at the start of each batch and epoch."""
    _, optimizer = make()
    scheduler = make_scheduler(optimizer)
    by_batch, by_epoch = [], []
    for epoch in range(epochs):
        by_epoch.append(optimizer.param_groups[0]["lr"])
        for window in ([0, 1], [2, 3], [4]):
            by_batch += [optimizer.param_groups[0]["lr"]] * len(window)
            optimizer.step()
            if step_on == "batch":
                scheduler.step()
        if step_on == "epoch":
            scheduler.step(*([values[epoch]] if isinstance(scheduler, sched.ReduceLROnPlateau) else []))
    return by_batch, by_epoch


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_a_hand_written_loops_also_after_a_resume(scripted, tmp_path, name):
    make_scheduler, step_on = SCHEDULES[name]
    values = [1.0, 2.0, 0.5, 0.6]
    by_batch, by_epoch = expected_rates(make_scheduler, step_on, values)

    def trainer_of():
        model, optimizer = make()
        scheduler = make_scheduler(optimizer)
        monitor = "figure" if isinstance(scheduler, sched.ReduceLROnPlateau) else None
        rates = Rates()
        callbacks = [rates, LRSchedulerCallback(scheduler, step_on, monitor=monitor)]
        trainer = scripted(
            values, callbacks, model=model, optimizer=optimizer, batches=BATCHES, gradient_accumulation_steps=2
        )
        return trainer, rates

    trainer, rates = trainer_of()
    trainer.fit(4)
    assert (rates.by_batch, rates.by_epoch) == (by_batch, by_epoch)
    for cut in range(1, 4):  # resuming from the end of every epoch (trap 11)
        first, rates = trainer_of()
        first.fit(cut)
        first.save(tmp_path / f"{cut}")
        second, rates = trainer_of()
        second.load(tmp_path / f"{cut}")
        second.fit(4)
        assert (rates.by_batch, rates.by_epoch) == (by_batch[5 * cut :], by_epoch[cut:])


def test_a_plateaus_patience_and_cooldown_go_on_from_every_checkpoint(scripted, tmp_path):
    """Trap 11: how many epochs were bad, how long it waits after a cut, and the best value are all remembered."""
    values = [1.0, 2.0, 2.0, 2.0, 2.0, 0.5, 2.0, 2.0, 2.0]
    expected = [1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01]  # cut after epochs 2 and 7, the second bad one each

    def trainer_of(folder):
        model, optimizer = make()
        plateau = sched.ReduceLROnPlateau(optimizer, factor=0.1, patience=1, cooldown=2)
        schedule = LRSchedulerCallback(plateau, monitor="figure")
        saver = CheckpointCallback(folder, "figure", save_best_only=False)
        rates = Rates()
        return scripted(values, [rates, schedule, saver], model=model, optimizer=optimizer), rates

    trainer, rates = trainer_of(tmp_path / "whole")
    trainer.fit(9)
    assert rates.by_epoch == pytest.approx(expected)
    whole, memories = rates.by_epoch, []
    for epoch in range(1, 9):
        (checkpoint,) = (tmp_path / "whole").glob(f"step-{epoch:08d}-*")
        memories.append(read(checkpoint).training["callbacks"][0][1]["scheduler"])
        trainer, rates = trainer_of(tmp_path / f"{epoch}")
        trainer.fit(9, resume=checkpoint)
        assert rates.by_epoch == whole[epoch:], epoch
    assert [memory["num_bad_epochs"] for memory in memories] == [0, 1, 0, 0, 0, 0, 1, 0]
    assert [memory["cooldown_counter"] for memory in memories] == [0, 0, 2, 1, 0, 0, 0, 2]


def test_plateau_monitors_the_validation_loss_by_default():
    _, optimizer = make()
    assert LRSchedulerCallback(sched.ReduceLROnPlateau(optimizer)).monitor == "val_loss"
    assert LRSchedulerCallback(sched.ExponentialLR(optimizer, 0.5)).monitor is None


def test_a_scheduler_over_another_optimizer_is_refused(scripted):
    _, other = make()
    trainer = scripted([1.0], [LRSchedulerCallback(sched.ExponentialLR(other, 0.5))])
    with pytest.raises(ValueError, match="made over another optimizer"):
        trainer.fit(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_on": "step"}, '"epoch" or "batch"'),
        ({"monitor": "val_loss"}, "monitor is for ReduceLROnPlateau, leave it out"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LRSchedulerCallback(sched.ExponentialLR(make()[1], 0.5), **arguments)


def test_a_plateau_scheduler_does_not_step_on_batches():
    with pytest.raises(ValueError, match="figures of an epoch"):
        LRSchedulerCallback(sched.ReduceLROnPlateau(make()[1]), step_on="batch")


def test_something_else_than_a_scheduler_is_refused():
    with pytest.raises(TypeError, match=r"LRScheduler, got 0\.1"):
        LRSchedulerCallback(0.1)


def test_another_scheduler_is_refused(scripted, tmp_path):
    def trainer_of(make_scheduler):
        model, optimizer = make()
        callbacks = [LRSchedulerCallback(make_scheduler(optimizer))]
        return scripted([1.0, 2.0], callbacks, model=model, optimizer=optimizer)

    trainer_of(lambda o: sched.StepLR(o, 1)).save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="scheduler is StepLR, this one CosineAnnealingLR"):
        trainer_of(lambda o: sched.CosineAnnealingLR(o, 5)).load(tmp_path / "c")


def test_a_plateau_in_the_wrong_direction_is_refused(make_model, loader):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback = LRSchedulerCallback(sched.ReduceLROnPlateau(optimizer, mode="min"), monitor="val_iou")
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), loader, loader, callbacks=[callback], metrics=[IoU(4)], progress=False
    )
    with pytest.raises(ValueError, match="mode='max'"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 0
