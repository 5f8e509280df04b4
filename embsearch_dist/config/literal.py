"""Texts with ``${`` in them, which OmegaConf would take for a reference: held back while it has them in hand."""

from __future__ import annotations

import dataclasses
from typing import Any

HELD = "\ue000{"  # stands for ${ while OmegaConf has a text in hand, which would look for a key there


def plain(body: Any) -> Any:
    """A section with the dollar signs of its texts put back; see :data:`HELD`."""
    if isinstance(body, str):
        return body.replace(HELD, "${")
    if isinstance(body, list):
        return [plain(value) for value in body]
    if isinstance(body, dict):
        return {plain(key): plain(value) for key, value in body.items()}
    if dataclasses.is_dataclass(body):
        for f in dataclasses.fields(body):
            setattr(body, f.name, plain(getattr(body, f.name)))
    return body


def held(body: Any) -> Any:
    """The other way round, of nested dicts and lists."""
    if isinstance(body, str):
        return body.replace("${", HELD)
    if isinstance(body, dict):
        return {held(key): held(value) for key, value in body.items()}
    return [held(value) for value in body] if isinstance(body, list) else body
