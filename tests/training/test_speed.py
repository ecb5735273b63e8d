import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ununennium.metrics import IoU
from ununennium.training import Callback, Trainer
from ununennium.training.speed import Speed, Stopwatch


class Slow(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.02)
        return torch.randn(3, 4, 4), torch.zeros(4, 4, dtype=torch.long)


def trainer_on(dataset, **options):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    loader = DataLoader(dataset, 2)
    options = {"val_loader": loader, "device": "cpu", "progress": False, **options}
    return Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), loader, **options)


def test_waiting_for_a_slow_dataset_is_seen():
    trainer = trainer_on(Slow())
    assert trainer.speed is None
    trainer.fit(2)
    assert trainer.speed.chips == 6
    assert trainer.speed.seconds >= trainer.speed.waiting >= 6 * 0.02
    assert 0 < trainer.speed.data_wait <= 1
    assert trainer.speed.chips_per_second <= 6 / 0.12


def test_time_spent_on_batches_is_no_waiting():
    class Busy(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            time.sleep(0.05)

    trainer = trainer_on(TensorDataset(torch.randn(6, 3, 4, 4), torch.zeros(6, 4, 4).long()), callbacks=[Busy()])
    trainer.fit(1)
    assert trainer.speed.seconds - trainer.speed.waiting >= 3 * 0.05


def test_a_device_that_still_works_was_not_kept_waiting():
    class Event:
        def __init__(self, answers):
            self.answers = answers

        def record(self):
            pass

        def query(self):
            return self.answers.pop(0)

    watch = Stopwatch(torch.device("cpu"))
    watch._done = Event([True, False, True])

    def batches():
        for _ in range(2):
            time.sleep(0.03)
            yield type("Batch", (), {"counts": True, "indices": [1, 2], "batch": None})

    assert len(list(watch.timed(batches()))) == 2
    assert 0.03 <= watch.read().waiting < 0.06
    assert watch.read().chips == 4


def test_speeds_of_processes_are_put_together():
    assert Speed.together([Speed(10, 2.0, 1.0), Speed(8, 4.0, 0.0)]) == Speed(18, 4.0, 0.5)


def test_a_block_of_ones_own_sees_the_model_as_validation_does():
    seen = []

    class Zeroed(Callback):
        @contextmanager
        def evaluation(self, trainer):
            before = trainer.model[0].weight.data
            trainer.model[0].weight.data = torch.zeros_like(before)
            yield
            trainer.model[0].weight.data = before

    class Watch(IoU):
        def update(self, outputs, targets):
            seen.append((trainer.model.training, trainer.model[0].weight.abs().sum().item()))

    data = TensorDataset(torch.randn(4, 3, 4, 4), torch.zeros(4, 4, 4).long())
    trainer = trainer_on(data, callbacks=[Zeroed()], metrics=[Watch(2)])
    trainer.fit(1)
    trained = [weight for training, weight in seen if training]
    evaluated = [weight for training, weight in seen if not training]
    assert len(trained) == len(evaluated) == 2
    assert min(trained) > 0
    assert evaluated == [0, 0]
    state = torch.random.get_rng_state()
    with trainer.evaluating():
        torch.rand(3)
        assert not trainer.model.training
        assert not trainer.model(torch.randn(1, 3, 2, 2)).requires_grad
        assert trainer.model[0].weight.abs().sum() == 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert trainer.model[0].weight.abs().sum() > 0
    assert trainer.model.training


def test_the_confusion_matrix_and_the_set_up_can_be_asked_for():
    data = TensorDataset(torch.randn(4, 3, 4, 4), torch.randint(0, 2, (4, 4, 4)))
    trainer = trainer_on(data, metrics=[IoU(2, class_names=["water", "land"])], seed=7)
    trainer.fit(1)
    assert trainer.val_metrics.confusion.compute().sum() == 4 * 16
    assert trainer.val_metrics.class_names == ["water", "land"]
    assert trainer.hyperparameters["seed"] == 7
    assert trainer.hyperparameters["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    assert trainer.hyperparameters["lr"] == [pytest.approx(0.1)]
