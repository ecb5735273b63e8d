"""See that dist/ holds one wheel and one sdist that are whole, and nothing that does not belong in them.

Run it from the repository after ``python -m build``: it exits with a list of what is wrong.
"""

import email
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = Path("src/ununennium")
BESIDE = ["tests", "docs", "examples", "benchmarks"]  # in the sdist, with all that git has of them
FILES = [
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md",
    "constraints.txt", "mkdocs.yml", "pyproject.toml",
]  # fmt: skip
STRAY = {"__pycache__", ".git", ".venv", ".ruff_cache", ".mypy_cache", ".pytest_cache", "runs", "checkpoints", "site"}


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds, by path, less what was only left there by running it."""
    paths = (p for p in folder.rglob("*") if p.is_file() and not STRAY.intersection(p.parts) and p.suffix != ".pyc")
    return {path.as_posix(): path.read_bytes() for path in paths}


def differences(what: str, found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Return a line for each file that is missing, strange or other than in the working tree."""
    return [
        *(f"{what} lacks {name}" for name in sorted(wanted.keys() - found.keys())),
        *(f"{what} has {name}, which does not belong there" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{what}: {n} is not that of the working tree"
            for n in sorted(wanted)
            if found.get(n) not in (None, wanted[n])
        ),
    ]


def check_wheel(path: Path) -> list[str]:
    """Return what is wrong with a wheel: it is the package, whole, and its metadata."""
    with zipfile.ZipFile(path) as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    about = {name: data for name, data in found.items() if ".dist-info/" in name}
    code = {f"src/{name}": data for name, data in found.items() if name not in about}
    wrong = differences("the wheel", code, files_of(PACKAGE))
    kinds = {name.split(".dist-info/")[1] for name in about}
    if kinds != {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}:
        wrong.append(f"the wheel's metadata are {', '.join(sorted(kinds))}")
    metadata = email.message_from_bytes(next(data for name, data in about.items() if name.endswith("/METADATA")))
    if metadata["Version"] not in path.name:
        wrong.append(f"the wheel {path.name} says that it is version {metadata['Version']}")
    if "src/ununennium/py.typed" not in code:
        wrong.append("the wheel lacks py.typed, so that nobody's type checker believes its annotations")
    return wrong


def check_sdist(path: Path) -> list[str]:
    """Return what is wrong with an sdist: it has what building, testing and reading take."""
    root = path.name.removesuffix(".tar.gz")
    with tarfile.open(path) as sdist:
        members = [member for member in sdist.getmembers() if member.isfile()]
        found = {m.name.removeprefix(f"{root}/"): sdist.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    wanted = files_of(PACKAGE)
    for folder in BESIDE:
        wanted |= files_of(Path(folder))
    wanted |= {name: Path(name).read_bytes() for name in FILES}
    return differences("the sdist", {n: d for n, d in found.items() if n not in ("PKG-INFO", ".gitignore")}, wanted)


def main() -> None:
    """Check dist/."""
    built = sorted(path for path in Path("dist").iterdir() if path.name != ".gitignore")
    wheels, sdists = ([path for path in built if path.name.endswith(end)] for end in (".whl", ".tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1 or len(built) != 2:
        sys.exit(f"dist/ should hold one wheel and one sdist, and holds {', '.join(path.name for path in built)}")
    wrong = check_wheel(wheels[0]) + check_sdist(sdists[0])
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{wheels[0].name} and {sdists[0].name} are whole")


if __name__ == "__main__":
    main()
