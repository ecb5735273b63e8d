"""What the pages show runs: every block of Python, every ``ununennium`` command, every configuration, the notebook.

A page's Python blocks run in order, in one namespace, in a folder of the page's own. HTML comments, which no reader
sees, say what a page's first lines take for granted and what is too long to be done here as it stands:

    <!-- test: given loaders, scene -->       what `GIVEN` makes, before the page's first block
    <!-- test: epochs=100 -> epochs=2 -->     in the next block, or after "page," in all; the text has to occur
    <!-- test: not run, REASON -->            for the next block, which still has to parse; counted by `NOT_RUN`
"""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ununennium import cli

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
NOT_RUN = Counter(
    {
        ("README.md", "it needs several processes; tests/distributed does"): 1,
        ("README.md", "it trains for minutes; tests/test_demo.py runs it"): 1,
        ("docs/cli.md", "it needs several processes; tests/distributed does"): 1,
        ("docs/cli.md", "it trains for minutes; tests/test_demo.py runs it"): 1,
        ("docs/distributed.md", "it needs several hosts; tests/distributed/test_hosts.py has two"): 1,
        ("docs/distributed.md", "it needs several processes; tests/distributed does"): 1,
        (
            "docs/distributed.md",
            "it needs the sharded checkpoint of several processes; tests/distributed/test_sharded.py has one",
        ): 1,
        ("docs/performance.md", "compiling takes a minute; tests/training/test_levers.py does it"): 1,
        (
            "docs/prediction.md",
            "it downloads; tests/models does it with every weight of TorchGeo's registry that fits",
        ): 1,
        ("docs/resuming.md", "it needs a scheduler"): 2,
    }
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use `@` matmul instead of:PendingDeprecationWarning"),  # rasterio on affine 3
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # Lightning
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning"),  # plt.show() of the notebook
]


# ---- what pages take for granted ------------------------------------------------------------------------------------


class Patches(Dataset):
    """Small chips whose brightest band tells the class; mappings or tuples, with nodata along an edge."""

    def __init__(self, bands, classes, chips=8, size=32, mapping=False):
        draw = torch.Generator().manual_seed(bands)
        labels = torch.randint(0, classes, (chips, size // 8, size // 8), generator=draw)
        self.masks = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
        self.images = torch.randn(chips, bands, size, size, generator=draw)
        self.images[:, :classes] += 2 * nn.functional.one_hot(self.masks, classes).movedim(-1, 1)[:, :bands]
        self.masks[:, :3] = 255
        self.mapping = mapping

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, mask = self.images[index], self.masks[index]
        return {"image": image, "mask": mask, "place": f"chip {index}"} if self.mapping else (image, mask)


def small_network(bands=4, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(bands, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes, 1)
        return nn.Sequential(*layers)


def given_wide_loaders():
    """Return the loaders of the specification's example: 12 bands, 10 classes, no nodata."""
    data = Patches(12, 10)
    data.masks[data.masks == 255] = 0
    return {"train_loader": DataLoader(data, 2, shuffle=True), "val_loader": DataLoader(data, 2)}


def given_parts():
    """Return what a Trainer is made of: loaders of mappings, 4 bands and 3 classes."""
    data, model = Patches(4, 3, mapping=True), small_network()
    return {
        "dataset": data, "train_loader": DataLoader(data, 2, shuffle=True), "val_loader": DataLoader(data, 2),
        "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loss_fn": nn.CrossEntropyLoss(ignore_index=255),
    }  # fmt: skip


def given_scene():
    """Write scene.tif (bands B2, B3, B4, B8) and landcover.tif (values 1, 5, 7; 255 is none), 10 m a pixel."""
    size, draw = 128, np.random.default_rng(0)
    labels = np.array([1, 5, 7])[draw.integers(0, 3, (size // 8, size // 8))].repeat(8, 0).repeat(8, 1)
    image = draw.integers(0, 300, (4, size, size)) + 200 * labels
    image[:, :12], labels[:, :5] = 0, 255
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), "height": size, "width": size}
    with rasterio.open("scene.tif", "w", "GTiff", count=4, dtype="uint16", nodata=0, **place) as file:
        file.write(image.astype("uint16"))
        file.descriptions = ["B2", "B3", "B4", "B8"]
    with rasterio.open("landcover.tif", "w", "GTiff", count=1, dtype="uint8", nodata=255, **place) as file:
        file.write(labels.astype("uint8"), 1)
    return {}


def given_rasters():
    """Write rasters/image.tif and rasters/mask.tif, for TorchGeo."""
    pixels = np.random.default_rng(0).integers(0, 3000, (3, 128, 128)).astype("uint16")
    place = {"crs": "EPSG:32631", "transform": from_origin(500_000, 5_000_000, 10, 10), "height": 128, "width": 128}
    Path("rasters").mkdir()
    for name, values in {"image": pixels, "mask": (pixels[:1] // 1000).astype("uint8")}.items():
        with rasterio.open(f"rasters/{name}.tif", "w", "GTiff", count=len(values), dtype=values.dtype, **place) as file:
            file.write(values)
    return {}


def given_eurosat():
    """Write the files that TorchGeo's EuroSAT100 looks for in data, 13 bands of noise."""
    from torchgeo.datasets import EuroSAT100

    draw = np.random.default_rng(0)
    listed = {"train": [], "val": [], "test": []}
    place = {"crs": "EPSG:32631", "transform": from_origin(0, 0, 10, 10), "height": 64, "width": 64}
    for name in (f"Class{number}" for number in range(10)):
        folder = Path("data") / EuroSAT100.base_dir / name
        folder.mkdir(parents=True)
        for split in listed:
            listed[split].append(f"{name}_{split}.jpg")
            file = folder / f"{name}_{split}.tif"
            with rasterio.open(file, "w", "GTiff", count=13, dtype="uint16", **place) as target:
                target.write(draw.integers(0, 4000, (13, 64, 64)).astype("uint16"))
    for split, names in listed.items():
        (Path("data") / EuroSAT100.split_filenames[split]).write_text("\n".join(names))
    return {}


GIVEN = {
    "wide loaders": given_wide_loaders, "parts": given_parts, "scene": given_scene, "rasters": given_rasters,
    "eurosat": given_eurosat,
}  # fmt: skip


# ---- pages ----------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A fenced block: language, text without its indentation, the line it begins at, and what comments say of it."""

    language: str
    text: str
    line: int
    not_run: str | None = None


@dataclass
class Page:
    """A page's blocks, what it takes for granted, and replacements that never matched."""

    name: str
    blocks: list[Block] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


LINE = re.compile(r"^(?P<indent> *)(?:```(?P<language>\w*).*|<!-- test: (?P<comment>.*?) -->)$")


def read(name, text):
    page, everywhere, here, not_run = Page(name), {}, {}, None
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        found = LINE.match(lines[number])
        number += 1
        if found is None:
            continue
        comment = found["comment"]
        if comment is not None:
            if comment.startswith("given "):
                page.given += comment.removeprefix("given ").split(", ")
            elif comment.startswith("not run, "):
                not_run = comment.removeprefix("not run, ")
            else:
                old, arrow, new = comment.removeprefix("page, ").partition(" -> ")
                assert arrow, f"{name}:{number}: not understood: {comment}"
                (everywhere if comment.startswith("page, ") else here)[old] = new
            continue
        end = next(n for n in range(number, len(lines)) if lines[n].strip() == "```")
        block = "\n".join(line.removeprefix(found["indent"]) for line in lines[number:end]) + "\n"
        page.unused += [old for old in here if old not in block]
        for old, new in (here | everywhere).items():
            block = block.replace(old, new)
        page.blocks.append(Block(found["language"], block, number + 1, not_run))
        here, not_run, number = {}, None, end + 1
    page.unused += [old for old in everywhere if old not in text.replace(f"{old} -> ", "")]
    return page


def run_page(page, path):
    """Run a page's blocks in the working directory; an error's traceback names the page and its line."""
    names = {"__name__": "page"}
    for given in page.given:
        names |= GIVEN[given]()
    for block in page.blocks:
        {"python": run_python, "sh": run_shell, "yaml": run_yaml, "text": lambda *_: None}[block.language](
            block, path, names
        )


def run_python(block, path, names):
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    if block.not_run is None:
        exec(code, names)


def run_shell(block, path, names):
    """Run the commands of ours, look at what others name, and have Bash read the rest."""
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    if block.not_run is not None:
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:  # of the environment
            del words[0]
        if not words:
            continue
        where = f"{path}:{block.line}: {line}"
        command, *arguments = words
        if command == "ununennium":
            run_command(arguments, where)
        elif command == "make":
            targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {a for a in arguments if "=" not in a} <= set(targets), f"{where}: no such target"
        elif command == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            named = re.findall(r"\[([\w,]+)\]", line)
            assert set(",".join(named).split(",")) <= {"", *extras}, f"{where}: no such extra"
        else:
            raise AssertionError(f"{where}: neither run nor marked <!-- test: not run, REASON -->")


def run_command(arguments, where):
    try:
        cli.main(arguments)
    except SystemExit as left:
        if left.code not in (None, 0):
            raise AssertionError(f"{where} left with {left.code}") from left


def run_yaml(block, path, names):
    """Have the command read a configuration, and keep it under the name that its first line gives."""
    named = re.match(r"# (\S+\.yaml)\n", block.text)
    file = Path(named[1] if named else "part.yaml")
    file.write_text(block.text)
    try:
        cli.fit_parser().parse_args(["--config", str(file)])
    except SystemExit as left:
        raise AssertionError(f"{path}:{block.line}: the command refuses this configuration") from left


# ---- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def away(tmp_path, monkeypatch):
    """Work in an empty folder, and leave the random state and the loggers' environment alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name, away):
    page = read(name, (ROOT / name).read_text(encoding="utf-8"))
    assert not page.unused, f"{name}: replacements that replace nothing: {page.unused}"
    run_page(page, ROOT / name)


def test_what_is_not_run_is_listed():
    found = Counter()
    for name in PAGES:
        page = read(name, (ROOT / name).read_text(encoding="utf-8"))
        found.update((name, block.not_run) for block in page.blocks if block.not_run is not None)
    assert found == NOT_RUN


def test_the_notebook_runs_and_keeps_no_outputs(away):
    """Its cells in order; the scene comes out of a package, no network is asked."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names = {"__name__": "notebook"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], f"cell {number} has outputs: strip them"
        assert cell["execution_count"] is None
        exec(compile("".join(cell["source"]), f"{NOTEBOOK}, cell {number}", "exec"), names)


BROKEN = {
    "python": ("x = 1\nx.nothing", AttributeError),
    "sh": ("ununennium fit --config missing.yaml", AssertionError),
    "yaml": ("trainer: {epoch: 3}", AssertionError),
}


@pytest.mark.parametrize("language", BROKEN)
def test_a_broken_block_is_told_with_page_and_line(language, away):
    code, kind = BROKEN[language]
    text = f'# A page\n\n```python\ny = 2\n```\n\n=== "a tab"\n\n    ```{language}\n' + "".join(
        f"    {line}\n" for line in code.splitlines()
    )
    page = read("page.md", f"{text}    ```\n")
    with pytest.raises(kind) as caught:
        run_page(page, "page.md")
    if language == "python":
        last = caught.traceback[-1]
        assert (str(last.path).rpartition("/")[2], last.lineno + 1) == ("page.md", 11)
    else:
        assert "page.md:10" in str(caught.value)


def test_a_command_of_others_has_to_be_run_or_marked(away):
    page = read("page.md", "```sh\nsbatch job.sh\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:2: sbatch job\.sh: neither run nor marked"):
        run_page(page, "page.md")
    run_page(read("page.md", "<!-- test: not run, no Slurm here -->\n```sh\nsbatch job.sh\n```\n"), "page.md")
    with pytest.raises(subprocess.CalledProcessError):
        run_page(read("page.md", "<!-- test: not run, no Slurm here -->\n```sh\nif sbatch\n```\n"), "page.md")


PUBLIC = ["training", "losses", "metrics", "models", "data", "prediction", "plots", "export"]


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module):
    """As named in ``__all__``, or without one as defined there without an underscore."""
    found = importlib.import_module(f"ununennium.{module}")
    names = getattr(found, "__all__", None)
    if names is None:
        tree = ast.parse(Path(found.__file__).read_text(encoding="utf-8"))
        defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        names = [name for name in defined if not name.startswith("_")]
    text = (ROOT / "docs" / "reference" / f"{module}.md").read_text(encoding="utf-8")
    shown = re.findall(rf"^::: ununennium\.{module}\.(\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(names)


@pytest.mark.skipif(shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None, reason="needs mkdocs")
def test_the_site_builds_without_a_warning_and_asks_no_network(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        mkdocs, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr[-3000:]
    assert "WARNING" not in built.stderr
    loads = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\s\">]*)|<link[^>]*\shref=\"?(https?:[^\s\">]*)")
    for page in (tmp_path / "site").rglob("*.html"):
        asked = [a or b for a, b in loads.findall(page.read_text(encoding="utf-8"))]
        assert not [url for url in asked if "canonical" not in url], f"{page.name} loads {asked}"
