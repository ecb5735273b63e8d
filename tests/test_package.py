"""What a release promises: one version, extras that are there, and reference pages whose entries say all there is.

That the reference has every public name, and that what the pages show runs, is held by ``test_docs.py``.
"""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ununennium
from ununennium import export, metrics
from ununennium.metrics.classification import ConfusionMetric
from ununennium.training import MLflowLogger, TensorBoardLogger, WandbLogger

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
USED = EXTRAS.keys() - {"bench", "dev", "docs", "release"}  # by the package itself


def shown():
    """Return the full names of what the reference shows."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]


def packages(requirements):
    """Return the packages of requirements, as indexes spell them."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in requirements}


@functools.cache
def installed():
    """Return the installed packages by the modules that are in them."""
    return importlib.metadata.packages_distributions()


@functools.cache
def distributions():
    """Return the installed packages."""
    return {canonicalize_name(each.name) for each in importlib.metadata.distributions()}


def providers(module):
    """Return the installed packages that a module is in."""
    return packages(installed().get(module, ()))


# ---- versions -------------------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    assert ununennium.__version__ == importlib.metadata.version("ununennium")
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert about["version"] == ununennium.__version__


def dated(version, citation, changelog):
    """Tell whether a release has its date in both files, and what is none has none."""
    first = re.search(r"^## (.*)$", changelog, re.M)[1]
    if "dev" in version:
        return first == "Unreleased" and "date-released" not in citation
    return first == f"{version} - {citation.get('date-released')}"


def test_a_release_has_its_date_where_it_is_cited_and_in_the_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert dated(ununennium.__version__, citation, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    noted, older = {"date-released": "2030-01-31"}, "\n## 1.2.2 - 2029-01-01\n"
    assert dated("1.2.3", noted, f"# Changelog\n\n## 1.2.3 - 2030-01-31\n{older}")
    assert not dated("1.2.3", noted, f"# Changelog\n\n## 1.2.3 - 2030-02-01\n{older}")
    assert not dated("1.2.3", {}, f"# Changelog\n\n## 1.2.3 - 2030-01-31\n{older}")
    assert not dated("1.2.3", noted, f"# Changelog\n\n## Unreleased\n\n## 1.2.3 - 2030-01-31\n{older}")
    assert not dated("1.2.4.dev0", noted, f"# Changelog\n\n## Unreleased\n{older}")
    assert not dated("1.2.4.dev0", {}, f"# Changelog\n{older}")


# ---- public names ---------------------------------------------------------------------------------------------------


def test_every_name_in_all_is_there():
    modules = [m.name for m in pkgutil.walk_packages(ununennium.__path__, "ununennium.") if not m.name.endswith("__")]
    named = {name: getattr(importlib.import_module(name), "__all__", ()) for name in modules}
    assert sum(map(len, named.values())) > 50
    assert [f"{m}.{name}" for m in named for name in named[m] if not hasattr(sys.modules[m], name)] == []
    assert [m for m in named if list(named[m]) != list(dict.fromkeys(named[m]))] == []


def sections(text):
    """Return the sections of a NumPy-style docstring, and what stands before them under None."""
    parts = re.split(r"^(\w[\w ]*)\n-+\n", text, flags=re.M)
    return {None: parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def described(section):
    """Return the names that a section describes."""
    heads = re.findall(r"^(?! )(.+)$", section, re.M)
    return {name.strip(" *") for head in heads for name in head.partition(" : ")[0].split(",")}


def undescribed(thing):
    """Return the parameters that a docstring passes over; a class that users don't make may list attributes instead."""
    text = sections(inspect.getdoc(thing))
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return set()
    named = [p for p in inspect.signature(thing).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if isinstance(thing, type) and "Parameters" not in text:
        base = re.search(r"See\s`(\w+)`\sfor\sthe\sparameters", text[None])
        if base is not None:  # which may have fewer
            text = sections(inspect.getdoc(next(each for each in thing.__mro__ if each.__name__ == base[1])))
        elif "Attributes" in text:
            return set()
    return {parameter.name for parameter in named} - described(text.get("Parameters", ""))


@pytest.mark.parametrize("name", shown())
def test_a_public_name_says_what_it_is_and_takes(name):
    module, _, own = name.rpartition(".")
    thing = getattr(importlib.import_module(module), own)
    assert re.match(r".+[.:]\n*(?:\n\n|$)", thing.__doc__ or "", re.S), "its docstring begins with no sentence"
    assert undescribed(thing) == set()


def made_in(*rooms):
    """Return the public classes of some rooms that have a constructor of their own, each with its code."""
    known = {name.rpartition(".")[2] for name in shown()}
    for path in SOURCES:
        module = ".".join(["ununennium", *path.relative_to(ROOT / "src" / "ununennium").with_suffix("").parts])
        for node in ast.parse(path.read_text(encoding="utf-8")).body if module.split(".")[1] in rooms else ():
            made = [n for n in getattr(node, "body", ()) if getattr(n, "name", "") == "__init__"]
            private = node.name.startswith("_") or path.name.startswith("_") if made else False
            if made and (not private or node.name in known):
                yield pytest.param(getattr(importlib.import_module(module), node.name), made[0], id=node.name)


@pytest.mark.parametrize(("thing", "made"), list(made_in("data", "losses", "metrics", "models", "runs")))
def test_a_class_says_what_making_it_raises_and_what_it_has(thing, made):
    raised = {ast.unparse(n.exc).partition("(")[0] for n in ast.walk(made) if isinstance(n, ast.Raise)}
    calls = {ast.unparse(n.func) for n in ast.walk(made) if isinstance(n, ast.Call)}
    raised |= {"TypeError"} if calls & {"integer", "ConfusionMatrix"} else set()
    assert raised - {"self._nothing_left"} <= described(sections(inspect.getdoc(thing)).get("Raises", ""))
    attributes = (n for n in ast.walk(made) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    kept = {n.attr for n in attributes if ast.unparse(n.value) == "self" and not n.attr.startswith("_")}
    texts = [sections(inspect.cleandoc(each.__doc__ or "")) for each in thing.__mro__]
    assert kept <= {name for text in texts for p in ("Parameters", "Attributes") for name in described(text.get(p, ""))}


@pytest.mark.parametrize("name", metrics.__all__)
def test_a_figure_of_classes_says_where_its_formula_comes_from(name):
    figure = getattr(metrics, name)
    if isinstance(figure, type) and issubclass(figure, ConfusionMetric):
        assert re.search(r"\(1\d\d\d\), \w", sections(inspect.getdoc(figure)).get("References", ""))


# ---- extras ---------------------------------------------------------------------------------------------------------


def test_what_is_imported_is_declared():
    """By the package that it is in, and not by chance, as another's dependency."""
    imported = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            imported |= {name.partition(".")[0]: path.name for name in names}
    others = {module: where for module, where in imported.items() if module not in sys.stdlib_module_names}
    declared = packages(PROJECT["dependencies"]).union(*(packages(EXTRAS[extra]) for extra in USED))
    optional = {"onnxruntime"}  # runs what was exported, if it is there
    missing = {
        m: where for m, where in others.items() if not providers(m) & declared and m not in {"ununennium", *optional}
    }
    assert missing == {}


def brought(lines):
    """Return the packages that requirements bring with them, one by another, as far as they are installed."""
    found, waiting = set(), [Requirement(line) for line in lines]
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            asked = canonicalize_name(requirement.name), extra
            if asked not in found and asked[0] in distributions():
                found.add(asked)
                needs = map(Requirement, importlib.metadata.requires(requirement.name) or ())
                waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


@pytest.mark.parametrize("module", ["docstring_parser", "typeshed_client"])
def test_what_the_help_is_read_with_comes_along(module):
    """By jsonargparse, of docstrings and stubs: without them the options of ``fit --help`` have no text."""
    assert providers(module)
    assert providers(module) <= brought(PROJECT["dependencies"])


def test_every_extra_that_is_named_is_there():
    """In messages, docstrings, pages, examples, the Makefile and the workflows."""
    texts = [*SOURCES, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    for folder, pattern in (("docs", "*.md"), ("docs", "*.ipynb"), ("examples", "*.py"), (".github", "*.yml")):
        texts += (ROOT / folder).rglob(pattern)
    named = {}
    for path in texts:
        for found in re.findall(r"(?:ununennium|[ '\"]\.|\*\.whl\))\[([\w,]+)\]", path.read_text(encoding="utf-8")):
            named |= dict.fromkeys(found.split(","), path.name)
    assert {"demo", "dev", "release", "export", "torchgeo", "wandb"} <= named.keys()
    assert {extra: where for extra, where in named.items() if extra not in EXTRAS} == {}


MISSING = {
    "onnx": ("export", lambda: export._write_onnx(None, None, None)),
    "onnxscript": ("export", lambda: export._write_onnx(None, None, None)),
    "mlflow": ("mlflow", MLflowLogger),
    "tensorboard": ("tensorboard", lambda: TensorBoardLogger("log")),
    "wandb": ("wandb", lambda: WandbLogger("project")),
}


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_package_is_named_with_the_extra_that_has_it(module, monkeypatch):
    """Here and, of the demo's scene and of TorchGeo's weights, in ``test_cli.py`` and ``models/test_weights.py``."""
    extra, use = MISSING[module]
    assert providers(module) & packages(EXTRAS[extra]) or not providers(module)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install ['\"]ununennium\[{extra}\]['\"]"):
        use()
