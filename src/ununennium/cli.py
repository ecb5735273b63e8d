"""The ``ununennium`` command.

Everything heavy is imported by the command that needs it, so that help and mistakes are quick.
"""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ununennium import __version__
from ununennium._options import Parser, PartHelp, explained, replacing

_CROSS_ENTROPY = {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"ignore_index": 255}}
_ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
_OURS = {  # arguments of the Trainer that a configuration has in other places
    "model", "optimizer", "loss_fn", "train_loader", "val_loader", "callbacks", "metrics", "config", "distributed",
    "train_transform", "val_transform", "seed",
}  # fmt: skip


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Parameters
    ----------
    args : list of str, optional
        The command line, by default the process's own.

    Raises
    ------
    SystemExit
        With code 2, after a message on stderr, for a command line, a configuration or data that won't do; with code 1
        for a run that could not go on.
    """
    args = replacing(sys.argv[1:] if args is None else args)
    parser = Parser(prog="ununennium", description="Training for Earth observation.", version=__version__)
    parser.command = next(iter(args), None)
    commands = parser.add_subcommands(dest="command")
    made: dict[str, ArgumentParser] = {}
    for name, (make, _, text) in _COMMANDS.items():  # the asked one alone: the others' options take seconds to import
        made[name] = make() if name in args[:1] else Parser()
        commands.add_subcommand(name, made[name], help=text)
    parsed = parser.parse_args(args)
    _COMMANDS[parsed.command][1](made[parsed.command], parsed[parsed.command])


def fit_parser() -> ArgumentParser:
    """Return the parser of ``ununennium fit``, whose options are those of a configuration file."""
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from ununennium.metrics import Metric
    from ununennium.runs import ChipSettings, DataModule, ModelSettings, Schedule
    from ununennium.training import Callback, CheckpointCallback, EarlyStoppingCallback, PreviewCallback, Trainer

    parser = Parser(
        usage="ununennium fit --config FILE [options]",
        description="Train a model. Options come from a configuration file and from the command line, which wins. A "
        "run that was interrupted goes on when it is started anew with the same output folder.",
    )
    add = parser.add_argument
    add("--config", action="config", help="a YAML file with these options")
    add("--output", type=str, default="runs/latest", metavar="FOLDER", help="where everything is written")
    add("--seed", type=NonNegativeInt, default=0, metavar="N", help="of weights, order and augmentation")
    add("--data", type=ChipSettings | None, default=None, help="chips of scenes")
    add("--datamodule", type=DataModule | None, default=None, help="loaders of your own, instead of data")
    add("--model", type=ModelSettings, default=ModelSettings(), help="a model for create_model")
    add("--network", type=nn.Module | None, default=None, help="a network of your own, instead of model")
    add("--loss", type=nn.Module, default=_CROSS_ENTROPY, help="what is minimised")
    add("--optimizer", type=Callable[[Iterable[Any]], Optimizer], default=_ADAMW)
    add("--schedule", type=Schedule, default="cosine", help="of the learning rate over the run, each step")
    add("--scheduler", type=Callable[[Optimizer], LRScheduler] | None, default=None, help="instead of schedule")
    add("--step_on", type=Literal["epoch", "batch"], default="epoch", help="when the scheduler steps")
    add("--metrics", type=list[Metric] | dict[str, Metric] | None, default=None, help="by default IoU and Dice")
    parser.add_class_arguments(Trainer, "trainer", skip=_OURS, instantiate=False)
    add("--trainer.epochs", type=PositiveInt, default=20, metavar="N", help="number of epochs")
    add("--trainer.distributed", type=bool | Literal["auto", "fsdp"], default="auto", help="auto: under torchrun")
    add("--callbacks", type=list[Callback] | None, default=None, help="further callbacks")
    parser.add_class_arguments(CheckpointCallback, "checkpoint", skip={"path"}, instantiate=False)
    add("--early_stopping", type=bool | None, default=None, help="end when the figure of early_stop gets no better")
    parser.add_class_arguments(EarlyStoppingCallback, "early_stop", instantiate=False)
    add("--report", type=bool, default=True, help="write report.html, curves, confusion matrix and previews")
    parser.add_class_arguments(PreviewCallback, "preview", skip={"path"}, instantiate=False)
    parser.set_defaults({"checkpoint.monitor": "val_iou", "early_stop.monitor": "val_iou"})
    for part in ("model", "trainer", "checkpoint", "early_stop", "preview"):
        add(f"--{part}.help", action=PartHelp, help=f"all that there is to say of {part}")
    return parser


def fit(parser: ArgumentParser, options: Namespace) -> None:
    """Run ``ununennium fit``."""
    with _errors("fit", 2):
        run = _build(parser, options, trains=True)
    if run.trainer.rank == 0 and getattr(run.data, "split", None) is not None:
        print(run.data.split)
    with _errors("fit", 1):
        try:
            run.trainer.fit(options.trainer.epochs, resume="auto")
        except KeyboardInterrupt:
            if run.trainer.rank == 0:
                saved = " from the last checkpoint" if (run.folder / "checkpoints" / "last").exists() else ""
                print(f"interrupted; the same command goes on{saved}", file=sys.stderr)
            raise SystemExit(130) from None
    if run.trainer.rank == 0:
        best = run.folder / "checkpoints" / "best"
        print(f"to map a scene: ununennium predict {best} SCENE.tif MAP.tif")
        if options.report:
            print(f"the run on one page: {run.folder / 'report.html'}")


def validate_parser() -> ArgumentParser:
    """Return the parser of ``ununennium validate``."""
    parser = fit_parser()
    parser.usage = "ununennium validate --config FILE [options]"
    parser.description = "Compute a checkpoint's validation figures, with the configuration of its run."
    parser.add_argument("--weights", type=str | None, metavar="CHECKPOINT", help="by default the run's best")
    parser.add_argument("--json", type=str | None, metavar="FILE", help="write the figures to a file, too")
    return parser


def validate(parser: ArgumentParser, options: Namespace) -> None:
    """Run ``ununennium validate``."""
    options = options.clone()
    weights, file = options.pop("weights"), options.pop("json")
    with _errors("validate", 2):
        run = _build(parser, options, trains=False)
        run.trainer.load_weights(weights or run.folder / "checkpoints" / "best")
    with _errors("validate", 1):
        figures = run.trainer.validate()
        of_classes = _class_figures(run)
    if run.trainer.rank == 0:
        print("\n".join(f"{name} {figure:.6g}" for name, figure in figures.items()))
        if of_classes:
            print(f"\n{_table(of_classes)}")
        if file is not None:
            with _errors("validate", 2):
                _write_json(file, {"figures": figures, "classes": of_classes})


def _class_figures(run: Any) -> dict[str, dict[str, float]]:
    """Return figures and support of each class by its name, where a metric has counted classes."""
    from ununennium.metrics.classification import class_figures

    metrics = run.trainer.val_metrics
    if metrics.confusion is None:
        return {}
    names = metrics.class_names or getattr(run.trainer.model, "class_names", None)
    columns = {name: values.tolist() for name, values in class_figures(metrics.confusion).items()}
    rows = zip(*columns.values(), strict=True)
    return {str(names[c]) if names else str(c): dict(zip(columns, row, strict=True)) for c, row in enumerate(rows)}


def _table(rows: dict[str, dict[str, float]]) -> str:
    wide = max(map(len, ["class", *rows]))
    lines = ["class".ljust(wide) + "".join(f"{name:>12}" for name in next(iter(rows.values())))]
    for name, row in rows.items():
        cells = (f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in row.values())
        lines.append(name.ljust(wide) + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _write_json(file: str, figures: Any) -> None:
    """Write figures as JSON, which knows no NaN: null."""
    import json
    import math
    from pathlib import Path

    from ununennium.training.checkpoint import whole_or_absent

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with whole_or_absent(Path(file).expanduser()) as aside:
        aside.write_text(json.dumps(plain(figures), indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")


def predict_parser() -> ArgumentParser:
    """Return the parser of ``ununennium predict``."""
    from ununennium.prediction import predict_scene

    parser = Parser(description="Map a whole scene with the model of a checkpoint.")
    parser.add_argument("checkpoint", type=str, help="such as runs/latest/checkpoints/best")
    parser.add_argument("source", type=str, help="the scene: a raster, or several, separated by commas")
    parser.add_argument("destination", type=str, help="the map, a GeoTIFF to be written")
    parser.add_function_arguments(predict_scene, skip={"model", "source", "destination"})
    return parser


def predict(parser: ArgumentParser, options: Namespace) -> None:
    """Run ``ununennium predict``."""
    from ununennium.prediction import predict_scene

    chosen = {name: value for name, value in vars(options).items() if name not in ("checkpoint", "source")}
    sources = options.source.split(",")
    with _errors("predict", 2):
        written = predict_scene(options.checkpoint, sources[0] if len(sources) == 1 else sources, **chosen)
    print(f"written: {written}")


def export_parser() -> ArgumentParser:
    """Return the parser of ``ununennium export``."""
    parser = Parser(
        description="Write the model of a checkpoint: its weights (.safetensors), a program for PyTorch (.pt2), or "
        "ONNX (.onnx). Programs take the raster's own values and are compared with the model."
    )
    parser.add_argument("checkpoint", type=str, help="such as runs/latest/checkpoints/best")
    parser.add_argument("destination", type=str, help="the file to be written; its ending says what")
    parser.add_argument("--size", type=PositiveInt, default=256, metavar="PIXELS", help="side of a program's input")
    parser.add_argument("--averaged", type=bool | None, help="whether to take averaged weights, or the raw ones")
    return parser


def export(parser: ArgumentParser, options: Namespace) -> None:
    """Run ``ununennium export``."""
    from ununennium.export import export_model

    with _errors("export", 2):
        report = export_model(options.checkpoint, options.destination, size=options.size, averaged=options.averaged)
    print(report)


def _build(parser: ArgumentParser, options: Namespace, trains: bool) -> Any:
    import torch
    import yaml

    from ununennium.runs import build

    options = options.clone()
    options.pop("config", None)
    _check_early_stop(parser, options)
    config = yaml.safe_load(parser.dump(options))
    torch.manual_seed(options.seed)  # a network of one's own is made here
    return build(parser.instantiate(options), config, trains=trains)


def _check_early_stop(parser: ArgumentParser, options: Namespace) -> None:
    """Raise for options of early stopping where nobody said whether there is any; false leaves them for later."""
    settings = {f"early_stop.{name}": value for name, value in vars(options.early_stop).items()}
    given = [f"{name}={value!r}" for name, value in settings.items() if value != parser.get_default(name)]
    if given and options.early_stopping is None:
        raise ValueError(f"{' and '.join(given)} without early_stopping: set it to true, or leave these options out")
    options.early_stopping = bool(options.early_stopping)


@contextmanager
def _errors(command: str, code: int) -> Iterator[None]:
    """Turn what a user can put right into a message; what nobody foresaw keeps its traceback."""
    from ununennium.training import errors

    own = (errors.BatchError, errors.CheckpointError, errors.DataOrderError, errors.NonFiniteError, errors.ProcessError)
    try:
        yield
    except (*own, ValueError, TypeError, OSError, ImportError) as error:
        if code == 1 and not isinstance(error, own) and not _is_of_this_package(error):
            raise
        notes = [*getattr(error, "__notes__", ())]
        if command == "fit" and isinstance(error, errors.CheckpointError):
            notes.append("To begin another run from its weights: another output, and model.weights=CHECKPOINT.")
        text = explained(str(error)) if "\n" in str(error) else None  # of what the parser instantiates
        print("\n".join([f"ununennium {command}: error: {text or error}", *notes]), file=sys.stderr)
        raise SystemExit(code) from error


def _is_of_this_package(error: BaseException) -> bool:
    """Tell whether an error was raised on purpose here, and not in what a user brought or in a library."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).startswith("ununennium.")


def demo_parser() -> ArgumentParser:
    """Return the parser of ``ununennium demo``."""
    parser = Parser(
        description="Train on a scene, validate on blocks that the training never saw, and map the whole. Without "
        "--image and --label the scene is Indian Pines: AVIRIS, 145 x 145 pixels, 200 bands, 16 classes."
    )
    add = parser.add_argument
    add("--image", type=str | None, metavar="TIF", help="your image")
    add("--label", type=str | None, metavar="TIF", help="its labels: integer classes on the same grid")
    add("--output", type=str, default="runs/demo", metavar="FOLDER", help="where everything is written")
    add("--classes", type=str | None, metavar="NAMES", help="class names: a,b,c or a JSON file")
    add("--ignore-index", type=int, default=255, metavar="VALUE", help="label value without a class")
    add("--block", type=PositiveInt | None, metavar="PIXELS", help="side of the held-out blocks")
    add("--model", type=str, default="unet_resnet18", metavar="NAME", help="a model for create_model")
    add("--epochs", type=PositiveInt, default=15, metavar="N", help="number of epochs")
    add("--batches", type=PositiveInt, default=16, metavar="N", help="batches an epoch")
    add("--seed", type=NonNegativeInt, default=0, metavar="N", help="of weights, order and augmentation")
    return parser


def demo(parser: ArgumentParser, options: Namespace) -> None:
    """Run ``ununennium demo``."""
    from ununennium.demo import DemoError, run

    try:
        run(**vars(options))
    except DemoError as error:
        print(f"ununennium demo: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


_Command = tuple[Callable[[], ArgumentParser], Callable[[ArgumentParser, Namespace], None], str]
_COMMANDS: dict[str, _Command] = {
    "fit": (fit_parser, fit, "train a model on your scenes, as a configuration says"),
    "validate": (validate_parser, validate, "compute a checkpoint's validation figures"),
    "predict": (predict_parser, predict, "map a whole scene"),
    "export": (export_parser, export, "write a checkpoint's model for use elsewhere"),
    "demo": (demo_parser, demo, "train, validate and map a real scene"),
}
