import importlib
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def timing(monkeypatch):
    return by_name(monkeypatch, "_timing")


@pytest.fixture
def run(monkeypatch):
    return by_name(monkeypatch, "run")


def by_name(monkeypatch, name):
    if not FOLDER.exists():
        pytest.skip("the benchmarks are not part of this distribution")
    monkeypatch.syspath_prepend(str(FOLDER))
    for module in ("_timing", "run"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


def test_contenders_take_turns_and_warm_up(timing):
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = timing.interleaved(runs, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert list(timings) == ["a", "b"]


def test_a_spent_budget_ends_after_three_rounds(timing):
    calls = []
    timing.interleaved({"a": lambda: calls.append(1)}, rounds=9, warmup=0, budget=0)
    assert len(calls) == 3


def test_minimum_median_and_spread(timing):
    found = timing.Timing.of([0.3, 0.2, 0.25])
    assert (found.minimum, found.median) == (0.2, 0.25)
    assert found.spread == pytest.approx(0.25)
    assert found.each(2).minimum == 0.1


def test_ratio_is_of_minima_and_value_in_its_unit(timing):
    timings = {"ours": timing.Timing(0.003, 1, 0), "theirs": timing.Timing(0.002, 9, 0)}
    row = timing.row("part", "ours", timings, "theirs", 1.05, "µs")
    assert (row.value, row.ratio, row.met) == (pytest.approx(3000), pytest.approx(1.5), False)
    assert timing.row("part", "ours", timings).met is None


def test_a_limit_holds_for_the_ratio_or_else_the_value_in_the_right_direction(timing):
    def row(value, ratio, limit, more):
        return timing.Row("part", "what", value, "MB", "peer" if ratio else None, ratio, limit, None, more)

    assert row(10, None, 10, False).met
    assert not row(11, None, 10, False).met
    assert row(1, 3.1, 3, True).met
    assert not row(100, 2.9, 3, True).met


def test_a_part_keeps_rows_of_its_own_only(timing, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "restart", lambda threads: None)
    row = timing.Row("part", "what", 1.5, "ms", None, None, 2.0, float("nan"))
    timing.main("part", lambda: [row], arguments=["--json", str(tmp_path / "rows.json")])
    assert timing.Row(**json.loads((tmp_path / "rows.json").read_text())[0]) == row._replace(spread=None)
    assert "1.50 ms" in capsys.readouterr().out
    with pytest.raises(ValueError, match="rows of"):
        timing.main("other", lambda: [row], arguments=[])


def test_the_page_shows_every_row_and_whether_its_limit_is_met(run, timing):
    rows = [
        timing.Row("part", "peer", 2.0, "ms", None, None, None, 0.1),
        timing.Row("part", "ours", 2.2, "ms", "peer", 1.1, 1.05, 0.01),
    ]
    kept = {"date": "2026-01-01", "seconds": 3, "load": 0.1, "about": "What.", "rows": [r._asdict() for r in rows]}
    results = {"command": "make bench", "machine": {"cpu": "x"}, "versions": {}, "parts": {"part": kept}}
    lines = run.page(results).splitlines()
    assert "| part | peer | 2.00 ms | 10.0% | - | - | - |" in lines
    assert "| part | ours | 2.20 ms | 1.0% | 1.100 of peer | ≤ 1.05 | NOT MET |" in lines


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_results_are_one_in_both_forms(run, name):
    path = FOLDER / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip("no results")
    assert path.with_suffix(".md").read_text() == run.page(json.loads(path.read_text()))


def test_the_figures_of_the_readme_are_those_of_the_results():
    """Each line of its table names the row of the results that the figure is."""
    path, readme = FOLDER / "results" / "cpu.json", FOLDER.parent / "README.md"
    if not path.exists() or not readme.exists():
        pytest.skip("no results")
    parts = json.loads(path.read_text())["parts"]
    ratios = {(part, row["name"]): row["ratio"] for part, kept in parts.items() for row in kept["rows"]}
    shown = re.findall(r"^\| .+ \| ([\d.]+) \| `(\w+)`: (.+) \|$", readme.read_text(), re.MULTILINE)
    assert len(shown) > 5
    assert [(figure, part, name) for figure, part, name in shown] == [
        (f"{ratios[part, name]:.2f}", part, name) for _, part, name in shown
    ]
