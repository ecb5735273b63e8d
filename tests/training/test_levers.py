import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ununennium.kernels import Kernels
from ununennium.metrics import IoU, confusion
from ununennium.training import Trainer
from ununennium.training.errors import causes


def images(samples=8):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(samples, 3, 6, 6, generator=generator), torch.randint(0, 4, (samples,), generator=generator)
    )


class Flat(nn.Module):
    """A classifier as many are written: ``view`` on what a convolution gives, after BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.Dropout(0.3))
        self.head = nn.Linear(5 * 36, 4)

    def forward(self, x):
        x = self.features(x)
        return self.head(x.view(len(x), -1))


class Pooled(Flat):
    def __init__(self):
        super().__init__()
        self.features[2].p = 0.0  # whose masks depend on the order in memory

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def trained(model_class, optimizer=torch.optim.AdamW, samples=8, **options):
    torch.manual_seed(0)
    model = model_class()
    loader = DataLoader(images(samples), 4, shuffle=True)
    options = {"device": "cpu", "progress": False, "seed": 1, "val_loader": loader, "metrics": [], **options}
    torch.manual_seed(5)
    trainer = Trainer(model, optimizer(model.parameters(), lr=0.05), nn.CrossEntropyLoss(), loader, **options)
    history = trainer.fit(2)
    return trainer, history


def is_channels_last(model):
    weight = model.features[0].weight
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize(("asked", "given"), [(None, True), (True, True), (False, False)])
def test_convolutions_are_kept_channels_last_and_the_numbers_are_the_same(asked, given):
    trainer, history = trained(Pooled, channels_last=asked)
    assert is_channels_last(trainer.model) is given
    _, plain = trained(Pooled, channels_last=False)
    assert history["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)
    state = trainer.optimizer.state[trainer.model.features[0].weight]["exp_avg"]
    assert state.is_contiguous(memory_format=torch.channels_last) is given


def test_a_model_that_needs_channels_first_is_run_so_from_its_first_batch_on():
    with pytest.warns(UserWarning, match=r"needs tensors with the channels first.*\(channels_last=False\): view size"):
        trainer, history = trained(Flat)
    assert not is_channels_last(trainer.model)
    plain, expected = trained(Flat, channels_last=False)
    assert history == expected  # to the bit: BatchNorm and dropout as if the first try had not been
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name


def test_who_insists_on_channels_last_is_told_what_fails():
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        trained(Flat, channels_last=True)


def test_an_error_of_the_users_own_is_not_taken_for_the_layouts():
    class Broken(Pooled):
        def forward(self, x):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trained(Broken)


def test_models_without_convolutions_are_left_as_they_are():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 6, 6))

        def forward(self, x):
            return torch.einsum("bchw,kchw->bk", x, self.weight)

    trainer, _ = trained(Dense)
    assert trainer.model.weight.is_contiguous()


def test_a_compiled_model_stays_the_users_and_gives_the_same_numbers():
    trainer, history = trained(Pooled, samples=6, compile={"backend": "eager"}, channels_last=False)
    plain, expected = trained(Pooled, samples=6, channels_last=False)
    assert trainer.model._compiled_call_impl is not None
    assert list(trainer.model.state_dict()) == list(plain.model.state_dict())
    assert history["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


def test_with_the_model_its_metrics_are_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(Kernels, "run", lambda self, function, key, *inputs: calls.append(key) or function(*inputs))
    monkeypatch.setattr(confusion, "_FEW_PIXELS", 1)
    _, history = trained(Pooled, metrics=[IoU(4)], compile={"backend": "eager"}, channels_last=False)
    assert len(calls) == 2 * 2 * 8  # epochs, passes, samples
    expected = trained(Pooled, metrics=[IoU(4)], channels_last=False)[1]
    assert history["train_iou"] == expected["train_iou"]
    assert history["val_iou"] == expected["val_iou"]


def test_a_model_that_cant_be_compiled_is_run_as_it_is_and_the_reason_given():
    def broken(graph, inputs):
        raise ValueError("no compiler on this machine")

    with pytest.warns(UserWarning, match="can't be compiled here, and is run as it is: .*no compiler on this machine"):
        trainer, history = trained(Pooled, compile={"backend": broken}, channels_last=False)
    assert trainer.model._compiled_call_impl is None
    assert history == trained(Pooled, channels_last=False)[1]


def test_both_levers_may_fail():
    def broken(graph, inputs):
        raise ValueError("no compiler")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, history = trained(Flat, compile={"backend": broken})
    assert {
        str(w.message).split(",")[0] for w in caught if "training/levers" in w.filename or w.category is UserWarning
    }
    assert history == trained(Flat, channels_last=False)[1]


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_wrong_values_are_told(wrong):
    with pytest.raises(TypeError, match="compile must be True, False or a mapping"):
        trained(Pooled, compile=wrong)


def test_channels_last_is_yes_no_or_where_it_fits():
    with pytest.raises(TypeError, match="channels_last must be True, False or None"):
        trained(Pooled, channels_last="auto")


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_whose_user_did_not_choose_steps_fused(optimizer):
    trainer, history = trained(Pooled, optimizer)
    assert trainer.optimizer.param_groups[0]["fused"] is True
    for choice in ({"fused": False}, {"foreach": True}):
        other, expected = trained(Pooled, lambda p, lr, choice=choice: optimizer(p, lr=lr, **choice))
        assert not other.optimizer.param_groups[0]["fused"]
        assert history["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)


def test_an_optimizer_that_stepped_before_is_left_alone():
    model = Pooled()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    Trainer(model, optimizer, nn.CrossEntropyLoss(), [1], device="cpu", progress=False)
    assert optimizer.param_groups[0]["fused"] is None


def test_a_learning_rate_that_is_a_tensor_and_sparse_gradients_are_left_alone():
    model = Pooled()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    Trainer(model, optimizer, nn.CrossEntropyLoss(), [1], device="cpu", progress=False)
    assert optimizer.param_groups[0]["fused"] is None
    sparse = nn.Sequential(nn.Embedding(4, 3, sparse=True))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    Trainer(sparse, optimizer, nn.CrossEntropyLoss(), [1], device="cpu", progress=False)
    assert optimizer.param_groups[0]["fused"] is None


def test_a_layout_that_fails_is_seen_behind_the_error_that_a_model_makes_of_it():
    class Wraps(Flat):
        def forward(self, x):
            try:
                return super().forward(x)
            except RuntimeError as error:
                raise ValueError("this model is picky") from error

    with pytest.warns(UserWarning, match="needs tensors with the channels first"):
        _, history = trained(Wraps)
    assert history == trained(Flat, channels_last=False)[1]


def test_errors_that_come_from_each_other_are_gone_through_once():
    first, second = ValueError("first"), RuntimeError("second")
    first.__cause__, second.__context__ = second, first
    assert list(causes(first)) == [first, second]
