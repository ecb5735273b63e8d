"""The ``ununennium`` command.

Everything heavy is imported by the command that needs it, so that help and mistakes are quick.
"""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ununennium import __version__


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Parameters
    ----------
    args : list of str, optional
        The command line, by default the process's own.

    Raises
    ------
    SystemExit
        With code 2, after a message on stderr, for a command line or data that won't do.
    """
    parser = ArgumentParser(prog="ununennium", description="Training for Earth observation.", version=__version__)
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("demo", demo_parser(), help="train, validate and map a real scene")
    parsed = parser.parse_args(args)
    options: Namespace = parsed[parsed.command]
    demo(options)


def demo_parser() -> ArgumentParser:
    """Return the parser of ``ununennium demo``."""
    parser = ArgumentParser(
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


def demo(options: Namespace) -> None:
    """Run ``ununennium demo``."""
    from ununennium.demo import DemoError, run

    try:
        run(**vars(options))
    except DemoError as error:
        print(f"ununennium demo: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
