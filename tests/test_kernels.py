"""Compiled kernels: made once for each kind, done without where the compiler fails, never copied."""

import copy
import pickle
import warnings

import pytest
import torch

from ununennium.kernels import Kernels


def double(x):
    return x + x


def triple(x):
    return 3 * x


def test_a_function_is_compiled_once_for_each_key():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    kernels, x = Kernels("Loss", backend=backend), torch.arange(3)
    assert not kernels.has(double, "a")
    for key in "a", "a", "b":
        assert torch.equal(kernels.run(double, key, x), x + x)
    assert torch.equal(kernels.run(triple, "a", x), 3 * x)
    assert len(compiled) == 3
    assert kernels.has(double, "a")
    assert not kernels.has(triple, "b")


def test_where_the_compiler_fails_that_is_said_once():
    def broken(graph, inputs):
        raise ValueError("no compiler on this machine")

    kernels = Kernels("Loss", backend=broken)
    with pytest.warns(UserWarning, match="Loss goes on without compiled kernels, more slowly: .*no compiler on this"):
        assert kernels.run(double, "a", torch.ones(1)) is None
    assert kernels.broken


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda kernels: pickle.loads(pickle.dumps(kernels))])
def test_a_copy_compiles_anew_with_the_same_settings(copied):
    kernels = Kernels("Loss", backend="eager", dynamic=False)
    kernels.run(double, "a", torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copied(kernels)
        assert not twin.has(double, "a")
        assert twin.run(double, "a", torch.ones(1)) == 2
    assert vars(twin)["_kwargs"] == {"backend": "eager", "dynamic": False}
