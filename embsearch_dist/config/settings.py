"""Settings compared with those of an earlier start, and told to people."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from embsearch_dist.config.backbones import options_of, registered_names
from embsearch_dist.config.sections import SECTIONS, TrainConfig


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-able parts; dataclasses count as their fields."""
    body = [dataclasses.asdict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], search: type | None = None) -> list[str]:
    """Dotted keys whose values differ. A key that an older version did not have counts as what that version did: the
    ``before`` of :func:`option`, or its default.

    Args:
        old, new: flat settings, as a checkpoint or a stage recorded them and as they are now.
        search: dataclass of the ``search`` section, for defaults of ``search.*``.
    """
    return [k for k in {**old, **new} if old.get(k, _default(k, search)) != new.get(k)]


def tell_changed(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of the changed settings for a message: ``optim.dense was 'adam', now 'adagrad'``."""
    return ", ".join(f"{k} was {old.get(k, _default(k, None))!r}, now {new.get(k)!r}" for k in keys[:3])


def _default(key: str, search: type | None) -> Any:
    """What a dotted key that is not there means, a list as JSON gives it back; a bare one is of training; None for
    what has no default."""
    section, _, rest = key.rpartition(".")
    found: Any = {**SECTIONS, "search": search}.get(section.partition(".")[0]) if section else TrainConfig
    if found is None:
        return None
    found = found()
    for name in section.split(".")[1:]:
        found = getattr(found, name, None)
    fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    before = {f.name: f.metadata["before"] for f in fields if "before" in f.metadata}
    return before.get(rest, getattr(found, rest, None))


def flatten(body: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and dataclasses as one level of dotted keys."""
    if dataclasses.is_dataclass(body) and not isinstance(body, type):
        body = dataclasses.asdict(body)
    flat: dict[str, Any] = {}
    for key, value in body.items():
        if isinstance(value, dict) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def describe(methods: Mapping[str, type]) -> str:
    """Every key with its default and meaning, for ``--help``."""
    lines = []
    for name, cls in {**SECTIONS, **{f"search (method: {m})": c for m, c in methods.items()}}.items():
        lines.append(f"\n{name}: {(cls.__doc__ or '').strip().splitlines()[0]}")
        lines += _describe_fields(cls, "  " + ("search" if name.startswith("search") else name))
        lines += _describe_backbones() if name == "model" else []
    return "\n".join(lines)


def _describe_backbones() -> list[str]:
    """The options of every backbone that has some."""
    lines = []
    for name in registered_names():
        options = options_of(name)
        if options is not None:
            lines.append(f"  of backbone {name}:")
            lines += _describe_fields(options, "    model.options")
    return lines


def _describe_fields(cls: type, prefix: str) -> list[str]:
    lines = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(default):
            lines += _describe_fields(type(default), f"{prefix}.{f.name}")
        else:
            lines.append(f"{prefix}.{f.name} [{default}]  {f.metadata.get('help', '')}".rstrip())
    return lines
