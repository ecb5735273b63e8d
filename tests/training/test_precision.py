"""Mixed precision (traps 4, 5), on the CPU, which has bf16 and fp16 autocast and a real loss scaler."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.training import Callback, LRSchedulerCallback, Trainer
from ununennium.training.precision import Precision

CPU = torch.device("cpu")


def test_true_is_bf16_on_a_cpu():
    assert Precision(True, CPU).dtype is torch.bfloat16
    assert Precision(False, CPU).dtype is None
    assert Precision("fp16", CPU).dtype is torch.float16


def test_the_scaler_is_inert_unless_fp16():
    assert not Precision("bf16", CPU).scales
    assert not Precision(False, CPU).scales
    assert Precision("fp16", CPU).scales


def test_unknown_precision_lists_the_known():
    with pytest.raises(ValueError, match='"bf16" or "fp16", got \'fp8\''):
        Precision("fp8", CPU)


@pytest.mark.parametrize(("mode", "dtype"), [(False, torch.float32), (True, torch.bfloat16), ("fp16", torch.float16)])
def test_the_model_runs_under_autocast_in_training_and_validation(mode, dtype):
    seen = set()

    class Model(nn.Linear):
        def forward(self, x):
            outputs = super().forward(x)
            seen.add((self.training, outputs.dtype))
            return outputs

    model = Model(4, 2)
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(0, 2, (8,))), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, optimizer, nn.CrossEntropyLoss(), loader, loader, mixed_precision=mode, progress=False).fit(1)
    assert seen == {(True, dtype), (False, dtype)}
    assert all(p.dtype is torch.float32 for p in model.parameters())


class Norms(Callback):
    def __init__(self):
        self.seen, self.windows = [], 0

    def on_batch_end(self, trainer, batch_idx, logs):
        if trainer.state.optimizer_steps > self.windows:
            self.windows = trainer.state.optimizer_steps
            gradients = [p.grad for p in trainer.model.parameters()]
            self.seen.append(float(torch.stack([g.norm() for g in gradients]).norm()))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_clipping_comes_after_unscaling(accumulation):
    """Trap 4: after an fp16 step the norm is at most the limit, and not the limit over the scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    loader = DataLoader(TensorDataset(torch.randn(24, 8), torch.randint(0, 2, (24,))), batch_size=4)
    norms = Norms()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        loader,
        callbacks=[norms],
        mixed_precision="fp16",
        gradient_accumulation_steps=accumulation,
        gradient_clip_norm=0.05,
        device="cpu",
        progress=False,
    )
    trainer.fit(1)
    assert len(norms.seen) == 6 // accumulation
    assert norms.seen == pytest.approx([0.05] * len(norms.seen), rel=1e-3)


def test_parameters_outside_the_optimizer_are_unscaled_for_clipping_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    loader = DataLoader(TensorDataset(torch.randn(4, 8), torch.randint(0, 2, (4,))), batch_size=4)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01)
    norms = []
    for mode in ("fp16", False):
        trainer = Trainer(
            model, optimizer, nn.CrossEntropyLoss(), loader, mixed_precision=mode, gradient_clip_norm=1e9, device="cpu",
            progress=False,
        )  # fmt: skip
        weights = [p.detach().clone() for p in model.parameters()]
        trainer.fit(1)
        norms.append(float(trainer.gradient_norm))
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(w)
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


class Overflow(Callback):
    """Put an infinity into the gradient of the third window's last batch, through a hook on the weight."""

    def __init__(self, model):
        self.armed = False
        model.weight.register_hook(lambda g: torch.full_like(g, torch.inf) if self.armed else g)

    def on_batch_start(self, trainer, batch_idx):
        self.armed = batch_idx == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_moves_no_schedule(fused):
    """Trap 5: an injected inf leaves weights, learning rate, last_epoch and the count of steps unchanged."""
    model = nn.Linear(4, 2)
    loader = DataLoader(TensorDataset(torch.randn(5, 4), torch.randint(0, 2, (5,))), batch_size=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    seen = []

    class Watch(Callback):
        def on_batch_end(self, trainer, batch_idx, logs):
            weights = model.weight.detach().clone()
            state = trainer.state
            seen.append((weights, state.optimizer_steps, state.skipped_steps, scheduler.last_epoch, optimizer))
            seen[-1] = (*seen[-1][:4], optimizer.param_groups[0]["lr"])

    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        loader,
        callbacks=[Overflow(model), LRSchedulerCallback(scheduler, step_on="batch"), Watch()],
        mixed_precision="fp16",
        device="cpu",
        progress=False,
    )
    trainer.precision.scaler = torch.amp.GradScaler(
        "cpu", init_scale=8.0
    )  # the usual 65536 overflows by itself at first
    trainer.fit(1)
    assert [steps for _, steps, *_ in seen] == [1, 2, 2, 3, 4]
    assert [skipped for _, _, skipped, *_ in seen] == [0, 0, 1, 1, 1]
    assert [last for _, _, _, last, _ in seen] == [1, 2, 2, 3, 4]
    assert [lr for *_, lr in seen] == [0.05, 0.025, 0.025, 0.0125, 0.00625]
    assert torch.equal(seen[1][0], seen[2][0])
    assert trainer.precision.scaler.get_scale() == 4.0


def test_gradients_that_overflow_at_every_scale_end_the_run():
    model = nn.Linear(4, 2)
    model.weight.register_hook(lambda g: torch.full_like(g, torch.inf))
    loader = DataLoader(TensorDataset(torch.randn(99, 4), torch.randint(0, 2, (99,))), batch_size=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), loader, mixed_precision="fp16", device="cpu", progress=False
    )
    with pytest.raises(FloatingPointError, match="overflow at every loss scale"):
        trainer.fit(1)
    assert trainer.state.optimizer_steps == 0
