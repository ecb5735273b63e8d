"""Run the benchmarks, each part in a process of its own, and keep what they say in benchmarks/results.

``make bench`` runs all, ``make bench ARGS="--only overhead epoch"`` some, whose figures it only prints; with ``--keep``
they take the place of those parts in the results, on the same machine and versions. Ends with 1 if a part failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _timing import Row, markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PARTS = (
    "overhead", "epoch", "memory", "losses", "metrics", "data_order", "checkpoints", "distributed", "chips",
    "prediction", "loggers",
)  # fmt: skip
APART = ("compiled", "gpu")  # run when asked for
PEERS = (
    "torch", "ununennium", "accelerate", "lightning", "monai", "pytorch-ignite", "segmentation-models-pytorch",
    "torchgeo", "torchmetrics", "transformers",
)  # fmt: skip

Results = dict[str, Any]


def environment() -> dict[str, Any]:
    """Return the machine and the versions that figures are of."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PEERS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine = {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "isa": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {"machine": machine, "versions": versions}


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def about(part: str) -> str:
    """Return what a part says of itself, but for how it is called."""
    text = (HERE / f"{part}.py").read_text().split('"""')[1]
    return "\n".join(line for line in text.strip().splitlines())


def page(results: Results) -> str:
    """Return results as a page of Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines = [
        "# Benchmarks",
        "",
        f"Written by `{results['command']}`. Best of interleaved rounds; the spread is the median's distance from it.",
        "Ratios hold on a quiet machine only: a large spread says that it was none.",
        "",
        f"- Machine: {machine}",
        f"- Versions: {versions}",
    ]
    for part, kept in results["parts"].items():
        rows = [Row(**row) for row in kept["rows"]]
        when = f"{kept['date']}, {kept['seconds']:.0f} s, load {kept['load']:.2f} when it began."
        lines += ["", f"## {part}", "", kept["about"], "", when, "", markdown(rows)]
    return "\n".join(lines) + "\n"


def run(part: str, arguments: list[str]) -> dict[str, Any] | None:
    """Run a part; return None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        start, load = time.perf_counter(), os.getloadavg()[0]
        if subprocess.run([sys.executable, str(HERE / f"{part}.py"), "--json", str(rows), *arguments]).returncode:
            return None
        took = time.perf_counter() - start
        kept = {"date": date.today().isoformat(), "seconds": round(took), "load": load, "about": about(part)}
        return {**kept, "rows": json.loads(rows.read_text())}


def write(results: Results, name: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page(results))


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks.")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *APART], metavar="PART", help=", ".join(PARTS + APART))
    parser.add_argument("--keep", action="store_true", help="with --only: put them into the results")
    options, rest = parser.parse_known_args()
    names = options.only or [part for part in PARTS if (HERE / f"{part}.py").exists()]
    where = "gpu" if options.only == ["gpu"] else "cpu"
    command = "make bench-gpu" if where == "gpu" else "make bench"
    results: Results = {"command": command, **environment(), "parts": {}}
    if options.only and options.keep and (RESULTS / f"{where}.json").exists():
        before = json.loads((RESULTS / f"{where}.json").read_text())
        if any(before[key] != results[key] for key in ("machine", "versions")):
            sys.exit("the results kept are of another machine or other versions: run all parts")
        results["parts"] = before["parts"]
    found = {}
    for part in names:
        found[part] = run(part, rest)
        print(flush=True)
    results["parts"] |= {part: kept for part, kept in found.items() if kept is not None}
    results["parts"] = {part: results["parts"][part] for part in PARTS + APART if part in results["parts"]}
    if where == "gpu" and "gpu" not in results["machine"]:
        print("no CUDA GPU: nothing is kept")
    elif not options.only or options.keep:
        write(results, where)
    missed = [Row(**row) for kept in found.values() if kept for row in kept["rows"]]
    for row in missed:
        if row.met is False:
            print(f"NOT MET: {row.part}, {row.name}: {row.value if row.ratio is None else row.ratio:.3f}")
    failed = [part for part, kept in found.items() if kept is None]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
