"""N processes give what one gives (traps 3, 6, 14, 15)."""

import math
import os
import random
from collections import Counter

import pytest
import torch
from processes import run
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler

from ununennium.metrics import IoU
from ununennium.training import Callback, LRSchedulerCallback, Trainer
from ununennium.training.distributed import whole
from ununennium.training.loading import EpochLoader

GLOBAL, EPOCHS = 12, 3


class Tiles(Dataset):
    """Tiles with 0 to 90 % nodata, growing with the index, turned at random; knows what was asked for."""

    def __init__(self, samples, turned=True):
        self.turned = turned
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(samples, 3, 6, 6, generator=generator, dtype=torch.float64)
        self.masks = torch.randint(0, 4, (samples, 6, 6), generator=generator)
        share = torch.linspace(0, 0.9, samples)[:, None, None]
        self.masks[torch.rand(self.masks.shape, generator=generator) < share] = 255

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if not self.turned:
            return {"image": self.images[index], "mask": self.masks[index]}
        image = self.images[index] * (1 + 0.1 * random.random()) + 0.1 * torch.randn((), dtype=torch.float64)
        return {"image": image, "mask": self.masks[index], "index": index}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)).double()


class Samples(Callback):
    def __init__(self):
        self.rates = []

    def on_batch_end(self, trainer, batch_idx, logs):
        if not trainer.state.open_batches:
            self.rates.append(trainer.optimizer.param_groups[0]["lr"])


class Recording(Trainer):
    def compute_loss(self, batch):
        self.seen = getattr(self, "seen", [])
        self.seen.append((self.state.epoch, torch.is_grad_enabled(), batch["index"].tolist()))
        return super().compute_loss(batch)


def train(rank, world, samples, val_samples, options):
    torch.manual_seed(rank)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = LRSchedulerCallback(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), step_on="batch")
    loader_options = options.pop("loader", None)
    train_loader = (
        loader_options(Tiles(samples), world)
        if loader_options
        else DataLoader(Tiles(samples), GLOBAL // world, shuffle=True)
    )
    trainer = Recording(
        model,
        optimizer,
        nn.CrossEntropyLoss(ignore_index=255),
        train_loader,
        DataLoader(Tiles(val_samples), max(GLOBAL // world, 1)),
        callbacks=[schedule, samples_log := Samples()],
        gradient_clip_norm=0.5,
        device="cpu",
        progress=False,
        seed=1,
        metrics={"iou": IoU(4, ignore_index=255, average="none")},
        **{"gradient_accumulation_steps": 2, "distributed": "RANK" in os.environ, **options},
    )
    history = trainer.fit(EPOCHS)
    return {
        "weights": {k: whole(v).clone() for k, v in trainer.model.state_dict().items()},
        "history": history,
        "confusion": trainer._figures.val.metrics._sources[0].state_dict(),
        "steps": trainer.state.optimizer_steps,
        "seen": trainer.seen,
        "rates": samples_log.rates,
    }


def one(samples, val_samples, **options):
    return train(0, 1, samples, val_samples, options)


def assert_same(results, single):
    for result in results:
        for name, value in single["weights"].items():
            torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=1e-10)
        assert result["history"].keys() == single["history"].keys()
        for name, values in single["history"].items():
            assert result["history"][name] == pytest.approx(values, rel=1e-9, abs=1e-9, nan_ok=True)
        assert result["steps"] == single["steps"]
        assert result["rates"] == single["rates"]
    counts = sum(result["confusion"]["counts"] for result in results)
    assert torch.equal(counts, single["confusion"]["counts"])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [48, 53, 49])  # 49: a last batch of a single sample, and processes without any
def test_any_number_of_processes_takes_the_steps_of_one(tmp_path, world, samples):
    single = one(samples, 7)
    assert_same(run(world, train, tmp_path, samples, 7, {}), single)


def test_without_accumulation_and_without_a_last_small_batch(tmp_path):
    options = {"gradient_accumulation_steps": 1}
    assert_same(run(2, train, tmp_path, 53, 7, dict(options)), one(53, 7, **options))


def test_every_process_sees_its_share_and_no_sample_is_counted_twice(tmp_path):
    single = one(53, 7)
    results = run(3, train, tmp_path, 53, 7, {})
    for epoch in range(EPOCHS):
        for training in (True, False):
            expected = Counter(i for e, t, ids in single["seen"] if (e, t) == (epoch, training) for i in ids)
            found = Counter(i for r in results for e, t, ids in r["seen"] if (e, t) == (epoch, training) for i in ids)
            assert found == expected


def distributed_sampler(data, world):
    sampler = (
        DistributedSampler(data, world, 0, shuffle=True, seed=5)
        if world > 1
        else DistributedSampler(data, 1, 0, seed=5)
    )
    return DataLoader(data, GLOBAL // world, sampler=sampler)


def test_a_distributed_sampler_of_the_users_is_taken_for_the_whole(tmp_path):
    options = {"loader": distributed_sampler}
    assert_same(run(2, train, tmp_path, 53, 7, dict(options)), one(53, 7, **options))


def in_workers(data, world):
    return DataLoader(data, GLOBAL // world, shuffle=True, num_workers=1)


def test_workers_change_nothing(tmp_path):
    assert_same(run(2, train, tmp_path, 30, 7, {"loader": in_workers}), one(30, 7))


def test_batches_of_a_list_or_a_sampler_of_ones_own_go_round(tmp_path):
    """Each process takes one in turn; where they do not divide, some have none."""
    for world in (2, 3):
        shares = [EpochLoader([1, 2, 3, 4, 5, 6, 7], 0, rank, world) for rank in range(world)]
        loaded = [[(b.batch, b.counts) for b in share.epoch(0, 0)] for share in shares]
        assert len({len(share) for share in loaded}) == 1
        assert sorted(b for share in loaded for b, counts in share if counts) == [1, 2, 3, 4, 5, 6, 7]
        assert all(len(EpochLoader([1] * 7, 0, r, world)) == -(-7 // world) for r in range(world))

    class Own(BatchSampler):
        pass

    data = Tiles(20)
    loader = DataLoader(data, batch_sampler=Own(RandomSampler(data), 3, drop_last=False))
    shares = [list(EpochLoader(loader, 0, rank, 2).epoch(0, 0)) for rank in range(2)]
    ids = [i for share in shares for b in share if b.counts for i in b.batch["index"].tolist()]
    assert sorted(ids) == list(range(20))


def validate(rank, world, samples):
    model = network()
    loader = DataLoader(Tiles(samples, turned=False), 2)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(ignore_index=255), loader, loader,
        distributed=world > 1, device="cpu", progress=False, metrics=[IoU(4, ignore_index=255)], seed=1,
    )  # fmt: skip
    return trainer.validate()


def validate_many(rank, world, sizes):
    return [validate(rank, world, samples) for samples in sizes]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_evaluation_counts_every_sample_once_whatever_the_remainder(tmp_path, world):
    """1 to 50 samples; a process without a batch included."""
    sizes = [*range(1, 14), 25, 49, 50]
    expected = [validate(0, 1, samples) for samples in sizes]
    for result in run(world, validate_many, tmp_path, sizes):
        assert [r["val_iou"] for r in result] == [e["val_iou"] for e in expected]  # integer counts: to the bit
        assert [r["val_loss"] for r in result] == pytest.approx([e["val_loss"] for e in expected], rel=1e-12)


def skip_bad(rank, world):
    data = Tiles(24)
    data.images[17, 0, 0, 0] = math.nan
    model = network()
    trainer = Trainer(
        model, torch.optim.AdamW(model.parameters(), 0.01), nn.CrossEntropyLoss(), DataLoader(data, 12 // world),
        distributed=world > 1, device="cpu", progress=False, seed=1, on_nonfinite="skip", metrics=None,
    )  # fmt: skip
    data.masks.clamp_(max=3)
    trainer.fit(2)
    return trainer.state.optimizer_steps, trainer.state.nonfinite_steps, model.state_dict()


def test_a_nan_in_one_process_is_skipped_by_all(tmp_path):
    steps, bad, weights = skip_bad(0, 1)
    assert (steps, bad) == (2, 2)
    for result in run(2, skip_bad, tmp_path):
        assert result[:2] == (2, 2)
        assert all(torch.allclose(v, weights[k], rtol=0, atol=1e-10) for k, v in result[2].items())
