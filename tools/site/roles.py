"""Docstrings for the site: Sphinx's roles (``:meth:`predict```) and double backticks as Markdown has them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:mod|class|func|meth|data|attr|exc):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"``([^`]+)``", r"`\1`", _ROLE.sub(r"`\1`", obj.docstring.value))
