"""Dotted overrides (``train.epochs=3``) as the layers that are merged into a config.

A merge of OmegaConf goes through the whole config, so all overrides are put into one layer wherever they can be.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, StringNode

from embsearch_dist.config.literal import HELD, held
from embsearch_dist.errors import UserError

TABLES = "dist.tables."


def layers_of(given: Sequence[tuple[str, str]], base: DictConfig, literal: bool) -> list[DictConfig]:
    """Key and value of each override, in their order, as the fewest layers that say the same.

    Args:
        base: the typed config: what belongs to a key of type str is taken as it stands, the rest is YAML.
        literal: whether ``${`` is text.

    Raises:
        UserError: an override has no key, or its value is no YAML.
    """
    layers: list[dict[str, Any]] = _backbone(given)
    for key, value in given:
        if not key:
            raise UserError(f"override {value!r} has no key; write --section.key value")
        body = _nested(key, value.replace("${", HELD) if literal else value, base)
        if not layers or not _put(body, layers[-1]):
            layers.append(body)
    return [OmegaConf.create(layer) for layer in layers]


def _backbone(given: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The backbone that the command line names, before all its others: options may stand on either side."""
    named = [value for key, value in given if key == "model.backbone"]
    return [{"model": {"backbone": named[-1]}}] if named else []


def _nested(key: str, value: str, base: DictConfig) -> dict[str, Any]:
    """An override as a nested mapping.

    What follows ``dist.tables.`` is a field's name, whatever characters it has.
    """
    if key.startswith(TABLES) and key != TABLES:
        return {"dist": {"tables": {held(key.removeprefix(TABLES)): value}}}
    node: Any = base
    parts = key.split(".")
    for part in parts:
        node = node._get_node(part) if isinstance(node, DictConfig) and part in node else None
    if isinstance(node, StringNode):
        body: Any = value
    else:
        try:
            body = copy.deepcopy(_parsed(value))
        except Exception as e:
            raise UserError(f"override {key}={value}: {' '.join(str(e).split())}") from e
    for part in reversed(parts):
        body = {part: body}
    return body


@functools.lru_cache(maxsize=1024)  # the runs of a study are told much the same
def _parsed(value: str) -> Any:
    """A value as OmegaConf reads it from a command line."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index, call-overload]


def _put(body: dict[str, Any], layer: dict[str, Any]) -> bool:
    """Put an override into a layer, over what is there; False where one has a section and the other a value: which of
    them is wrong the config must say."""
    for key, value in body.items():
        there = layer.get(key, value)
        if isinstance(value, dict) != isinstance(there, dict):
            return False
        if not isinstance(value, dict) or key not in layer:
            layer[key] = value
        elif not _put(value, there):
            return False
    return True
