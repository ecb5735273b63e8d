"""A run saved and loaded at an epoch's end goes on as if nothing had happened."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ununennium.training import Callback, CheckpointError, Trainer
from ununennium.training.checkpoint import read


def network(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.3), nn.Conv2d(width, 4, 1)
    ).double()


def trainer_of(model, data, optimizer=None, **kwargs):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=3, shuffle=True)
    kwargs = {"device": "cpu", "progress": False, "seed": 3, **kwargs}
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), loader, loader, **kwargs)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_rest_of_the_run_has_the_same_bits(make_data, tmp_path, cut):
    """Shuffling, dropout, BatchNorm, accumulation with a short tail."""
    data = make_data(10)
    whole = trainer_of(network(), data, gradient_accumulation_steps=2)
    torch.manual_seed(11)
    history = whole.fit(4)

    first = trainer_of(network(), data, gradient_accumulation_steps=2)
    torch.manual_seed(11)
    first.fit(cut)
    first.save(tmp_path / "c")
    second = trainer_of(network(seed=99), data, gradient_accumulation_steps=2, seed=None)
    torch.manual_seed(12345)
    second.load(tmp_path / "c")
    assert second.fit(4) == history
    assert equal(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    assert equal(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert second.state == whole.state


def test_a_finished_run_has_nothing_left_to_do(make_data, tmp_path):
    first = trainer_of(network(), make_data(4))
    history = first.fit(2)
    first.save(tmp_path / "c")
    second = trainer_of(network(1), make_data(4))
    second.load(tmp_path / "c")
    assert second.fit(2) == history


def test_start_epoch_must_not_contradict_the_checkpoint(make_data, tmp_path):
    first = trainer_of(network(), make_data(4))
    first.fit(2)
    first.save(tmp_path / "c")
    first.load(tmp_path / "c")
    with pytest.raises(ValueError, match="goes on at epoch 2"):
        first.fit(4, start_epoch=1)
    first.fit(4, start_epoch=2)


def test_compiled_and_plain_models_load_each_other(make_data, tmp_path):
    """Trap 22, one process: names are canonical whatever wraps the model."""
    plain = trainer_of(network(), make_data(4))
    plain.save(tmp_path / "plain")
    inner = network(1)
    compiled = trainer_of(torch.compile(inner, backend="eager"), make_data(4))
    compiled.load(tmp_path / "plain")
    assert equal(dict(inner.state_dict()), dict(plain.model.state_dict()))
    compiled.save(tmp_path / "compiled")
    assert set(read(tmp_path / "compiled").model) == set(inner.state_dict())
    part = network(2)
    part[0] = torch.compile(part[0], backend="eager")
    other = trainer_of(part, make_data(4))
    other.load(tmp_path / "compiled")
    other.save(tmp_path / "part")
    assert set(read(tmp_path / "part").model) == set(inner.state_dict())


def test_channels_last_optimizer_state_keeps_its_layout(make_data, tmp_path):
    model = network().to(memory_format=torch.channels_last)
    first = trainer_of(model, make_data(4))
    first.fit(1)
    first.save(tmp_path / "c")
    second = trainer_of(network(1).to(memory_format=torch.channels_last), make_data(4))
    second.load(tmp_path / "c")
    moment = second.optimizer.state[second.model[0].weight]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moment, first.optimizer.state[first.model[0].weight]["exp_avg"])


def test_a_learning_loss_is_part_of_it(make_data, tmp_path):
    class Learning(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, outputs, targets):
            return super().forward(outputs * self.log_scale.exp(), targets)

    def make(seed):
        model, loss_fn = network(seed), Learning()
        optimizer = torch.optim.Adam([*model.parameters(), *loss_fn.parameters()], lr=0.1)
        return Trainer(model, optimizer, loss_fn, DataLoader(make_data(4), 2), device="cpu", progress=False, seed=0)

    first = make(0)
    first.fit(1)
    first.save(tmp_path / "c")
    second = make(1)
    second.load(tmp_path / "c")
    assert second.loss_fn.log_scale != 0
    assert torch.equal(second.loss_fn.log_scale, first.loss_fn.log_scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("width", r"has shape \(8.* there and \(9.* in the model"),
        ("layer", r"the model has no 3\.bias, 3\.weight"),
        ("optimizer", r"optimizer is torch\.optim\.adamw\.AdamW, the Trainer's torch\.optim\.sgd\.SGD"),
        ("groups", r"parameter groups are not the checkpoint's: only there 3\.bias, 3\.weight"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(make_data, tmp_path, change, message):
    first = trainer_of(network(), make_data(4))
    first.fit(1)
    first.save(tmp_path / "c")
    model = network(1, width=9 if change == "width" else 8)
    if change == "layer":
        model = nn.Sequential(*list(model)[:3])
    optimizer = None
    if change == "optimizer":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if change == "groups":
        optimizer = torch.optim.AdamW(list(model.parameters())[:4], lr=0.1)
    second = trainer_of(model, make_data(4), optimizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        second.load(tmp_path / "c")
    assert equal(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert second.state.epoch == 0


def test_weights_alone_load_into_another_run(make_data, tmp_path):
    first = trainer_of(network(), make_data(4))
    first.fit(1)
    first.save(tmp_path / "c")
    model = network(1)
    second = trainer_of(model, make_data(4), torch.optim.SGD(model.parameters(), lr=0.1))
    second.load_weights(tmp_path / "c")
    assert equal(dict(model.state_dict()), dict(first.model.state_dict()))
    assert second.state.epoch == 0
    assert len(second.fit(1)["train_loss"]) == 1


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.CrossEntropyLoss(), r"loss_options=\{'weight': \[1\.0.*this one has \{'weight': None\}"),
        (nn.functional.cross_entropy, "loss_fn='CrossEntropyLoss', this one has 'cross_entropy'"),
        (nn.CrossEntropyLoss(ignore_index=3), "ignore_index=-100, this one has 3"),
    ],
)
def test_another_loss_is_refused_and_nothing_changes(make_data, tmp_path, loss_fn, message):
    def make(seed, loss_fn):
        model = network(seed)
        optimizer = torch.optim.Adam(model.parameters())
        return Trainer(model, optimizer, loss_fn, DataLoader(make_data(4), 2), device="cpu", progress=False)

    make(0, nn.CrossEntropyLoss(weight=torch.ones(4, dtype=torch.float64))).save(tmp_path / "c")
    second = make(1, loss_fn)
    before = {k: v.clone() for k, v in second.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        second.load(tmp_path / "c")
    assert equal(dict(second.model.state_dict()), before)


def test_a_start_that_failed_does_not_forget_the_checkpoint(make_data, tmp_path):
    class FailsOnce(Callback):
        failed = False

        def on_train_start(self, trainer):
            if not self.failed:
                self.failed = True
                raise RuntimeError("no disk")

    first = trainer_of(network(), make_data(4))
    first.fit(2)
    first.save(tmp_path / "c")
    second = trainer_of(network(1), make_data(4), callbacks=[FailsOnce()])
    second.load(tmp_path / "c")
    with pytest.raises(RuntimeError, match="no disk"):
        second.fit(4)
    assert len(second.fit(4)["train_loss"]) == 4
    assert second.state.optimizer_steps == 2 * first.state.optimizer_steps


def test_the_step_count_of_a_single_number_stays_on_the_host(make_data, tmp_path):
    """Adam keeps its step on the host, also for a parameter that has no dimension either."""
    from ununennium.training.checkpoint.snapshot import _like

    step = _like(nn.Parameter(torch.zeros((), device="meta")), torch.tensor(3.0))
    assert step.device.type == "cpu"
