"""TorchGeo's raster datasets, samplers and collate function train as they are."""

import pytest
import torch
from interop import IGNORE, bits, network, run_resumed, run_whole, tensors, trainer
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("torchgeo")

import numpy as np
import rasterio
import shapely
from processes import run
from rasterio.transform import from_origin
from torchgeo.datasets import RasterDataset, stack_samples
from torchgeo.samplers import GridGeoSampler, PreChippedGeoSampler, RandomBatchGeoSampler, RandomGeoSampler

CHIP, PIXEL, SIDE = 16, 10, 48
LEFT, TOP = 500_000, 5_000_000


class Images(RasterDataset):
    filename_glob = "scene*.tif"


class Masks(RasterDataset):
    filename_glob = "scene*.tif"
    is_image = False


def write(path, pixels, left=LEFT, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    place = {"crs": "EPSG:32631", "transform": from_origin(left, TOP, PIXEL, PIXEL)}
    shape = {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place, **options) as file:
        file.write(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scenes side by side, whose classes show in the first band; the first rows are nodata in the masks."""
    folder = tmp_path_factory.mktemp("scenes")
    generator = np.random.default_rng(0)
    for number in range(2):
        image = generator.integers(0, 3000, (3, SIDE, SIDE)).astype("uint16")
        mask = (image[:1] // 1000).astype("uint8")
        mask[:, :3] = IGNORE
        for name, pixels in (("images", image), ("masks", mask)):
            write(folder / name / f"scene{number}.tif", pixels, LEFT + number * SIDE * PIXEL)
    return folder


def scenes(folder, **options):
    return Images(folder / "images", **options) & Masks(folder / "masks", **options)


def train_loader(dataset, kind, workers=0, batch=4, count=None):
    count = count or 5 * batch
    how = {"num_workers": workers, "collate_fn": stack_samples}
    if kind == "batch":
        return DataLoader(dataset, batch_sampler=RandomBatchGeoSampler(dataset, CHIP, batch, count), **how)
    if kind == "generator":
        sampler = RandomGeoSampler(dataset, CHIP, count, generator=torch.Generator().manual_seed(7))
    else:
        sampler = RandomGeoSampler(dataset, CHIP, count)
    return DataLoader(dataset, batch_size=batch, sampler=sampler, **how)


def val_loader(dataset, workers=0, batch=4):
    sampler = GridGeoSampler(dataset, CHIP, CHIP)
    return DataLoader(dataset, batch_size=batch, sampler=sampler, num_workers=workers, collate_fn=stack_samples)


def builder(folder, kind, workers=0):
    """Return a function that makes a Trainer over datasets and loaders of its own."""

    def build(**kwargs):
        dataset = scenes(folder)
        return trainer(train_loader(dataset, kind, workers), val_loader(dataset, workers), **kwargs)

    return build


KINDS = pytest.mark.parametrize("kind", ["single", "batch", "generator"])


@KINDS
def test_random_chips_of_an_intersection_are_learned_from(folder, kind):
    training = builder(folder, kind)(seed=0)
    history = training.fit(6)
    assert history["val_loss"][-1] < 0.8 * history["val_loss"][0]
    assert history["val_iou"][-1] > history["val_iou"][0]
    assert len(training.trained) == 6 * 5
    chips = [[str(chip) for chip in batch["bounds"]] for batch in training.trained]
    assert all(len(chip) == 4 for chip in chips)
    assert chips[:5] != chips[5:10], "the second epoch drew the chips of the first"


@KINDS
def test_a_batch_holds_what_the_dataset_gives_for_its_bounds(folder, kind):
    """Images, masks, and all else that TorchGeo says about them."""
    training = builder(folder, kind)(seed=0)
    training.fit(1)
    dataset = scenes(folder)
    for batch in training.trained + training.validated:
        expected = stack_samples([dataset[bounds] for bounds in batch["bounds"]])
        assert batch.keys() == expected.keys() >= {"image", "mask", "bounds", "crs"}
        assert all(torch.equal(batch[name], value) for name, value in tensors(expected).items())
        assert batch["crs"] == expected["crs"]


def test_files_that_are_chips_are_shuffled_every_epoch(folder):
    dataset = scenes(folder)
    loader = DataLoader(dataset, sampler=PreChippedGeoSampler(dataset, shuffle=True), collate_fn=stack_samples)
    training = trainer(loader, seed=0)
    training.fit(6)
    starts = [batch["bounds"][0][0].start for batch in training.trained]
    epochs = list(zip(starts[::2], starts[1::2], strict=True))
    assert all(sorted(epoch) == [LEFT, LEFT + SIDE * PIXEL] for epoch in epochs)
    assert len(set(epochs)) == 2


def test_the_validation_figures_are_those_of_a_hand_written_loop(folder):
    training = builder(folder, "single")(seed=0)
    history = training.fit(1)
    model = training.model.eval()
    total, pixels, matrix = 0.0, 0, torch.zeros(3, 3, dtype=torch.long)
    with torch.no_grad():
        for batch in val_loader(scenes(folder)):
            outputs, mask = model(batch["image"]), batch["mask"]
            total += float(nn.functional.cross_entropy(outputs, mask, ignore_index=IGNORE, reduction="sum"))
            valid = mask != IGNORE
            pixels += int(valid.sum())
            for true, predicted in zip(mask[valid], outputs.argmax(1)[valid], strict=True):
                matrix[true, predicted] += 1
    assert pixels == 2 * SIDE * (SIDE - 3)
    overlap = matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())
    assert history["val_loss"][0] == pytest.approx(total / pixels, rel=1e-6)
    assert history["val_iou"][0] == pytest.approx(float(overlap.mean()), rel=1e-6)


@KINDS
def test_workers_and_a_break_inside_an_epoch_change_no_bit(folder, kind, tmp_path):
    expected, inside = run_whole(builder(folder, kind), tmp_path / "whole")
    in_workers, there = run_whole(builder(folder, kind, workers=2), tmp_path / "workers")
    assert in_workers == expected
    assert run_resumed(builder(folder, kind), inside[1], tmp_path / "first") == expected
    assert run_resumed(builder(folder, kind), there[-1], tmp_path / "second") == expected
    assert run_resumed(builder(folder, kind, workers=2), inside[-2], tmp_path / "third") == expected


def exact(training):
    """Return float64 weights, and the bounds of the training batches as text."""
    weights = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    return weights, [[str(chip) for chip in batch["bounds"]] for batch in training.trained], training.history


def in_process(rank, world, folder, kind, batch, options):
    """Train without BatchNorm and dropout, whose results depend on what a process holds of a batch."""
    torch.set_num_threads(1)
    dataset = scenes(folder, transforms=in_double)
    model = nn.Sequential(*(layer for layer in network(dtype=torch.float64) if isinstance(layer, (nn.Conv2d, nn.ReLU))))
    loaders = train_loader(dataset, kind, batch=batch, count=20), val_loader(dataset, batch=batch)
    training = trainer(*loaders, model=model, seed=0, distributed=world > 1, **options)
    training.fit(2)
    return exact(training)


def in_double(sample):
    return {name: value.double() / 1000 if name == "image" else value for name, value in sample.items()}


def test_two_processes_take_shares_of_each_batch_of_one_order(folder, tmp_path):
    """Batches of 2 in two processes are the batches of 4 of one, and so are the weights and the figures."""
    weights, expected, history = in_process(0, 1, folder, "single", 4, {})
    (first, left, log), (second, right, other) = run(2, in_process, tmp_path, folder, "single", 2, {})
    assert [a + b for a, b in zip(left, right, strict=True)] == expected
    assert all(len(share) == 2 for share in left + right)
    torch.testing.assert_close(first, weights, rtol=1e-10, atol=1e-12)
    assert torch.equal(first, second)
    assert log == other
    assert all(log[name] == pytest.approx(history[name], rel=1e-10) for name in history)


def test_two_processes_take_the_batches_of_a_batch_sampler_in_turn(folder, tmp_path):
    """Two processes are one that accumulates two batches."""
    accumulating = {"gradient_accumulation_steps": 2}
    weights, expected, history = in_process(0, 1, folder, "batch", 4, accumulating)
    (first, left, log), (second, right, _) = run(2, in_process, tmp_path, folder, "batch", 4, {})
    # 5 batches an epoch: the last is the first process's, and the second trains on one of its samples without effect.
    for epoch in range(2):
        taken = [left[3 * epoch], right[3 * epoch], left[3 * epoch + 1], right[3 * epoch + 1], left[3 * epoch + 2]]
        assert taken == expected[5 * epoch : 5 * epoch + 5]
    torch.testing.assert_close(first, weights, rtol=1e-10, atol=1e-12)
    assert torch.equal(first, second)
    assert log["val_iou"] == history["val_iou"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """One scene of many blocks, so that GDAL has not all of it in memory."""
    folder = tmp_path_factory.mktemp("large")
    image = np.random.default_rng(0).integers(0, 3000, (3, 256, 256)).astype("uint16")
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 32}
    write(folder / "images" / "scene.tif", image, **tiles)
    write(folder / "masks" / "scene.tif", (image[:1] // 1000).astype("uint8"), **tiles)
    return folder


def mixed_workers(folder, workers, **options):
    """Train in workers and validate in the main process, on the two halves of the same files."""
    dataset = scenes(folder, **options)
    middle, right, bottom = LEFT + 128 * PIXEL, LEFT + 256 * PIXEL, TOP - 256 * PIXEL
    west, east = shapely.box(LEFT, bottom, middle, TOP), shapely.box(middle, bottom, right, TOP)
    training = trainer(
        DataLoader(
            dataset, batch_size=4, sampler=RandomGeoSampler(dataset, 32, 24, roi=west), num_workers=workers,
            collate_fn=stack_samples,
        ),
        DataLoader(dataset, batch_size=4, sampler=GridGeoSampler(dataset, 32, roi=east), collate_fn=stack_samples),
        seed=0,
    )  # fmt: skip
    dataset[next(iter(GridGeoSampler(dataset, 32)))]  # a look at a sample, as everybody takes
    torch.manual_seed(0)
    training.fit(3)
    return bits(training)


def test_workers_read_right_where_the_main_process_reads_the_same_files(large):
    """With cache=False; with TorchGeo's cache of open files forked workers share the parent's places in them."""
    assert mixed_workers(large, 2, cache=False) == mixed_workers(large, 0, cache=False)


def test_workers_read_right_in_spite_of_torchgeos_cache_of_open_files(large):
    assert mixed_workers(large, 2) == mixed_workers(large, 0)
