"""What a search has left in its run directory, to be trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.errors import UserError
from embsearch_dist.files import copy_sealed, read_sealed
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.networks.architecture import RESULT, read_architecture
from embsearch_dist.networks.space import load as load_architecture
from embsearch_dist.schema import Schema


def read_result(
    text: str, run_dir: Path, schema: Schema, carried: bool = False
) -> tuple[str, Allocation | GroupedAllocation]:
    """(default name, result) from ``ues-WIDTH``, a file, or the run's own result, which may be groups.

    ``carried``: widths that were found on other data of the same fields are taken over.
    """
    uniform = re.fullmatch(r"ues-(\d+)", text)
    if uniform:
        return text, Allocation.uniform(schema, int(uniform.group(1)))
    if not text and (run_dir / GROUPS).exists():
        grouped = GroupedAllocation.load(run_dir / GROUPS, schema)
        return str(grouped.provenance.get("name", "groups")), grouped
    path = Path(text) if text else run_dir / "allocation.json"
    if not text and not path.exists() and (run_dir / RESULT).exists():
        _, space = load_architecture(run_dir / RESULT)
        provenance = read_architecture(run_dir / RESULT).get("provenance", {})
        return str(provenance.get("name", "network")), Allocation.uniform(schema, space.width)
    if not text and not path.exists():
        path = chosen_allocation(run_dir) or path
    if not path.exists():
        raise UserError(f"no allocation at {path}; search first, or give --allocation FILE or --allocation ues-32")
    allocation = carried_over(path, schema) if carried else Allocation.load(path, schema)
    return str(allocation.provenance.get("name", path.stem if text else "found")), allocation


def carried_over(path: Path, schema: Schema) -> Allocation:
    """The widths of a file for other data of the same fields.

    Raises:
        UserError: a field is in only one of them (named), or the file is no allocation.
    """
    found = Allocation.load(path)
    if found.values and found.schema.fingerprint != schema.fingerprint:
        raise UserError(
            f"{path} keeps rows for some values alone, by ids of the data it was found on. Search again on this data"
        )
    try:
        return replace(found, schema=schema)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def searched_network(directory: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides that put the architecture found in a run directory behind its tables; none where none was found, or
    where ``overrides`` name a backbone."""
    path = directory / RESULT
    if not path.exists() or any(o.startswith("model.backbone=") for o in overrides):
        return []
    _, space = load_architecture(path)
    # Other widths than the space's are mapped to it.
    width = ["model.unify=mixed", "model.transform=width", f"model.unified_width={space.width}"]
    return ["model.backbone=nasrec", f"model.architecture={path}", *width]


def seed_suffix(config: Config, base: Config) -> str:
    """What the names of a training's results end with: nothing for the seed of the run, ``base``, else ``-seedN``."""
    return f"-seed{config.run.seed}" if config.run.seed != base.run.seed else ""


def kept_network(directory: Path) -> list[str]:
    """The override that names a training's own copy of its network: the file it was given may be gone."""
    return [f"model.architecture={directory / RESULT}"] if (directory / RESULT).exists() else []


def chosen_allocation(run_dir: Path) -> Path | None:
    """Of the allocations that a search has kept, the one that its allocation.json was; None where nothing tells."""
    kept = sorted((run_dir / "allocations").glob("*.json"))
    if len(kept) > 1 and (run_dir / "search" / "pareto.json").exists():
        points = read_sealed(run_dir / "search" / "pareto.json").get("points", [])
        names = [str(p.get("name")) for p in points if isinstance(p, dict) and p.get("chosen")]
        kept = [path for path in kept if path.stem in names]
    return kept[0] if len(kept) == 1 else None


def restore_allocation(run_dir: Path) -> None:
    """Put back a lost allocation.json from what the search has kept beside it. Rank 0 calls this."""
    kept = chosen_allocation(run_dir)
    if kept is not None and not any((run_dir / n).exists() for n in ("allocation.json", GROUPS)):
        copy_sealed(kept, run_dir / "allocation.json")
        print(f"{run_dir / 'allocation.json'} was gone: restored from {kept}", flush=True)
