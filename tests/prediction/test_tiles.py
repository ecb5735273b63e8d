"""Tiles cover a side evenly, and what they count for sums to one."""

import numpy as np
import pytest
import torch

from ununennium.prediction._blend import Blend
from ununennium.prediction._tiles import Tiles, share_of

RNG = np.random.default_rng(0)
CASES = [(1, 1, 0), (5, 1, 0), (64, 64, 63), (65, 64, 32), (97, 64, 63), (1000, 512, 64), (10980, 512, 64)]
CASES += [(int(n), int(t), int(RNG.integers(0, t))) for n, t in RNG.integers(1, [400, 96], (300, 2))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_sum_to_one_everywhere_and_tiles_lie_inside(case):
    length, size, overlap = case
    tiles = Tiles(length, size, overlap)
    total, alone = np.zeros(max(length, tiles.size)), np.zeros(max(length, tiles.size), int)
    for start, weights in zip(tiles.starts, tiles.weights.numpy().astype(float), strict=True):
        assert (weights > 0).all()
        total[start : start + tiles.size] += weights
        alone[start : start + tiles.size] += 1
    assert np.abs(total - 1).max() < 1e-6
    assert tiles.starts[0] == 0
    assert tiles.starts[-1] + tiles.size == length or (len(tiles) == 1 and tiles.size > length)
    steps = np.diff(tiles.starts)
    assert ((tiles.size - steps) >= overlap).all()
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert len(tiles) == 1 or (len(tiles) - 1) * (size - overlap) < length - overlap  # not one more than needed


def test_a_shorter_side_has_one_tile_of_a_multiple_of_32():
    assert [(t.size, t.starts) for t in (Tiles(45, 512, 64), Tiles(64, 512, 64), Tiles(40, 48, 4))] == [
        (64, [0]),
        (64, [0]),
        (48, [0]),
    ]


def test_a_tile_counts_fully_at_the_scenes_edge_and_next_to_nothing_at_its_own():
    weights = Tiles(1000, 512, 64).weights
    assert weights[0, 0] == weights[-1, -1] == 1
    assert weights[0, -1] < 1e-3
    assert weights[1, 0] < 1e-3
    assert weights.diff(dim=1).abs().max() < 0.2  # smooth


@pytest.mark.parametrize("case", [(1000, 96, 16), (300, 96, 80), (97, 64, 63), (64, 64, 0), (130, 64, 0)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_processes_share_the_rows_and_each_computes_all_that_reach_into_its_own(case, size):
    tiles = Tiles(*case)
    shares = [share_of(tiles, rank, size) for rank in range(size)]
    assert [row for finished, _ in shares for row in finished] == list(range(len(tiles)))
    for finished, computed in shares:
        top = tiles.starts[finished.start] if finished else None
        reaching = [i for i in range(finished.stop) if finished and tiles.starts[i] + tiles.size > top]
        assert list(computed) == reaching


def painted(rows, columns, tiles, size=1):
    """Return what is finished of tiles (rows, columns, K, H, W), by so many processes."""
    whole = torch.full((tiles.shape[2], rows.length, columns.length), torch.nan)
    for rank in range(size):
        finished, computed = share_of(rows, rank, size)
        blend = Blend(rows, columns, computed.start, torch.device("cpu"))
        for row in computed:
            for column in range(len(columns)):
                piece = blend.add(row, column, tiles[row, column])
                if row in finished:
                    whole[:, slice(*rows.finished(row)), slice(*columns.finished(column))] = piece
    return whole


@pytest.mark.parametrize("heights", [(150, 64, 16), (97, 64, 63), (40, 64, 8), (130, 64, 0), (200, 64, 50)], ids=str)
@pytest.mark.parametrize("widths", [(170, 48, 16), (100, 48, 40), (30, 48, 8)], ids=str)
def test_strips_give_what_one_sum_over_the_whole_scene_gives(heights, widths):
    rows, columns = Tiles(*heights), Tiles(*widths)
    tiles = torch.randn(len(rows), len(columns), 2, rows.size, columns.size, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(2, rows.starts[-1] + rows.size, columns.starts[-1] + columns.size, dtype=torch.float64)
    for row, top in enumerate(rows.starts):
        for column, left in enumerate(columns.starts):
            weights = rows.weights[row, :, None].double() * columns.weights[column].double()
            whole[:, top : top + rows.size, left : left + columns.size] += tiles[row, column] * weights
    ours = painted(rows, columns, tiles)
    assert (ours - whole[:, : rows.length, : columns.length]).abs().max() < 1e-5
    for size in (2, 3, 5):
        assert torch.equal(painted(rows, columns, tiles, size), ours)


def test_a_tile_without_data_changes_nothing_outside_it():
    rows, columns = Tiles(101, 64, 32), Tiles(101, 64, 32)  # overlaps of 46 and 45
    tiles = torch.rand(len(rows), len(columns), 1, 64, 64)
    tiles[0, 1] = tiles[1, 0] = 0
    blend, ours, outside = Blend(rows, columns, 0, torch.device("cpu")), torch.zeros(1, 101, 101), torch.ones(101, 101)
    for row, top in enumerate(rows.starts):
        for column, left in enumerate(columns.starts):
            empty = not tiles[row, column].any()
            piece = blend.add(row, column, None if empty else tiles[row, column])
            assert (piece is None) == empty
            if empty:
                outside[top : top + 64, left : left + 64] = 0
            else:
                ours[:, slice(*rows.finished(row)), slice(*columns.finished(column))] = piece
    assert outside.any()
    assert torch.equal(ours * outside, painted(rows, columns, tiles) * outside)
