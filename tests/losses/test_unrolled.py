"""The Dice loss with compiled passes is the same function: value, gradient, errors, whatever the batch."""

import copy
import warnings

import pytest
import torch

from ununennium.losses import DiceLoss

IGNORED = 255
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def batch(
    images, dtype=torch.float64, layout="channels first", channels=4, size=(24, 40), kind=torch.int64, holes=True
):
    draw = torch.Generator().manual_seed(images)
    logits = torch.randn(images, channels, *size, generator=draw).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    targets = torch.randint(channels, (images, *size), generator=draw)
    if holes:
        targets[torch.rand(targets.shape, generator=draw) < 0.2] = IGNORED
    return logits.requires_grad_(), targets.to(kind)


def value_and_gradient(loss_fn, logits, targets):
    logits.grad = None
    loss = loss_fn(logits, targets)
    loss.backward()
    return loss.detach(), logits.grad


def compiled(counted=None, **options):
    """Return the loss with its passes compiled to themselves, which takes no time."""

    def backend(graph, inputs):
        if counted is not None:
            counted.append(graph)
        return graph.forward

    loss_fn = DiceLoss(**options)
    loss_fn.compile(backend=backend)
    return loss_fn


def assert_same(loss_fn, plain, logits, targets, **tolerance):
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-15}
    loss, gradient = value_and_gradient(loss_fn, logits, targets)
    expected = value_and_gradient(plain, logits, targets)
    torch.testing.assert_close(loss, expected[0], **tolerance)
    torch.testing.assert_close(gradient, expected[1], **tolerance)
    assert gradient.dtype == logits.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight": [1, 0, 2, 0.5]}, {"smooth": 1.5}, {"per_image": False}],
    ids=["plain", "weights", "smooth", "batch"],
)
@pytest.mark.parametrize("ignore_index", [None, IGNORED, -100, 1])
def test_it_is_the_same_function(layout, options, ignore_index):
    loss_fn, plain = compiled(ignore_index=ignore_index, **options), DiceLoss(ignore_index=ignore_index, **options)
    for images in (3, 1, 2):
        logits, targets = batch(images, layout=layout, holes=ignore_index == IGNORED)
        if ignore_index == -100:
            targets[:, :5] = -100
        assert_same(loss_fn, plain, logits, targets)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_any_integer_type(kind):
    assert_same(compiled(ignore_index=IGNORED), DiceLoss(ignore_index=IGNORED), *batch(2, kind=kind))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_gets_out_of_an_ignored_pixel(value):
    logits, targets = batch(2)
    with torch.no_grad():
        logits.movedim(1, -1)[targets == IGNORED] = value
    loss, gradient = value_and_gradient(compiled(ignore_index=IGNORED), logits, targets)
    assert loss.isfinite()
    assert not gradient.movedim(1, -1)[targets == IGNORED].any()


@pytest.mark.parametrize("sizes", [(4, 3, 1, 7), (1, 4, 3, 1)])
def test_another_number_of_images_compiles_nothing(sizes):
    made = []
    loss_fn = compiled(made)
    counts = []
    for images in sizes:
        value_and_gradient(loss_fn, *batch(images, holes=False))
        counts.append(len(made))
    alone = sizes[0] == 1  # whose kernels are others
    assert counts == ([2, 4, 4, 4] if alone else [2, 2, 2, 2])


@pytest.mark.parametrize("label", [4, -1, 2**32 + 1])
def test_a_label_that_is_no_class_is_an_error(label):
    logits, targets = batch(2, holes=False)
    targets[1, 3, 3] = label
    with pytest.raises(ValueError, match=f"{label}.*0 … 3"):
        compiled()(logits, targets)


@pytest.mark.parametrize("case", ["soft", "one channel", "many classes"])
def test_what_has_no_kernel_is_computed_without(case):
    made = []
    if case == "soft":
        logits, targets = batch(2)
        targets = torch.rand(logits.shape, dtype=torch.float64)
    elif case == "one channel":
        logits, targets = batch(2, channels=1, holes=False)
        targets[0, :3] = 1
    else:
        logits, targets = batch(2, channels=40, holes=False)
    assert_same(compiled(made), DiceLoss(), logits, targets)
    assert not made


def test_where_the_compiler_fails_the_loss_goes_on():
    def broken(graph, inputs):
        raise ValueError("no compiler on this machine")

    loss_fn = DiceLoss(ignore_index=IGNORED)
    loss_fn.compile(backend=broken)
    logits, targets = batch(2)
    with pytest.warns(UserWarning, match="DiceLoss goes on without compiled kernels, more slowly: .*no compiler"):
        loss, _ = value_and_gradient(loss_fn, logits, targets)
    assert loss == DiceLoss(ignore_index=IGNORED)(logits, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value_and_gradient(loss_fn, logits, targets)


def test_a_copy_is_compiled_too():
    made = []
    twin = copy.deepcopy(compiled(made))
    value_and_gradient(twin, *batch(2, holes=False))
    assert len(made) == 2


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "channels first"), (torch.bfloat16, "channels last")])
def test_what_pytorchs_own_compiler_makes_of_it_is_the_same(dtype, layout):
    loss_fn = DiceLoss(ignore_index=IGNORED)
    loss_fn.compile()
    tolerance = {"rtol": 1e-5, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-8}
    plain = DiceLoss(ignore_index=IGNORED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for images in (3, 2):
            logits, targets = batch(images, dtype, layout, size=(600, 500))
            assert_same(loss_fn, plain, logits, targets, **tolerance)
    exact = plain(logits.double(), targets)  # of sums over 300,000 pixels
    torch.testing.assert_close(loss_fn(logits, targets).double(), exact, rtol=1e-6, atol=0)
