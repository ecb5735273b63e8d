"""A batch that holds no target lets nothing into the weights, through whichever outputs the loss sees them (trap 2)."""

import pytest
import torch
from processes import run
from test_same_result import Tiles
from torch import nn
from torch.utils.data import DataLoader

from ununennium.training import Trainer
from ununennium.training.distributed import whole
from ununennium.training.step import Stepper

NODATA = 255


def masked_mean(outputs, targets, ignore_index=NODATA):
    """A loss as people write it: 0 / 0 over no valid pixel."""
    valid = targets != ignore_index
    each = nn.functional.cross_entropy(outputs, torch.where(valid, targets, 0), reduction="none")
    return (each * valid).sum() / valid.sum()


class Masked(nn.Module):
    """The same, with a weight that it learns."""

    def __init__(self):
        super().__init__()
        self.ignore_index = NODATA
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, outputs, targets):
        return masked_mean(outputs * self.scale, targets)


class TwoHeads(nn.Module):
    """A network that is trained by its output and by one from its middle."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.head, self.auxiliary = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        features = self.body(images).tanh()
        return {"out": self.head(features), "aux": self.auxiliary(features)}


class TwoLosses(Trainer):
    def compute_loss(self, batch):
        outputs = self.model(batch["image"])
        loss = self.loss_fn(outputs["out"], batch["mask"]) + 0.5 * self.loss_fn(outputs["aux"], batch["mask"])
        return loss, outputs["out"], batch["mask"]


class GivesAll(Trainer):
    def compute_loss(self, batch):
        outputs = self.model(batch["image"])
        loss = self.loss_fn(outputs["out"], batch["mask"]) + 0.5 * self.loss_fn(outputs["aux"], batch["mask"])
        return loss, outputs, batch["mask"]


class CountsAll(nn.Module):
    ignore_index = NODATA

    def forward(self, outputs, targets):
        return masked_mean(outputs, targets)

    def target_count(self, outputs, targets):
        return (targets != NODATA).sum()


class WithNodata(Tiles):
    """Samples 4 … 7 hold nothing valid."""

    def __init__(self):
        super().__init__(12, turned=False)
        self.masks[4:8] = NODATA


CASES = {
    "two heads, one returned": (TwoLosses, TwoHeads, CountsAll),
    "two heads, a dict": (GivesAll, TwoHeads, CountsAll),
    "a loss that learns": (Trainer, lambda: nn.Conv2d(3, 4, 3, padding=1), Masked),
    "the plain step": (Trainer, lambda: nn.Conv2d(3, 4, 3, padding=1), CountsAll),
}


def train(rank, world, case, distributed=False, size=4):
    make, network, loss = CASES[case]
    torch.manual_seed(0)
    model, loss_fn = network().double(), loss()
    parameters = [*model.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    loader = DataLoader(WithNodata(), size)
    trainer = make(
        model, optimizer, loss_fn, loader, device="cpu", seed=0, progress=False, distributed=distributed,
    )  # fmt: skip
    history = trainer.fit(2)
    named = {**dict(model.named_parameters()), **{f"loss.{k}": v for k, v in loss_fn.named_parameters()}}
    return {name: whole(value.detach()).clone() for name, value in named.items()}, history["train_loss"]


def close(found, expected):
    assert found[1] == pytest.approx(expected[1], rel=1e-10)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_it_is_nothing_where_nobody_can_look(monkeypatch, case):
    """As on an accelerator: whether a batch is empty is not waited for."""
    expected = train(0, 1, case)
    begin = Stepper.begin
    monkeypatch.setattr(Stepper, "begin", lambda self, *p: begin(self, *p) or setattr(self, "looks", False))
    close(train(0, 1, case), expected)


@pytest.mark.parametrize("case", CASES)
def test_it_is_nothing_in_several_processes(tmp_path, case):
    expected = train(0, 1, case)
    for found in run(2, train, tmp_path, case, True, 2):
        close(found, expected)


@pytest.mark.parametrize("case", ["two heads, one returned", "two heads, a dict", "the plain step"])
def test_it_is_nothing_where_the_model_is_sharded(tmp_path, case):
    expected = train(0, 1, case)
    for found in run(2, train, tmp_path, case, "fsdp", 2):
        close(found, expected)
