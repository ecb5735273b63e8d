"""How the benchmarks measure: contenders take turns in one process, the minimum counts, the spread tells the noise.

A part is a module with ``measure() -> list[Row]`` that ends with ``main(NAME, measure)``, so that it runs by itself
too: ``python benchmarks/overhead.py``.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from math import isnan
from pathlib import Path
from statistics import median
from typing import NamedTuple

# Else the allocator gives big blocks back and takes them anew, or not, and page faults make figures of two kinds. Read
# by the C library when a process starts. The same for all contenders.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class Timing(NamedTuple):
    """Seconds of the rounds of one contender.

    Attributes
    ----------
    minimum, median : float
    spread : float
        By what share of the minimum the median lies above it.
    """

    minimum: float
    median: float
    spread: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Timing":
        """Sum up some rounds."""
        rounds = list(seconds)
        least, middle = min(rounds), median(rounds)
        return cls(least, middle, (middle - least) / least)

    def each(self, number: int) -> "Timing":
        """Return the time of one of ``number`` equal pieces."""
        return Timing(self.minimum / number, self.median / number, self.spread)


class Row(NamedTuple):
    """One figure of a table.

    Attributes
    ----------
    part, name : str
    value : float
    unit : str
    peer : str or None
        The row that it is compared with.
    ratio : float or None
        The value over the peer's.
    limit : float or None
        What the ratio, or without a peer the value, must not be above: where more is better, not below.
    spread : float or None
        By what share of the best round the median lies off it; None of what is measured once.
    more_is_better : bool
    """

    part: str
    name: str
    value: float
    unit: str
    peer: str | None
    ratio: float | None
    limit: float | None
    spread: float | None
    more_is_better: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None without one."""
        if self.limit is None:
            return None
        held = self.value if self.ratio is None else self.ratio
        return held >= self.limit if self.more_is_better else held <= self.limit


_UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 1, budget: float | None = None
) -> dict[str, Timing]:
    """Time contenders in turn, round by round; garbage is collected before each, and never meanwhile.

    Parameters
    ----------
    contenders : dict of str to callable
    rounds : int
        The greatest number of them, after ``warmup`` that don't count.
    budget : float, optional
        Seconds after which no round begins, but for the first three.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for number in range(-warmup, rounds):
        if number >= 3 and budget is not None and time.perf_counter() - begin > budget:
            break
        for name, run in contenders.items():
            took = timed(run)
            if number >= 0:
                seconds[name].append(took)
    return {name: Timing.of(times) for name, times in seconds.items()}


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes, without the garbage collector, which runs before it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()


def row(
    part: str,
    name: str,
    timings: dict[str, Timing],
    peer: str | None = None,
    limit: float | None = None,
    unit: str = "ms",
) -> Row:
    """Make a row of the minimum of one of ``timings``, its ratio to the minimum of ``peer`` and a limit to that."""
    own = timings[name]
    ratio = None if peer is None else own.minimum / timings[peer].minimum
    return Row(part, name, own.minimum * _UNITS[unit], unit, peer, ratio, limit, own.spread)


def cells(one: Row) -> list[str]:
    """Return a row as the cells of a table under `HEAD`."""
    nothing = "-"
    more = "≥" if one.more_is_better else "≤"
    return [
        one.part,
        one.name,
        f"{number(one.value)} {one.unit}".strip(),
        nothing if one.spread is None or isnan(one.spread) else f"{one.spread:.1%}",
        nothing if one.ratio is None else f"{one.ratio:.3f} of {one.peer}",
        nothing if one.limit is None else f"{more} {one.limit:g}",
        {None: nothing, True: "met", False: "NOT MET"}[one.met],
    ]


HEAD = ["part", "what", "best", "spread", "ratio", "limit", ""]


def number(value: float) -> str:
    """Return three digits of a number, no fewer than it has before the point."""
    digits = next((d for d, least in ((0, 100), (1, 10), (2, 1)) if abs(value) >= least), 3)
    return f"{value:,.{digits}f}"


def plain(rows: Sequence[Row]) -> str:
    """Return rows as lines for a terminal."""
    table = [HEAD[1:], *(cells(r)[1:] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = (
        [
            cell.rjust(w) if place == 1 else cell.ljust(w)
            for place, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in table
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def markdown(rows: Sequence[Row]) -> str:
    """Return rows as a table of Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEAD, ["---"] * len(HEAD), *map(cells, rows)))


def main(
    part_name: str,
    measure: Callable[[], list[Row]],
    threads: int | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a part with threads (all cores by default) and allocator set; print its rows, with ``--json FILE`` keep them.

    Whatever the part compares runs in this process or in its children, so that all have the same.
    """
    parser = argparse.ArgumentParser(description=f"The part {part_name!r} of the benchmarks.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    options = parser.parse_args(arguments)
    restart(threads)
    rows = [r._replace(spread=None) if r.spread is not None and isnan(r.spread) else r for r in measure()]
    strange = {r.part for r in rows} - {part_name}
    if strange:
        raise ValueError(f"rows of {strange} in part {part_name!r}")
    print(f"{part_name}\n{plain(rows)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([r._asdict() for r in rows], ensure_ascii=False, indent=1))


def restart(threads: int | None = None) -> None:
    """Start this process anew, once, with what must stand in the environment of one that measures; set threads."""
    threads = threads or len(os.sched_getaffinity(0))
    fixed = {**ALLOCATOR, "OMP_NUM_THREADS": str(threads)}
    if any(os.environ.get(name) != value for name, value in fixed.items()):
        os.environ.update(fixed)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    import torch

    torch.set_num_threads(threads)
