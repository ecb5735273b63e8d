"""Blocks given to parts so that every class is shared out as the parts are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_STARTS = 8
_COMPARISONS = 3_000_000  # exchanges of two blocks looked at, at most


def assign(counts: NDArray[np.int64], shares: Floats, seed: int) -> NDArray[np.int16]:
    """Return the number of the part that each block goes to.

    Several random assignments are each improved by moving a block, or exchanging it for one of another part, as long
    as that helps; the best is taken. What is to be small is the sum over classes and parts of (share of the class's
    pixels in the part - share of the part)² / share of the part, so that a class that a small part lacks weighs much.

    Parameters
    ----------
    counts : ndarray of int (B, K)
        Pixels of each block, by class.
    shares : ndarray (P,)
        Of the parts; they sum to 1.
    seed : int
    """
    blocks, parts = len(counts), len(shares)
    totals = counts.sum(axis=0)
    by_class = counts[:, totals > 0] / totals[totals > 0]
    best, best_cost = np.zeros(blocks, np.int16), np.inf
    left = _COMPARISONS
    for start in range(_STARTS):
        draws = np.random.Generator(np.random.PCG64([seed, start]))
        given = np.repeat(np.arange(parts, dtype=np.int16), _quotas(blocks, shares))[draws.permutation(blocks)]
        left = _improve(given, by_class, shares, draws, left)
        held = np.stack([by_class[given == part].sum(axis=0) for part in range(parts)])
        cost = float(_cost(held, shares[:, None]).sum())
        if cost < best_cost - 1e-12:
            best, best_cost = given, cost
        if left <= 0:
            break
    return best


def _improve(given: NDArray[np.int16], by_class: Floats, shares: Floats, draws: np.random.Generator, left: int) -> int:
    """Improve an assignment in place, until nothing helps or ``left`` comparisons are made; return what is left."""
    held = np.stack([by_class[given == part].sum(axis=0) for part in range(len(shares))])
    moved = True
    while moved and left > 0:
        moved = False
        for block in draws.permutation(len(given)).tolist():
            here, own = int(given[block]), by_class[block]
            best = (-1e-9, -1, -1)  # gain, other part, block exchanged
            for there in range(len(shares)):
                if there == here:
                    continue
                others = np.flatnonzero(given == there)
                change = own - by_class[others]
                if (given == here).sum() > 1:
                    others, change = np.append(others, -1), np.concatenate([change, own[None]])
                after = _cost(held[here] - change, shares[here]) + _cost(held[there] + change, shares[there])
                before = _cost(held[here], shares[here]).sum() + _cost(held[there], shares[there]).sum()
                gains = after.sum(axis=1) - before
                place = int(gains.argmin())
                best = min(best, (float(gains[place]), there, int(others[place])))
            _, there, other = best
            if there >= 0:
                change = own - (by_class[other] if other >= 0 else 0)
                held[here] -= change
                held[there] += change
                given[block] = there
                if other >= 0:
                    given[other] = here
                moved = True
            left -= len(given)
            if left <= 0:
                break
    return left


def _cost(held: Floats, share: float | Floats) -> Floats:
    cost: Floats = (held - share) ** 2 / share
    return cost


def _quotas(blocks: int, shares: Floats) -> list[int]:
    """Return how many blocks each part gets: at least one, the largest remainders first."""
    exact = shares * blocks
    quotas = np.maximum(np.floor(exact).astype(int), 1)
    while quotas.sum() < blocks:
        quotas[np.argmax(exact - quotas)] += 1
    while quotas.sum() > blocks:
        quotas[np.argmax(np.where(quotas > 1, quotas - exact, -np.inf))] -= 1
    return list(map(int, quotas))
