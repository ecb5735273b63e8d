"""What a loader may yield: how it is split, counted and moved."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType

import pytest
import torch

from ununennium.training.batches import describe, num_samples, split_batch, to_device

IMAGE, MASK, LABEL, TARGET = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2), torch.ones(2)
META = torch.device("meta")  # a device that every machine has, and that is not the tensors'


class Affine(namedtuple("Affine", "a b c d e f g h i")):
    """What rasterio's transforms are: a named tuple that is made from fewer values than it holds."""

    def __new__(cls, a, b, c, d, e, f):
        return tuple.__new__(cls, (a, b, c, d, e, f, 0.0, 0.0, 1.0))


@pytest.mark.parametrize(
    ("batch", "target"),
    [
        ((IMAGE, MASK), MASK),
        ([IMAGE, MASK], MASK),
        (namedtuple("Pair", "x y")(IMAGE, MASK), MASK),
        ({"image": IMAGE, "mask": MASK}, MASK),
        ({"image": IMAGE, "label": LABEL}, LABEL),
        ({"image": IMAGE, "target": TARGET}, TARGET),
        ({"target": TARGET, "label": LABEL, "mask": MASK, "image": IMAGE}, MASK),
        ({"target": TARGET, "label": LABEL, "image": IMAGE}, LABEL),
        (MappingProxyType({"image": IMAGE, "mask": MASK}), MASK),
        (
            {
                "crs": "EPSG:32633",
                "bbox": torch.zeros(2, 4),
                "transform": [Affine(10.0, 0.0, 3e5, 0.0, -10.0, 5e6)] * 2,
                "filename": ["a.tif", "b.tif"],
                "date": None,
                "image": IMAGE,
                "mask": MASK,
            },
            MASK,
        ),
    ],
)
def test_inputs_and_targets_are_found(batch, target):
    inputs, targets = split_batch(batch)
    assert inputs is IMAGE
    assert targets is target


def test_inputs_may_be_containers_themselves():
    several = {"optical": IMAGE, "radar": IMAGE}
    assert split_batch((several, MASK)) == (several, MASK)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (IMAGE, r"a tensor \(2, 3, 4, 4\) of torch.float32"),
        ([IMAGE], r"a list of 1 \(a tensor"),
        ((IMAGE, MASK, LABEL), r"a tuple of 3 \(a tensor .*; a tensor .*; a tensor"),
        ({"image": IMAGE, "crs": "EPSG:4326"}, "a dict with the keys 'image', 'crs'"),
        ({"images": IMAGE, "masks": MASK}, "a dict with the keys 'images', 'masks'"),
        ({}, r"a dict with the keys \(none\)"),
        ("ab", "'ab'"),
        (None, "None"),
        (IMAGE.numpy(), r"a numpy.ndarray \(2, 3, 4, 4\) of float32"),
    ],
)
def test_a_batch_of_unknown_structure_is_described_with_the_remedy(batch, found):
    with pytest.raises(TypeError, match=f"the loader gave {found}.*collate_fn.*compute_loss"):
        split_batch(batch)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5"),
        ("x" * 200, "'" + "x" * 79 + "…"),
        (list(range(9)), "a list of 9 (0; 1; 2; 3; …)"),
        ((), "a tuple of 0"),
        (object(), "an object"),
        (dict, "the class dict and not an object of it, dict(…)"),
        (torch.nn.ReLU(), "a torch.nn.modules.activation.ReLU"),
    ],
)
def test_describe(value, text):
    assert describe(value) == text


def test_tensors_are_moved_wherever_they_are():
    pair = namedtuple("Pair", "x more")
    batch = {"a": pair(IMAGE, {"b": [MASK, (LABEL, "name")]}), "c": OrderedDict(d=TARGET)}
    moved = to_device(batch, META)
    assert type(moved["a"]) is pair
    assert type(moved["c"]) is OrderedDict
    found = moved["a"].x, moved["a"].more["b"][0], moved["a"].more["b"][1][0], moved["c"]["d"]
    assert all(tensor.device == META for tensor in found)
    assert moved["a"].more["b"][1][1] == "name"
    assert batch["a"].x is IMAGE
    assert batch["a"].more["b"][0] is MASK
    assert batch["c"]["d"] is TARGET


def test_what_is_no_tensor_is_passed_through():
    crs, affine = object(), Affine(10.0, 0.0, 3e5, 0.0, -10.0, 5e6)
    batch = {"crs": crs, "transform": affine, "size": IMAGE.shape, "name": "a.tif", "none": None, "array": MASK.numpy()}
    moved = to_device({**batch, "image": IMAGE}, META)
    assert all(moved[key] is value for key, value in batch.items())
    assert moved["image"].device == META


def test_mappings_keep_their_kind():
    grouped = defaultdict(list, a=IMAGE)
    moved = to_device(grouped, META)
    assert moved["new"] == []
    assert moved["a"].device == META
    assert grouped == {"a": IMAGE}
    encoded = to_device(UserDict(a=IMAGE), META)
    assert type(encoded) is UserDict
    assert encoded["a"].device == META
    assert to_device(MappingProxyType({"a": IMAGE}), META)["a"].device == META


def test_a_named_tuple_that_is_made_otherwise_keeps_its_kind_with_tensors_in_it():
    moved = to_device(Affine(IMAGE, 0.0, 3e5, 0.0, -10.0, 5e6), META)
    assert type(moved) is Affine
    assert moved.a.device == META
    assert moved[1:] == (0.0, 3e5, 0.0, -10.0, 5e6, 0.0, 0.0, 1.0)


def test_containers_of_the_loader_are_not_shared():
    """A step that takes a key out of its batch does not take it out of the loader's."""
    batch = {"image": IMAGE, "more": [MASK]}
    moved = to_device(batch, torch.device("cpu"))
    moved.pop("image")
    moved["more"].clear()
    assert batch == {"image": IMAGE, "more": [MASK]}


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGE, MASK),
        [{"a": [IMAGE]}, MASK],
        IMAGE,
        {"image": IMAGE, "mask": MASK},
        {"crs": ["a", "b", "c"], "bands": torch.zeros(12), "image": IMAGE, "mask": MASK},
        ({"scale": torch.tensor(1.0), "image": IMAGE}, MASK),
        {"bands": "all", "image": [IMAGE, IMAGE], "mask": MASK},
    ],
)
def test_samples_are_counted_by_the_image_or_else_the_first_tensor(batch):
    assert num_samples(batch) == 2


@pytest.mark.parametrize("batch", [("a", "b"), {"image": "a.tif"}, torch.tensor(1.0), [], None])
def test_samples_that_cannot_be_counted_are_an_error(batch):
    with pytest.raises(TypeError, match=r"no tensor with a batch dimension.*collate_fn"):
        num_samples(batch)
