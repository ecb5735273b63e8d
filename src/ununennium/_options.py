"""Help of a command that fits a few screens, and a mistake in its options told in a line.

jsonargparse finds what is wrong and says it in terms of types, over a dozen lines. What is read here out of them is the
key, what was given, and which of the things that could stand there is the nearest; a message that is not understood is
shown as it is.
"""

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Given value type:")
_KINDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "NoneType": "null",
    "list": "a list", "Sequence": "a list", "dict": "a mapping", "Mapping": "a mapping",
    "PositiveInt": "a whole number above 0", "NonNegativeInt": "a whole number of at least 0",
}  # fmt: skip
_HOMES = {  # where the classes are that an option mostly takes
    "network": ("segmentation_models_pytorch",),
    "loss": ("ununennium.losses", "torch.nn"),
    "optimizer": ("torch.optim",),
    "scheduler": ("torch.optim.lr_scheduler",),
    "metrics": ("ununennium.metrics",),
    "callbacks": ("ununennium.training",),
}
_LISTS = ("callbacks", "metrics", "data.scenes", "data.val_scenes")


class Parser(ArgumentParser):
    """A parser with short help and short messages.

    Attributes
    ----------
    command : str or None
        The subcommand that is asked for.
    """

    command: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs = {"formatter_class": _Brief, "allow_abbrev": False, **kwargs}
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with code 2 after a message of one line, if the mistake is understood."""
        parser = getattr(ex, "subcommand_parser", None) or self
        if self.command is not None and self._subcommands_action is not None:
            parser = self._subcommands_action.choices.get(self.command, parser)
        told = explained(message, [name for action in parser._actions for name in action.option_strings])
        if told is None or not self.exit_on_error:
            super().error(message, ex)
        print(f"{parser.prog.replace(' [options]', '')}: error: {told}", file=sys.stderr)
        sys.exit(2)


def replacing(args: Sequence[str]) -> list[str]:
    """Return a command line whose lists take the place of a configuration's.

    Else the parser lets the entries of a list of the same length inherit what the command line does not say of them:
    another scene would be given the label of the one it replaces.
    """
    found: list[str] = []
    for arg in args:
        option = arg.partition("=")[0]
        if option.removeprefix("--") in _LISTS and arg.startswith("--"):
            found += [f"{option}=[]"]
        found.append(arg)
    return found


class PartHelp(argparse._HelpAction):
    """Show the options of a part, with all that there is to say of them."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Print and exit."""
        part = str(option_string).removesuffix("help")
        for group in parser._action_groups:
            own = [action for action in group._group_actions if any(o.startswith(part) for o in action.option_strings)]
            group._group_actions[:] = [action for action in own if not isinstance(action, argparse._HelpAction)]
        parser.description = None
        parser.formatter_class = DefaultHelpFormatter
        super().__call__(parser, namespace, values, option_string)


class _Brief(DefaultHelpFormatter):
    """Help with the first sentence of each option, and without the classes that could stand there."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 30, **kwargs})  # type: ignore[no-untyped-call]

    def _get_help_string(self, action: argparse.Action) -> str:
        if getattr(action, "_jsonargparse_preexpanded_help", False):  # one without a text, the second time
            return action.help or ""
        if action.dest.endswith(".help"):
            return "show the options of one" if action.nargs != 0 else "show its options"
        text = re.split(r"(?<=[^.])\.(?:\s|$)|; (?=[a-z])", action.help or "", maxsplit=1)[0].replace("``", "")
        if isinstance(action, argparse._HelpAction) or action.default in (None, argparse.SUPPRESS):
            return text
        default = "%(default)s"
        if isinstance(action.default, (dict, Namespace)) and "class_path" in action.default:
            default = str(action.default["class_path"])
        elif isinstance(action.default, bool):
            default = str(action.default).lower()
        return f"{text} (default: {default})" if text else f"default: {default}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = (self._get_type_str(action) or "").removesuffix(" | null")
        kind = re.sub(r"^Optional\[(.*)\]$", r"\1", kind)
        simple = {"int": "N", "PositiveInt": "N", "NonNegativeInt": "N", "float": "NUMBER", "bool": "{true,false}"}
        if kind.startswith(("list", "Sequence")):
            return "LIST"
        return simple.get(kind, super()._get_default_metavar_for_optional(action))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = super()._format_action_invocation(action)
        return shown.partition(", ")[0] if "+ " in shown else shown  # --x+, which appends


@dataclass
class _Complaint:
    text: str
    keys: tuple[str, ...]
    classes: tuple[str, ...]
    indent: int
    value: str | None = None


def explained(message: str, options: Iterable[str] = ()) -> str | None:
    """Return a mistake in one line: the key, the value and the remedy; None if it is not understood.

    Parameters
    ----------
    message : str
        jsonargparse's.
    options : iterable of str
        The command's.
    """
    options = list(options)
    complaints = _complaints(message)
    if not complaints:
        return None
    telling = [each for each in complaints if "NoneType" not in each.text] or complaints
    deepest = max((len(each.keys), len(each.classes)) for each in telling)
    telling = [each for each in telling if (len(each.keys), len(each.classes)) == deepest]
    first = next((each for each in telling if not re.match(r"Expected a (<class|typing|\w+\[)", each.text)), None)
    if first is not None:
        return _one(first, options)
    kinds = dict.fromkeys(
        _kind(each.text.partition(". Got value: ")[0].removeprefix("Expected a ")) for each in telling
    )
    *_, value = (each.text.partition(". Got value: ")[2] or each.value or "" for each in telling)
    key, value = ".".join(telling[0].keys), _short(value)
    remedy = f": write [{value}]" if "a list" in kinds and re.fullmatch(r"[\w.:/-]+", value) else ""
    return f"{key} must be {' or '.join(kinds)}, got {value}{remedy}"


def _complaints(message: str) -> list[_Complaint]:
    """Return what is complained of, each with the keys and classes inside which."""
    found: list[_Complaint] = []
    around: list[tuple[int, str, str]] = []
    for line in message.splitlines():
        bare = line.strip()
        text = bare.removeprefix("- ")
        indent = len(line) - len(line.lstrip()) + len(bare) - len(text)
        if text.startswith("Given value: "):
            for each in found:
                if each.value is None and each.indent >= indent:
                    each.value = text.removeprefix("Given value: ")
            continue
        if not text or text.startswith(_NOISE):
            continue
        while around and around[-1][0] >= indent:
            around.pop()
        if match := re.match(r'(?:Parser key|Key) "([^"]+)"(?: element \d+)?:\s*(.*)', text):
            around.append((indent, "key", match[1]))
            text, indent = match[2], indent + 1
        elif match := re.match(r"Problem with given class_path '([^']+)':\s*(.*)", text):
            around.append((indent, "class", match[1]))
            text, indent = match[2], indent + 1
        if text:
            keys, classes = (tuple(name for _, what, name in around if what == kind) for kind in ("key", "class"))
            found.append(_Complaint(text, keys, classes, indent))
    return found


def _one(complaint: _Complaint, options: list[str]) -> str | None:
    """Return one complaint in plain words; None if it is none that is understood and names no key."""
    text, at = complaint.text, ".".join(complaint.keys)
    owner = complaint.classes[-1] if complaint.classes else ""
    if match := re.match(r"Type .* callable class: (.*?)\. Got value: (.*)", text):
        made = re.search(r"class_path='([^']+)'", match[2])
        text, owner = match[1], made[1] if made else match[2]
    if match := re.match(r"unrecognized arguments: (--[^\s=]+)", text):
        return f"{match[1]} is no option{_nearest(match[1], options, 'see --help')}"
    if match := re.match(r"(?:Option|Group '([^']+)'|Subcommand '[^']+') (?:does not accept option )?'([^']+)'", text):
        inside, name = ".".join(filter(None, (at, match[1]))), match[2]
        key = ".".join(filter(None, (inside, name)))
        if owner:
            return f"{key} is no option{_nearest(name, _arguments(owner, match[1]), '')}"
        known = [option.removeprefix("--") for option in options]
        siblings = [option for option in known if option.rpartition(".")[0] == key.rpartition(".")[0]]
        return f"{key} is no option{_nearest(key, siblings or known, 'see --help')}"
    if match := re.match(r"the following arguments are required: (.*)", text):
        names = [".".join(filter(None, (at, each if at else each.rpartition(".")[2]))) for each in match[1].split(", ")]
        return f"{' and '.join(names)} must be given"
    if at == "data" and not owner.startswith("ununennium."):
        return f"data must be a mapping with {', '.join(_arguments('ununennium.runs.ChipSettings'))}, got " + _short(
            complaint.value or owner
        )
    if match := re.match(r"Not of type (\w+): (.*)", text):
        value = re.sub(r"^.*base 10: | does not conform.*$|^.*cast to \w+: ", "", match[2])
        return f"{at} must be {_kind(match[1])}, got {value}"
    if match := re.match(r"invalid literal for int\(\) with base 10: (.*)", text):
        return f"{at} must have whole numbers, got {match[1]}"
    if match := re.match(r"Expected a dot import path string: (.*)", text):
        return _unknown_class(at, match[1])
    if match := re.match(r"No module named '([^']+)'", text):
        return f"{at}: there is no module {match[1]!r} for {owner}: correct the path, or install it"
    if match := re.match(r"module '([^']+)' has no attribute '([^']+)'", text):
        return f"{at}: {match[1]} has no {match[2]}{_nearest(match[2], _classes_in(match[1]), '')}"
    if text.startswith("Not a valid subclass of"):
        return f"{at} must be a class path, or class_path and init_args, got {_short(complaint.value or owner)}"
    if not complaint.keys and not complaint.classes:
        made = re.search(r"class_path='([^']+)'", complaint.value or "")
        return f"{made[1]}: {text}" if made else None
    return ": ".join(filter(None, (at, "" if owner in text else owner, text)))


def _unknown_class(at: str, name: str) -> str:
    option = at.partition(".")[0]
    if option == "network":
        from ununennium.models import list_models

        close = difflib.get_close_matches(name, list_models(), n=1)
        if close:
            of = "is a model's name" if close[0] == name else f"is no class, but like a model's name, {close[0]}"
            return f"network: {name} {of}: give model.name={close[0]} in its place (list_models() shows all)"
    homes = _HOMES.get(option, ())
    nearest = _close(name, {each: f"{home}.{each}" for home in reversed(homes) for each in _classes_in(home)})
    example = next((f"{home}.{each}" for home in homes for each in _classes_in(home)), "package.module.Class")
    meant = f"is {nearest} meant?" if nearest else f"write the whole path, as in {example}"
    return f"{at}: {name} is no class: {meant}"


def _nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return a question for the nearest name, or the names there are, to be put after a message."""
    known = list(dict.fromkeys(known))
    close = _close(name, {each: each for each in known})
    if close:
        return f": is {close} meant?"
    if otherwise or not known:
        return f": {otherwise}" if otherwise else ""
    return f"; there are {', '.join(known)}"


def _close(name: str, known: dict[str, str]) -> str | None:
    lowered = {each.lower(): full for each, full in known.items()}
    found = difflib.get_close_matches(name.rpartition(".")[2].lower(), lowered, n=1, cutoff=0.6)
    found = found or difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def _arguments(path: str, group: str | None = None) -> list[str]:
    """Return the names of a class's arguments, or of one that is an argument of it."""
    try:
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        for part in (group or "").split(".") if group else ():
            found = inspect.signature(found).parameters[part].annotation
        return [each for each in inspect.signature(found).parameters if each not in ("self", "args", "kwargs")]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return []


def _classes_in(module: str) -> list[str]:
    try:
        home = importlib.import_module(module)
    except ImportError:
        return []
    return [name for name, each in vars(home).items() if inspect.isclass(each) and not name.startswith("_")]


def _kind(name: str) -> str:
    if match := re.match(r"(?:typing\.)?Literal\[(.*)\]", name):
        return match[1].replace("'", "").replace(", ", " or ")
    bare = re.sub(r"^<class '(.*)'>$", r"\1", name).partition("[")[0].rpartition(".")[2]
    return _KINDS.get(bare, bare)


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}…"
