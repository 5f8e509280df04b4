"""What one trained model was measured to do, as its ``evaluation.json`` says."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.networks.architecture import Architecture
from embsearch_dist.networks.canonical import key
from embsearch_dist.report.reading import differences_beside, there, told_beside

NETWORK = "architecture.json"  # of a search for networks, and of a model behind one
BY_OTHER_ROUTER = "evaluation-fields.json"  # a routed model's result with a router that is not the search's
AGAIN = "Give the command again that wrote it, or delete it"
_SEED = re.compile(r"[-_]seed[-_]?(\d+)$")


@dataclass
class Result:
    """One ``evaluation.json``: a retrained model measured on held-out data.

    ``groups`` and ``router`` are those of a routed result: a model per group, and what sends a row to one.
    ``served``: ``auc``, ``logloss``, ``bytes`` and ``ues32_bytes`` of tables at ``precision``, where it was measured.
    ``told``: ``reliability`` and ``by_group``, where they were measured; ``differences``: to others on the same rows.
    ``begun``: its training began with another model, and not with fresh weights.
    ``network`` is the key of the architecture behind the tables, where one was; ``rank`` its place in its search.
    """

    name: str
    split: str
    seed: int | None
    numbers: dict[str, float]
    widths: dict[str, int]
    source: Path
    groups: list[dict[str, Any]] = field(default_factory=list)
    router: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""
    network: str | None = None
    rank: int | None = None
    precision: str = ""
    served: dict[str, float] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    differences: list[dict[str, Any]] = field(default_factory=list)
    begun: bool = False


def read_result(directory: Path, file: str, ranks: Mapping[str, int]) -> Result | None:
    """What a trained model was measured to do; None where it was not.

    Args:
        file: in the directory: with the search's own router, or :data:`BY_OTHER_ROUTER`.
        ranks: key of an architecture -> its place in the search.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / file
    body = optional(path)
    if body is None:
        return None
    named, seed_in_name = split_seed(str(body.get("name") or directory.name))
    seed = body.get("seed", seed_in_name)
    numbers = {
        k: float(v) for k, v in body.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "seed"
    }
    if body.get("auc") is None and "auc_undefined" in body:
        numbers["auc"] = math.nan  # rows of one class: shown as a dash
    if "auc" not in numbers:
        raise UserError(f'{path}: key "auc" is missing or not a number; evaluate that retrain again')
    groups, router = body.get("groups") or [], body.get("router") or {}
    if not isinstance(router, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise UserError(f'{path}: keys "groups" and "router" are not those of a routed model; evaluate it again')
    if file == BY_OTHER_ROUTER:
        named += f" (router: {router.get('kind', 'fields')})"
    widths = whole(body.get("widths") or {})
    result = Result(named, str(body.get("split", "test")), seed, numbers, widths, path, groups, router)
    result.backbone, result.begun = str(body.get("backbone") or ""), bool(body.get("start"))
    result.told, result.differences = told_beside(body, path), differences_beside(path, result.split)
    if isinstance(body.get("served"), dict):
        result.precision = str(body["served"].get("precision"))
        told = {k: math.nan if v is None else v for k, v in body["served"].items()}
        result.served = {k: float(told[k]) for k in ("auc", "logloss", "bytes", "ues32_bytes") if k in told}
    if (directory / NETWORK).exists() and result.backbone in ("", "nasrec"):
        result.network = key(Architecture.load(directory / NETWORK))
        result.rank = ranks.get(result.network)
    return result


def whole(numbers: Mapping[str, Any]) -> dict[str, int]:
    return {str(k): int(v) for k, v in numbers.items()}


def split_seed(name: str) -> tuple[str, int | None]:
    """``adass-seed3`` -> ``adass``, 3."""
    match = _SEED.search(name)
    return (name[: match.start()], int(match.group(1))) if match else (name, None)


def optional(path: Path) -> dict[str, Any] | None:
    """A sealed file, or None where there is none."""
    return read_sealed(path, AGAIN) if there(path) else None
