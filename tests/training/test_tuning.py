"""A learning rate and a batch size are found, and nothing shows that they were looked for."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from victim import Augmented, build, digest

from ununennium.training import EMACallback, LRSchedulerCallback, Trainer, largest_batch, lr_range_test
from ununennium.training.tuning import LRRange


def everything(trainer):
    """All that there is of a Trainer, as values."""
    p = list(trainer.model.parameters())
    return digest(trainer), copy.deepcopy(
        {
            "groups": trainer.optimizer.param_groups,
            "optimizer": sorted(k for k in vars(trainer.optimizer) if k != "state"),
            "scaler": trainer.precision.state_dict(),
            "scale": vars(trainer.precision.scaler),
            "attributes": sorted(vars(trainer)),
            "callbacks": [type(c) for c in trainer.callbacks.callbacks],
            "loaders": [id(trainer.train_loader), id(trainer.val_loader), id(trainer._train_batches)],
            "modes": [m.training for m in trainer.model.modules()],
            "gradients": [None if x.grad is None else x.grad.tolist() for x in p],
            "needed": [x.requires_grad for x in p],
            "epochs": trainer.epochs,
            "device": str(trainer.device),
            "unseen": trainer._unseen,
            "known": trainer._figures.known,
            "accumulation": trainer.gradient_accumulation_steps,
        }
    )


def same(one, other):
    return one[0] == other[0] and str(one[1]) == str(other[1])


def seeded(folder, **kwargs):
    random.seed(1), np.random.seed(1)
    return build(folder, seed=3, unseeded=False, **kwargs)


def disturb(trainer, what):
    if what == "range":
        assert len(lr_range_test(trainer, 1e-5, 1.0, 12).rates) > 3
    else:
        assert largest_batch(trainer).batch_size == 8


@pytest.mark.parametrize("what", ["range", "batch"])
@pytest.mark.parametrize("precision", [False, "fp16"])
def test_it_leaves_everything_as_it_was_and_fit_as_if_it_had_not_been(tmp_path, what, precision):
    """Before a run, and between two fits, with a frozen layer, dropout, workers' randomness, schedules, averages."""
    plain = seeded(tmp_path / "plain", mixed_precision=precision)
    tried = seeded(tmp_path / "tried", mixed_precision=precision)
    for epochs, start in ((2, 0), (4, 2)):
        before = everything(tried)
        random_before = torch.get_rng_state(), random.getstate()
        disturb(tried, what)
        assert same(everything(tried), before)
        assert torch.equal(torch.get_rng_state(), random_before[0])
        assert random.getstate() == random_before[1]
        plain_state = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
        history = plain.fit(epochs, start_epoch=start)
        expected = digest(plain)
        random.setstate(plain_state[0]), np.random.set_state(plain_state[1]), torch.set_rng_state(plain_state[2])
        assert tried.fit(epochs, start_epoch=start) == history
        assert digest(tried) == expected


@pytest.mark.parametrize("what", ["range", "batch"])
def test_a_checkpoint_that_was_loaded_is_still_gone_on_from(tmp_path, what):
    whole = seeded(tmp_path / "whole", checkpoints={"keep_last": 1000})
    whole.fit(4)
    inside = sorted((tmp_path / "whole").glob("step-*"))[6]
    again = build(tmp_path / "again")
    again.load(inside)
    disturb(again, what)
    again.fit(4)
    assert digest(again) == digest(whole)


def test_a_range_test_begins_anew_whatever_was_loaded(tmp_path):
    whole = seeded(tmp_path / "whole", checkpoints={"keep_last": 1000})
    whole.fit(1)
    inside = sorted((tmp_path / "whole").glob("step-*"))[1]
    found = []
    for forgets in (False, True):
        trainer = build(tmp_path / f"{forgets}")
        trainer.load(inside)
        if forgets:
            trainer._checkpoints.entry = None
        torch.manual_seed(0)  # of dropout, which a run that goes on has from the checkpoint
        found.append(lr_range_test(trainer, 1e-5, 1.0, 8))
    assert found[0] == found[1]


def test_gradients_and_frozen_parts_are_as_before(tmp_path):
    trainer = seeded(tmp_path)
    trainer.model[0].weight.requires_grad_(False)
    trainer.model[1].eval()
    gradient = torch.ones_like(trainer.model[0].bias)
    trainer.model[0].bias.grad = gradient
    before = everything(trainer)
    lr_range_test(trainer, 1e-5, 1.0, 5)
    assert same(everything(trainer), before)
    assert trainer.model[0].bias.grad is gradient
    assert gradient.eq(1).all()


def test_an_error_inside_leaves_everything_as_before(tmp_path):
    class Fails(Augmented):
        def __getitem__(self, index):
            if len(self.loaded) == 20:
                raise LookupError("tile 17 is not in the archive")
            return super().__getitem__(index)

    trainer = seeded(tmp_path, data=Fails())
    before = everything(trainer)
    with pytest.raises(LookupError):
        lr_range_test(trainer, 1e-5, 1.0, 12)
    assert same(everything(trainer), before)


# --- The range test


def quadratic(callbacks=(), groups=False, accumulation=1, batch=8, **kwargs):
    """Least squares: SGD diverges above 2 / the largest eigenvalue."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=groups)
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x @ torch.tensor([[1.0], [2.0], [3.0], [4.0]])), batch, shuffle=True)
    parameters = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.01}] if groups else None
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.1)
    return Trainer(model, optimizer, nn.MSELoss(), loader, callbacks=callbacks, device="cpu", progress=False, seed=0,
                   gradient_accumulation_steps=accumulation, **kwargs)  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 3])
def test_rates_rise_exponentially_and_losses_are_a_hand_written_loops(accumulation):
    trainer = quadratic(accumulation=accumulation)
    found = lr_range_test(trainer, 1e-4, 1e-1, 10)
    assert found.rates == pytest.approx([1e-4 * 1000 ** (i / 9) for i in range(10)])
    model = copy.deepcopy(trainer.model)
    losses, step, running = [], 0, 0.0
    smoothed = []
    for epoch in range(10):
        batches = [loaded.batch for loaded in trainer._train_batches.epoch(0, epoch)]
        for start in range(0, len(batches), accumulation):
            if step == 10:
                break
            x, y = (torch.cat(parts) for parts in zip(*batches[start : start + accumulation], strict=True))
            loss = nn.functional.mse_loss(model(x), y)
            (gradient,) = torch.autograd.grad(loss, model.parameters())
            with torch.no_grad():
                model.weight -= found.rates[step] * gradient
            losses.append(float(loss.detach()))
            step += 1
            running = 0.98 * running + 0.02 * losses[-1]
            smoothed.append(running / (1 - 0.98**step))
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.smoothed == pytest.approx(smoothed, rel=1e-5)


def test_it_ends_at_divergence_with_a_rate_that_trains():
    found = lr_range_test(quadratic(batch=64), 1e-4, 1e4, 120, smoothing=0.5)
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 120
    assert 1e-3 < found.suggestion < 0.7  # the largest eigenvalue is about 3
    assert found.smoothed[-1] > 4 * min(found.smoothed)
    assert found.decade_below_minimum == found.rates[found.smoothed.index(min(found.smoothed))] / 10
    trainer = quadratic()
    trainer.optimizer.param_groups[0]["lr"] = found.suggestion
    losses = trainer.fit(20)["train_loss"]
    assert losses[-1] < 0.05 * losses[0]


def test_a_loss_that_is_not_finite_ends_it():
    found = lr_range_test(quadratic(), 1e10, 1e30, 30, divergence=1e300)
    assert 0 < len(found.losses) < 30
    assert len(found.rates) == len(found.losses) == len(found.smoothed)
    assert all(map(math.isfinite, found.losses))
    skipping = lr_range_test(quadratic(on_nonfinite="skip"), 1e10, 1e30, 30, divergence=1e300)
    assert skipping.losses == found.losses


class Seen(torch.optim.SGD):
    """Notes the rates of the steps that happen."""

    seen: list

    def step(self, closure=None):
        self.seen.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def noting(trainer):
    trainer.optimizer.__class__ = Seen
    trainer.optimizer.seen = []
    return trainer.optimizer.seen


def test_a_step_that_the_loss_scaler_left_out_does_not_raise_the_rate():
    trainer = quadratic(mixed_precision="fp16")
    trainer.precision.scaler._init_scale = 2.0**40  # overflows at first, and is halved
    seen = noting(trainer)
    found = lr_range_test(trainer, 1e-4, 1e-2, 6)
    assert found.rates == pytest.approx([1e-4 * 100 ** (i / 5) for i in range(6)])
    assert [rates[0] for rates in seen] == found.rates
    assert trainer.precision.scaler.get_scale() == 2.0**40


def test_parameter_groups_keep_their_ratio():
    trainer = quadratic(groups=True)
    seen = noting(trainer)
    found = lr_range_test(trainer, 1e-4, 1e-2, 5)
    assert [rates[0] for rates in seen] == pytest.approx(found.rates)
    assert [rates[1] for rates in seen] == pytest.approx([rate / 10 for rate in found.rates])
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.1, 0.01]


def test_no_callback_takes_part(tmp_path):
    model_free = EMACallback()
    trainer = quadratic([model_free])
    schedule = torch.optim.lr_scheduler.OneCycleLR(trainer.optimizer, 0.1, total_steps=3)
    other = Trainer(trainer.model, trainer.optimizer, nn.MSELoss(), trainer.train_loader, device="cpu", progress=False,
                    callbacks=[LRSchedulerCallback(schedule, "batch"), model_free])  # fmt: skip
    lr_range_test(other, 1e-4, 1e-2, 8)  # OneCycleLR raises after 3 steps
    assert model_free.num_averaged == 0
    assert schedule.last_epoch == 0


def test_suggestions_of_a_curve_that_is_known():
    rates = [10.0**i for i in range(-6, 1)]
    found = LRRange(rates, [], [1.0, 1.0, 0.95, 0.5, 0.3, 0.35, 5.0])
    assert found.suggestion == pytest.approx(1e-3)  # the loss falls most from 1e-4 to 1e-2
    assert found.decade_below_minimum == pytest.approx(1e-3)
    assert math.isnan(LRRange(rates[:3], [], [1.0, 1.1, 1.2]).suggestion)
    assert math.isnan(LRRange([], [], []).decade_below_minimum)


def test_the_plot_is_an_image(tmp_path):
    found = lr_range_test(quadratic(), 1e-4, 1e4, 60, smoothing=0.5)
    path = found.plot(tmp_path / "in" / "range.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["range.png"]
    LRRange([], [], []).plot(tmp_path / "empty.svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_lr": 0.0}, "0 < min_lr < max_lr, got 0.0"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "0 < min_lr < max_lr"),
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"smoothing": 1.0}, "smoothing must be in"),
        ({"divergence": 1.0}, "divergence above 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lr_range_test(quadratic(), **arguments)


def test_a_loader_that_can_be_run_through_once_is_refused():
    trainer = quadratic()
    trainer = Trainer(trainer.model, trainer.optimizer, nn.MSELoss(), iter([(torch.ones(2, 4), torch.ones(2, 1))]))
    with pytest.raises(ValueError, match="can be run through only once"):
        lr_range_test(trainer)


# --- The largest batch


class Short(nn.Linear):
    """A device that has room for so many samples."""

    def __init__(self, room, error=RuntimeError, message="HIP out of memory. Tried to allocate 2 GiB"):
        super().__init__(4, 1)
        self.room, self.error, self.message, self.tried = room, error, message, []

    def forward(self, x):
        if not self.tried or self.tried[-1] != len(x):
            self.tried.append(len(x))
        if len(x) > self.room:
            raise self.error(self.message)
        return super().forward(x)


def short(room, batch, accumulation=1, **kwargs):
    model = Short(room, **kwargs)
    loader = DataLoader(TensorDataset(torch.randn(10, 4), torch.randn(10, 1)), batch, shuffle=True)
    return Trainer(model, torch.optim.AdamW(model.parameters()), nn.MSELoss(), loader, device="cpu", progress=False,
                   gradient_accumulation_steps=accumulation)  # fmt: skip


@pytest.mark.parametrize(
    ("room", "batch", "accumulation", "expected"),
    [
        (1000, 16, 1, (16, 1)),
        (1000, 4, 4, (16, 1)),
        (9, 16, 4, (8, 8)),
        (9, 60, 1, (6, 10)),
        (1, 12, 1, (1, 12)),
        (16, 17, 1, (1, 17)),
        (33, 96, 1, (32, 3)),
    ],
)
def test_it_is_the_largest_that_fits_and_keeps_the_global_batch(room, batch, accumulation, expected):
    trainer = short(room, batch, accumulation)
    assert largest_batch(trainer) == expected
    assert trainer.gradient_accumulation_steps == accumulation


def test_it_doubles_then_bisects():
    trainer = short(45, 2520)
    assert largest_batch(trainer) == (45, 56)
    assert trainer.model.tried[:7] == [1, 2, 4, 8, 15, 30, 60]
    assert len(trainer.model.tried) <= 10


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory."),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (MemoryError, "Unable to allocate"),
    ],
)
def test_memory_may_be_short_under_many_names(error, message):
    assert largest_batch(short(5, 8, error=error, message=message)) == (4, 2)


def test_another_error_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="device-side assert"):
        largest_batch(short(5, 8, message="device-side assert triggered"))


def test_what_was_tried_is_freed():
    import gc
    import weakref

    kept = []

    class Remembers(Short):
        def forward(self, x):
            y = super().forward(x) if len(x) <= self.room else None
            big = torch.zeros(len(x), 100)
            kept.append(weakref.ref(big))
            if y is None:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return y + 0 * big.sum()

    trainer = short(1000, 16)
    trainer.model.__class__ = Remembers
    trainer.model.room = 5
    gc.disable()
    try:
        assert largest_batch(trainer) == (4, 4)
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_a_single_sample_that_does_not_fit_is_an_error():
    with pytest.raises(MemoryError, match="one sample does not fit"):
        largest_batch(short(0, 8))


@pytest.mark.parametrize(("samples", "expected"), [(15.9, 8), (16, 16), (31.9, 16), (10**6, 64)])
def test_a_limit_of_bytes_counts_what_a_batch_keeps_for_going_backward(samples, expected):
    """Of each sample the input, what Tanh gives, the output and the target; weights are there anyhow."""
    model = nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 1))
    loader = DataLoader(TensorDataset(torch.randn(10, 4), torch.randn(10, 1)), 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), loader, device="cpu", progress=False)
    limit = int(samples * 4 * (4 + 1000 + 1 + 1))
    assert largest_batch(trainer, limit_bytes=limit) == (expected, 64 // expected)


def test_a_function_that_makes_trainers_serves_loaders_of_another_kind():
    made = []

    def make(batch_size):
        made.append(batch_size)
        model = Short(5)
        batches = [(torch.randn(batch_size, 4), torch.randn(batch_size, 1))]
        return Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), batches, device="cpu",
                       progress=False)  # fmt: skip

    assert largest_batch(make, global_batch=16) == (4, 4)
    assert made == [1, 2, 4, 8]
    with pytest.raises(ValueError, match="global_batch is not known"):
        largest_batch(make)


def test_a_loader_that_can_not_be_batched_anew_is_refused():
    model = nn.Linear(4, 1)
    batches = [(torch.ones(2, 4), torch.ones(2, 1))]
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), batches, progress=False)
    with pytest.raises(TypeError, match="batches of list can't be made larger or smaller"):
        largest_batch(trainer, global_batch=8)
