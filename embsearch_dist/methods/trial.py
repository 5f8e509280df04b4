"""Settings under which a method runs in seconds on a thousand rows: tests and fault sweeps try every method with them.

A method says under ``trial`` what of :data:`COMMON` it wants otherwise and what its search needs. Nothing that it finds
so is of any use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Mapping[str, Any]]

TRAINING = {"batch_size": 128, "eval_batch_size": 120, "epochs": 1, "log_every": 1, "save_every": 10}
"""For a training inside a search: steps are few, and every tenth one is saved."""
PLANTED_TRAINING = {"batch_size": 512, "eval_batch_size": 6000, "epochs": 6, "patience": 0}
"""For a training inside a search that is to find planted widths (``Method.planted``)."""
COMMON: Settings = {
    "model": {"hidden": [8, 4], "unified_width": 8},
    "optim": {"embedding_lr": 0.05, "dense_lr": 0.01},
    "train": {**TRAINING, "epochs": 2, "save_every": 10, "patience": 0},
}


def merged(trial: Settings) -> dict[str, dict[str, Any]]:
    """:data:`COMMON` with a method's own sections; a section that the method gives replaces the common one."""
    return {k: dict(v) for k, v in {**COMMON, **trial}.items()}


def overrides(trial: Settings) -> list[str]:
    """The same as ``section.key=value`` words."""
    return words_of(merged(trial))


def words_of(settings: Settings) -> list[str]:
    """Settings as ``section.key=value`` words."""
    return [f"{section}.{key}={_word(v)}" for section, body in settings.items() for key, v in body.items()]


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_word(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_word, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
