"""A run as tables in plain files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ununennium.training.callbacks.logger import Logger, set_aside
from ununennium.training.checkpoint import whole_or_absent

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_FILES = ("steps.csv", "epochs.csv", "hyperparameters.json")


class CSVLogger(Logger):
    """Write ``steps.csv``, ``epochs.csv`` and ``hyperparameters.json``; floats with all their digits.

    The first column is ``step``, the optimizer steps made by then; the others are as `Logger` says, without ``step/``
    and ``epoch/``. Files of an earlier run in the folder are moved to ``earlier-1``, ``earlier-2`` … in it.

    Parameters
    ----------
    path : str or Path
        The folder; made if it is not there.
    every_n_steps : int, default 1
        Which optimizer steps to log.
    """

    run_id: str | None

    def __init__(self, path: str | Path, every_n_steps: int = 1) -> None:
        super().__init__(every_n_steps)
        self.path: Path = Path(path).expanduser().absolute()  # wherever the process goes meanwhile
        self._tables: dict[str, _Table] = {}

    def open(self, trainer: Trainer) -> None:
        """Make the folder; a new run's files are made with their first rows."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.run_id is None:
            for name in _FILES:
                set_aside(self.path, name)
            self.run_id = trainer.state.run
        self._tables = {kind: _Table(self.path / f"{kind}s.csv") for kind in ("step", "epoch")}

    def rewind(self, step: int) -> Mapping[str, int]:
        """Cut the files after a step."""
        for table in self._tables.values():
            table.cut(step)
        return {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row."""
        kind = next(iter(values)).partition("/")[0]
        row = {name.partition("/")[2]: value for name, value in values.items()}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        self._tables[kind].add({"step": step, **row})

    def flush(self) -> None:
        """Hand what was written to the system."""
        for table in self._tables.values():
            table.flush()

    def close(self, finished: bool) -> None:
        """Close the files."""
        for table in self._tables.values():
            table.close()

    def write_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Write them as JSON."""
        text = json.dumps(values, indent=2, ensure_ascii=False, default=str)
        with whole_or_absent(self.path / "hyperparameters.json") as aside:
            aside.write_text(text + "\n", encoding="utf-8")


class _Table:
    """A CSV file whose rows come in the order of their steps, and may get new columns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._columns: list[str] = []
        self._text = io.StringIO()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])

    def add(self, row: Mapping[str, float]) -> None:
        if self._file is None or not row.keys() <= set(self._columns):
            self._open(row)
        writer = csv.writer(self._text, lineterminator="\n")
        writer.writerow([row.get(name, "") for name in self._columns])

    def flush(self) -> None:
        if self._file is not None:
            self._file.write(self._text.getvalue())
            self._file.flush()
            self._text = io.StringIO()

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def cut(self, step: int) -> None:
        """Leave the whole rows up to a step."""
        if not self._path.exists():
            return
        with self._path.open("rb+") as file:
            file.readline()
            end = file.tell()
            for line in file:
                number = line.partition(b",")[0]
                if not line.endswith(b"\n") or int(number) > step:
                    break
                end += len(line)
            file.truncate(end)

    def _open(self, row: Mapping[str, float]) -> None:
        """Open the file; with new columns, write it anew first."""
        self.close()
        new = [name for name in row if name not in self._columns]
        if new:
            rows: list[dict[str, str]] = []
            if self._path.exists():
                with self._path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            self._columns += new
            with (
                whole_or_absent(self._path) as aside,
                aside.open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        self._file = self._path.open("a", newline="", encoding="utf-8")
