"""A Trainer whose validation figures are dictated."""

import pytest
import torch
from torch import nn

from ununennium.training import Callback, Trainer


class Dictate(Callback):
    """Put given figures into the logs, before the callbacks that come after."""

    def __init__(self, name, values):
        self.name, self.values = name, values
        self.log_names = (name,)

    def on_epoch_end(self, trainer, epoch, logs):
        logs[self.name] = self.values[epoch]


@pytest.fixture
def scripted():
    """Return a Trainer with callbacks, over figures that are given for each epoch."""

    def make(values, callbacks, name="figure", **kwargs):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = kwargs.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=1.0)
        if "model" in kwargs:
            model = kwargs.pop("model")
        batches = kwargs.pop("batches", [(torch.ones(2, 2), torch.ones(2, 1))])
        return Trainer(
            model,
            optimizer,
            nn.MSELoss(),
            batches,
            callbacks=[Dictate(name, values), *callbacks],
            device="cpu",
            progress=False,
            **kwargs,
        )

    return make
