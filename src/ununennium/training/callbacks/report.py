"""A page about the run, in one file."""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ununennium import __version__
from ununennium.metrics.classification import class_figures
from ununennium.palette import palette
from ununennium.training.callbacks._picture import look_up
from ununennium.training.callbacks.base import Callback
from ununennium.training.callbacks.checkpoint import CheckpointCallback
from ununennium.training.callbacks.monitor import Mode, best_epoch, check_mode, resolve_mode
from ununennium.training.callbacks.preview import PreviewCallback
from ununennium.training.checkpoint import whole_or_absent
from ununennium.training.errors import Preempted

if TYPE_CHECKING:
    from ununennium.training.trainer import Trainer

_MOST_CLASSES = 256  # of which a matrix is remembered, and so is in every checkpoint
_UNKNOWN = "\N{EN DASH}"
_PACKAGES = ("torch", "numpy", "segmentation-models-pytorch", "timm", "rasterio", "torchgeo", "torchmetrics")


class ReportCallback(Callback):
    """Write a page about the run: one HTML file that asks no network and runs no script.

    It holds configuration and hyperparameters, versions, where the run is, learning curves, the figures of each class
    and the confusion matrix of the best epoch, the newest previews of a `PreviewCallback`, what each epoch's time went
    into, and how to go on and how to predict. It is written anew, whole or not at all, when training starts, after
    every epoch, and when it ends, by an error or Ctrl-C too. ``curves.png`` and ``confusion.png`` lie beside it.

    Put it behind the callbacks that add to the logs, and behind the `PreviewCallback`.

    Parameters
    ----------
    path : str or Path
        The file, such as "runs/latest/report.html".
    monitor : str, optional
        The figure that says which epoch is the best; by default that of the `CheckpointCallback`, or else ``val_iou``,
        ``val_loss`` or ``train_loss``, whichever there is first.
    mode : {"auto", "min", "max"}, default "auto"
        Whether less or more of it is better.
    resume_command : str, optional
        The command line that made the run and goes on with it; by default the page names ``fit(resume="auto")``.
    pictures : bool, default True
        Keep the curves and the confusion matrix as files as well.
    """

    looks_on: ClassVar[bool] = True

    def __init__(
        self,
        path: str | Path,
        *,
        monitor: str | None = None,
        mode: Mode = "auto",
        resume_command: str | None = None,
        pictures: bool = True,
    ) -> None:
        check_mode(mode)
        self.path: Path = Path(path).expanduser().absolute()
        self.monitor = monitor
        self.mode = mode
        self.resume_command = resume_command
        self.pictures = pictures
        self._epochs: dict[int, dict[str, float]] = {}  # what the time of each went into
        self._classes: dict[str, Any] | None = None  # epoch, counts and figures of the best
        self._drawn: tuple[int, bytes] | None = None  # that matrix, as PNG
        self._started = 0.0
        self._earlier: BaseException | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Write the page without figures: what can't be written to should show before hours are spent."""
        self._earlier = sys.exception()  # of a fit that is called while another error is handled
        self._forget_from(trainer.state.epoch)
        self._started = time.perf_counter()
        self._write(trainer, "running")

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Look at the clock."""
        self._forget_from(epoch)
        self._started = time.perf_counter()

    def on_epoch_end(self, trainer: Trainer, epoch: int, logs: dict[str, float]) -> None:
        """Take in the epoch and write the page."""
        speed, state = trainer.speed, trainer.state
        self._epochs[epoch] = {
            "seconds": time.perf_counter() - self._started,
            "training": math.nan if speed is None else speed.seconds,
            "waiting": math.nan if speed is None else speed.waiting,
            "chips": 0 if speed is None else speed.chips,
            "lr": float(trainer.optimizer.param_groups[0]["lr"]),
            "skipped": state.skipped_steps,
            "nonfinite": state.nonfinite_steps,
        }
        metrics = trainer.train_metrics if trainer.val_loader is None else trainer.val_metrics
        confusion = metrics.confusion
        if confusion is not None and confusion.num_classes <= _MOST_CLASSES:
            best = self._best(trainer)
            if self._classes is None or best is None or best[1] == epoch:
                figures = {name: values.numpy() for name, values in class_figures(confusion).items()}
                self._classes = {"epoch": epoch, "counts": confusion.compute().numpy(), "figures": figures}
        self._write(trainer, "running")

    def on_train_end(self, trainer: Trainer) -> None:
        """Write how it ended."""
        error = sys.exception()
        if error is self._earlier:
            done = trainer.state.epoch >= trainer.epochs
            self._write(trainer, "finished" if done else "stopped early, as a callback asked")
        elif isinstance(error, KeyboardInterrupt):
            self._write(trainer, "interrupted by Ctrl-C", failed=True)
        elif isinstance(error, Preempted):
            self._write(trainer, "left after a signal to end", failed=True)
        else:
            self._write(trainer, f"ended by {type(error).__name__}: {error}", failed=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what each epoch's time went into, and the classes' figures in the best one."""
        return {"epochs": {epoch: dict(parts) for epoch, parts in self._epochs.items()}, "classes": self._classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._epochs = {int(epoch): dict(parts) for epoch, parts in state["epochs"].items()}
        self._classes = None if state["classes"] is None else dict(state["classes"])
        self._drawn = None

    def _forget_from(self, epoch: int) -> None:
        """Drop what is known of an epoch that is run anew, and of later ones."""
        self._epochs = {number: parts for number, parts in self._epochs.items() if number < epoch}
        if self._classes is not None and self._classes["epoch"] >= epoch:
            self._classes = self._drawn = None

    def _best(self, trainer: Trainer) -> tuple[str, int, float] | None:
        """Return the figure that decides, and the number and value of the epoch that is the best by it."""
        records = trainer.state.records
        name, mode = self.monitor, self.mode
        if name is None:
            savers = [c for c in trainer.callbacks.callbacks if isinstance(c, CheckpointCallback)]
            known = [n for n in ("val_iou", "val_loss", "train_loss") if any(n in logs for _, logs in records)]
            name, mode = (savers[0].monitor, savers[0].mode) if savers else (next(iter(known), "val_loss"), mode)
        best = best_epoch(records, name, resolve_mode(mode, name, trainer))
        return None if best is None else (name, *best)

    def _write(self, trainer: Trainer, status: str, failed: bool = False) -> None:
        if trainer.rank:
            return
        text = _template().render(self._page(trainer, status, failed))
        with whole_or_absent(self.path) as aside:
            aside.write_text(text, encoding="utf-8")

    def _page(self, trainer: Trainer, status: str, failed: bool) -> dict[str, Any]:
        from ununennium import plots

        best, records, state = self._best(trainer), trainer.state.records, trainer.state
        numbers = [epoch + 1 for epoch, _ in records]
        curves = None
        if any(plots.curve_names(logs) for _, logs in records):
            mark = None if best is None else best[1] + 1
            curves = self._picture("curves.png", plots.png(plots.draw_curves(trainer.history, numbers, mark)))
        preview = next((c for c in trainer.callbacks.callbacks if isinstance(c, PreviewCallback)), None)
        classes = self._class_table(trainer)
        last = self._epochs[max(self._epochs)] if self._epochs else None
        return {
            "title": self.path.parent.name,
            "status": status,
            "state": "failed" if failed else "running" if status == "running" else "done",
            "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "tiles": _tiles(trainer, best, last),
            "curves": curves,
            "classes": classes,
            "confusion": None if classes is None else self._confusion(classes["names"]),
            "previews": _previews(preview, best),
            "no_previews": None if preview is None else preview.skipped,
            "epochs": _epoch_rows(records, self._epochs, best),
            "figures": list(dict.fromkeys(name for _, logs in records for name in logs if "/" not in name)),
            "skipped": (state.skipped_steps, state.nonfinite_steps),
            "settings": _flat({k: v for k, v in trainer.hyperparameters.items() if k != "config"}),
            "config": None if trainer.config is None else _pretty(trainer.config),
            "versions": _versions(trainer),
            "resume": self._resume(trainer),
            "predict": _predict(trainer, preview),
        }

    def _picture(self, name: str, data: bytes) -> str:
        if self.pictures:
            with whole_or_absent(self.path.parent / name) as aside:
                aside.write_bytes(data)
        return _embedded(data)

    def _class_table(self, trainer: Trainer) -> dict[str, Any] | None:
        """Return the figures of each class in the best epoch."""
        if self._classes is None:
            return None
        from ununennium.plots import title_of

        counts, figures = self._classes["counts"], dict(self._classes["figures"])
        support = figures.pop("support")
        names, colors = look_up("class_names", trainer), look_up("colors", trainer)
        if names is None or len(names) != len(counts):
            names = [f"class {number}" for number in range(len(counts))]
        if colors is None or len(colors) != len(counts):
            colors = palette(len(counts))
        rows = [
            {
                "name": name,
                "color": color,
                "figures": [float(values[number]) for values in figures.values()],
                "support": int(support[number]),
                "predicted": int(counts[:, number].sum()),
            }
            for number, (name, color) in enumerate(zip(names, colors, strict=True))
        ]
        known = [values[~np.isnan(values)] for values in figures.values()]
        total = int(support.sum())
        return {
            "epoch": self._classes["epoch"] + 1,
            "part": "training" if trainer.val_loader is None else "validation",
            "names": list(names),
            "heads": [title_of(name) for name in figures],
            "rows": rows,
            "means": [float(values.mean()) if len(values) else math.nan for values in known],
            "accuracy": float(counts.trace() / total) if total else math.nan,
            "total": total,
        }

    def _confusion(self, names: Sequence[str]) -> str:
        from ununennium import plots

        assert self._classes is not None
        epoch, counts = self._classes["epoch"], self._classes["counts"]
        if self._drawn is None or self._drawn[0] != epoch:  # of many classes it takes a second
            self._drawn = epoch, plots.png(plots.draw_confusion(counts, names))
        return self._picture("confusion.png", self._drawn[1])

    def _resume(self, trainer: Trainer) -> dict[str, str]:
        if self.resume_command is not None:
            about = "The same command, in the same folder, goes on from the last checkpoint."
            return {"text": about, "code": self.resume_command}
        if any(isinstance(c, CheckpointCallback) for c in trainer.callbacks.callbacks):
            about = (
                "In the script that made the run; it goes on from the newest checkpoint, or starts anew without one."
            )
            return {"text": about, "code": f'trainer.fit({trainer.epochs}, resume="auto")'}
        return {"text": "The run keeps no checkpoints: give the Trainer a CheckpointCallback, to go on after an end."}


def _template() -> Any:
    import jinja2  # a requirement of PyTorch

    text = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": _figure, "seconds": _seconds}
    return environment.from_string(text)


def _tiles(trainer: Trainer, best: tuple[str, int, float] | None, last: Mapping[str, float] | None) -> list[Any]:
    state = trainer.state
    tiles = [("Epochs", f"{state.epoch} of {trainer.epochs}", "finished")]
    if best is not None:
        tiles.insert(0, (f"Best {best[0]}", _figure(best[2]), f"epoch {best[1] + 1}"))
    tiles.append(("Optimizer steps", f"{state.optimizer_steps:,}", _skipped(state)))
    if last is not None and last["training"] > 0:
        tiles.append(("Chips per second", f"{last['chips'] / last['training']:,.1f}", "last epoch's training"))
        tiles.append(("Data wait", f"{last['waiting'] / last['training']:.0%}", "last epoch's training"))
    return tiles


def _skipped(state: Any) -> str:
    parts = [f"{state.skipped_steps:,} skipped by the loss scaler"] if state.skipped_steps else []
    parts += [f"{state.nonfinite_steps:,} left out as not finite"] if state.nonfinite_steps else []
    return ", ".join(parts) or "none left out"


def _epoch_rows(
    records: Sequence[tuple[int, Mapping[str, float]]],
    parts: Mapping[int, Mapping[str, float]],
    best: tuple[str, int, float] | None,
) -> list[dict[str, Any]]:
    """Return a row for each finished epoch; the bars of time are in percent of the longest epoch."""
    longest = max((known["seconds"] for known in parts.values()), default=0.0) or 1.0
    rows: list[dict[str, Any]] = []
    before = {"skipped": 0.0, "nonfinite": 0.0}
    for epoch, logs in records:
        known = parts.get(epoch)
        row: dict[str, Any] = {"number": epoch + 1, "logs": logs, "best": best is not None and best[1] == epoch}
        if known is not None:
            training, waiting = (0.0 if math.isnan(known[k]) else known[k] for k in ("training", "waiting"))
            training = min(training, known["seconds"])
            waiting = min(waiting, training)
            split = {"computing": training - waiting, "waiting": waiting, "rest": known["seconds"] - training}
            row |= known
            row["split"] = split
            row["bars"] = {name: round(100 * seconds / longest, 2) for name, seconds in split.items()}
            row["rate"] = known["chips"] / training if training else math.nan
            row["left_out"] = int(sum(known[name] - before[name] for name in before))
            before = {name: known[name] for name in before}
        rows.append(row)
    return rows


def _previews(preview: PreviewCallback | None, best: tuple[str, int, float] | None) -> list[tuple[str, str]]:
    """Return the newest picture and that of the best epoch, if there is one."""
    if preview is None or preview.latest is None:
        return []
    finished, data = preview.latest
    found = [(f"After epoch {finished}", _embedded(data))]
    if best is not None and best[1] + 1 != finished:
        path = preview.path / f"preview-epoch-{best[1] + 1:04}.png"
        if path.exists():
            found.append((f"After epoch {best[1] + 1}, the best", _embedded(path.read_bytes())))
    return found


def _predict(trainer: Trainer, preview: PreviewCallback | None) -> dict[str, str]:
    """Return how to predict with the best checkpoint, of what the command can make anew by itself."""
    folder = next((c.path for c in trainer.callbacks.callbacks if isinstance(c, CheckpointCallback)), None)
    if folder is None:
        return {"text": "Without checkpoints the weights are those of the model in the process that trained it."}
    config = getattr(trainer.model, "model_config", None)
    best = folder / "best"
    if preview is not None and preview.per_pixel is False:
        code = f"model = load_model({str(best)!r}{'' if _is_made_anew(config) else ', network'})"
        about = "The model says one thing of a whole image: no map is made of it. In Python, for images (B, C, H, W):"
        return {"text": about, "code": f"from ununennium.prediction import load_model\n\n{code}"}
    if _is_made_anew(config):
        about = "Maps a whole scene, whose bands are those of the training, with the best epoch's weights."
        return {"text": about, "code": f"ununennium predict {shlex.quote(str(best))} scene.tif map.tif"}
    about = "The model is none of create_model's, so that it has to be made by your code:"
    lines = [
        "from ununennium.prediction import load_model, predict_scene",
        "",
        "network = …  # made as for the training",
        f'predict_scene(load_model({str(best)!r}, network), "scene.tif", "map.tif")',
    ]
    return {"text": about, "code": "\n".join(lines)}


def _is_made_anew(config: Mapping[str, Any] | None) -> bool:
    """Tell whether a checkpoint says how its model is made."""
    return config is not None and config.get("network", config) is not None


def _versions(trainer: Trainer) -> dict[str, str]:
    device = str(trainer.device)
    if trainer.device.type == "cuda":
        device = f"{device}, {torch.cuda.get_device_name(trainer.device)} (CUDA {torch.version.cuda})"
    elif trainer.device.type == "cpu":
        device = f"cpu, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = {"device": device, "ununennium": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__, "system": platform.platform(terse=True)}


def _flat(values: Mapping[str, Any], at: str = "") -> list[tuple[str, str]]:
    """Return nested settings as names and texts."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{at}{name}.")
        elif isinstance(value, (list, tuple)):
            rows.append((f"{at}{name}", ", ".join(map(str, value)) or "none"))
        else:
            rows.append(
                (f"{at}{name}", "none" if value is None else f"{value:,}" if type(value) is int else str(value))
            )
    return rows


def _pretty(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False, default=str)


def _embedded(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _figure(value: Any) -> str:
    if value is None or math.isnan(value):
        return _UNKNOWN
    return f"{value:.4f}" if math.isinf(value) or value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def _seconds(value: float) -> str:
    if value < 120:
        text = f"{value:.1f} s"
    elif value < 3600:
        text = f"{value / 60:.1f} min"
    else:
        text = f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
