"""Formulas of docstrings, written as Sphinx has them (``:math:``, ``.. math::``), as MathML, which browsers draw."""

import re
from textwrap import dedent
from typing import Any

import griffe
from latex2mathml.converter import convert

_BLOCK = re.compile(r"^\.\. math::(?P<formula>.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_INLINE = re.compile(r":math:`(?P<formula>[^`]+)`")
_LITERAL = re.compile(r"::$(?=\n\n +\S)", re.MULTILINE)


class Formulas(griffe.Extension):
    """Puts formulas into HTML before docstrings are read as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the formulas of one docstring."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        text = _BLOCK.sub(lambda found: f"\n{convert(dedent(found['formula']), display='block')}\n", text)
        text = _INLINE.sub(lambda found: convert(found["formula"]), text)
        obj.docstring.value = _LITERAL.sub(":", text)
