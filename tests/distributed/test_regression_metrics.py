"""MAE, RMSE and R² of N processes are those of one, far from zero, and go on in another number of processes."""

import contextlib
import os
import signal

import pytest
import torch
from processes import run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.metrics import MAE, R2, RMSE, MetricCollection
from ununennium.training import Callback, CheckpointCallback, Trainer
from ununennium.training.distributed import group_on, join
from ununennium.training.errors import Preempted

NODATA, LEVEL, GLOBAL, EPOCHS = -9999.0, 1e6, 6, 2
NAMES = ["height", "cover"]


def metrics():
    return [kind(ignore_value=NODATA, channel_names=NAMES) for kind in (MAE, RMSE, R2)]


def heights(samples):
    """Images and targets whose level grows with the sample, and so does the share that is no data."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 5, 5, generator=generator, dtype=torch.float64)
    levels = LEVEL + torch.arange(samples, dtype=torch.float64)[:, None, None, None]
    targets = levels + images[:, :2] + 0.1 * torch.randn(samples, 2, 5, 5, generator=generator)
    share = torch.linspace(0, 0.9, samples)[:, None, None, None]
    targets[torch.rand(targets.shape, generator=generator) < share] = NODATA
    return images, targets


def counted(rank, world, batches):
    """What every process has when some have seen nothing; process r is given batches r, r + world, …."""
    if world > 1:
        join(None, "cpu")
    group = group_on(torch.device("cpu"), world > 1)
    collection = MetricCollection(metrics())
    images, targets = heights(20)
    collection.check_reducible()
    for batch in range(rank, batches, world):
        rows = slice(3 * batch, 3 * batch + 3)
        collection.update(images[rows, :2] + LEVEL + 3 * batch, targets[rows])
    alone = collection.compute()
    both = collection.compute(group.sum)
    return both, alone, collection.compute()


@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("world", [2, 3])
def test_figures_are_of_all_processes_and_of_one_that_saw_nothing(tmp_path, world, batches):
    _, expected, _ = counted(0, 1, batches)
    results = run(world, counted, tmp_path, batches)
    for both, alone, after in results:
        assert both == results[0][0]  # to the bit, so that all decide alike
        assert both == pytest.approx(expected, rel=1e-9)
        assert after == pytest.approx(alone, nan_ok=True)  # asking the others changes nothing
    assert results[0][1] != expected or batches == 1


class Leaves(Callback):
    """Have process 0 told to leave before this optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_batch_start(self, trainer, batch_idx):
        if trainer.rank == 0 and trainer.state.optimizer_steps + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def masked(outputs, targets):
    there = targets != NODATA
    return (outputs[there] - targets[there]).square().sum() / there.sum().clamp(min=1)


def part(rank, world, folder, step):
    start = 7 if (folder / "last").exists() else 0
    torch.manual_seed(start)
    model = nn.Conv2d(3, 2, 3, padding=1).double()
    model.bias.data += LEVEL + 10 + start
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.0), masked,
        DataLoader(TensorDataset(*heights(29)), GLOBAL // world, shuffle=True),
        DataLoader(TensorDataset(*heights(7)), GLOBAL // world),
        [Leaves(step), CheckpointCallback(folder, monitor="val_r2")],
        distributed=world > 1, device="cpu", seed=0, progress=False, metrics=metrics(),
    )  # fmt: skip
    with contextlib.suppress(Preempted):
        trainer.fit(EPOCHS, resume="auto")
    return trainer.history, trainer.state.optimizer_steps


@pytest.mark.parametrize("worlds", [(2, 1, 3), (1, 3, 2)], ids=str)
def test_they_go_on_inside_an_epoch_in_another_number_of_processes(tmp_path, worlds):
    """The model stays as it is (a rate of 0), so that the figures of metrics alone are compared."""
    expected = part(0, 1, tmp_path / "whole", None)
    assert expected[1] == 10
    for number, (world, step) in enumerate(zip(worlds, (2, 8, None), strict=True)):
        results = run(world, part, tmp_path / f"{number}", tmp_path / "c", step)
        assert [result[1] for result in results] == [step or 10] * world
    for history, _ in results:
        assert history.keys() == expected[0].keys()
        assert {"train_r2", "train_mae/height", "val_rmse/cover"} < history.keys()
        for name, values in expected[0].items():
            if not name.endswith("loss"):  # which does not say what it is a mean over
                assert history[name] == pytest.approx(values, rel=1e-9), name
