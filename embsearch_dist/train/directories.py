"""The directories of searches and trainings: who may use one, and whether it holds the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config, written_method
from embsearch_dist.config.sections import SAFETY_KEYS, Config
from embsearch_dist.config.settings import changed_settings, flatten, tell_changed
from embsearch_dist.errors import UserError
from embsearch_dist.files import copy_sealed, write_sealed
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.models.model import common_width
from embsearch_dist.networks.architecture import RESULT, read_architecture
from embsearch_dist.networks.canonical import key
from embsearch_dist.networks.network import check_width
from embsearch_dist.networks.space import Space
from embsearch_dist.networks.space import load as load_architecture
from embsearch_dist.rundir import check_text, clear, emptied_by_this_job, hold, is_ours, note_emptied
from embsearch_dist.schema import Schema, differs
from embsearch_dist.train.warm.start import RECORD, Start, check_same_start, write_record

BEGINNINGS = ("rewind", "groups.inherit")
"""Keys of ``search`` that say which weights a training of what was found begins with."""


def read_own_config(directory: Path, like: Config) -> Config | None:
    """The config of a directory that was made with the method of ``like``; None where it was another's.

    Raises:
        UserError: it is missing, cut or changed.
    """
    file = directory / "config.yaml"
    check_text(file)
    if written_method(file) != like.method:
        return None
    module = [f"model.module={like.model.module}"] if like.model.module else []  # it may lie elsewhere by now
    return load_config({like.method: type(like.search)}, file, module)


def lasting(config: Config, same_data: bool = False) -> dict[str, Any]:
    """All that one training must keep from start to start, by dotted keys: what its steps depend on, beside its widths
    and its network. Where it runs, how its tables are spread and how else its widths were found may change.

    Args:
        same_data: the rows are known to be the same, wherever they lie now.
    """
    found = config.to_dict()
    search = flatten(found.pop("search"))
    del found["dist"]
    found["run"] = {"seed": config.run.seed}
    if same_data:
        del found["data"]["path"], found["data"]["source"], found["data"]["module"]
    found["train"] = {k: v for k, v in found["train"].items() if k not in SAFETY_KEYS}
    found["data"] = {k: v for k, v in found["data"].items() if k != "skip_unreadable"}
    for name in ("module", "allocation", "architecture"):  # where its code lies, and what is compared by its content
        del found["model"][name]
    if config.model.backbone != "nasrec":
        del found["model"]["layer_norm"]  # nothing reads it
    return flatten(found) | {f"search.{name}": search[name] for name in BEGINNINGS if name in search}


def open_run_directory(
    config: Config, schema: Schema, directory: Path, doing: str = "retrain.py", given: str | None = None
) -> None:
    """Make (or empty, when told) the run directory, lock it, and leave config and schema in it. Rank 0 calls this.

    Args:
        doing: who holds the lock, for people.
        given: the config file of the command line.

    Raises:
        UserError: somebody is at work there, or files that are not ours would be replaced or deleted.
    """
    if (directory / "config.yaml").exists() and not is_ours(directory):
        raise UserError(
            f"{directory / 'config.yaml'} was not written by a run: {directory} is not a run directory, and it "
            "would be replaced. Give another --run.dir; nothing was deleted"
        )
    anew = _anew(config, directory)
    if anew and directory.exists() and not is_ours(directory) and any(directory.iterdir()):
        raise UserError(f"{directory} is not a run directory (no config.yaml in it); it is not deleted")
    hold(directory, doing)
    if anew:
        clear(directory, Path(given) if given else None)
        note_emptied(directory)
    config.save(directory)
    schema.save(directory)
    truth = Path(config.data.path) / "truth.json"
    if truth.exists() and not config.data.source:
        copy_sealed(truth, directory / "truth.json")


def open_retraining(
    config: Config,
    schema: Schema,
    found: Allocation | GroupedAllocation,
    directory: Path,
    start: Start | None = None,
) -> None:
    """The sub-run's directory; a training of another allocation or config, or with another start, under that name is an
    error."""
    if start is not None and start.directory.resolve() == directory.resolve():
        raise UserError(f"--from {start.directory} is where the new training would be kept. Give --name")
    network = None
    if config.model.architecture:
        network, space = _network(config.model.architecture)
        for widths in ({w for w in part.values() if w} for part, _ in _tables(found)):
            check_width(config.model.architecture, space, common_width(config.model, sorted(widths)))
    same_data = False
    anew = _anew(config, directory)
    if (directory / "schema.json").exists() and not anew:
        before = Schema.load(directory)
        same_data = bool(schema.data) and before.data == schema.data
        if differs(before.data, schema.data):
            raise UserError(
                f"{directory} was trained on data {before.data}, {config.data.place} is {schema.data}: the same "
                "fields, but other rows or ids. Give --name, the --data.path it was trained on, or --run.overwrite true"
            )
    kinds: dict[str, type[Allocation | GroupedAllocation]] = {"allocation.json": Allocation, GROUPS: GroupedAllocation}
    for file, kind in kinds.items():
        if (directory / file).exists() and not anew:
            same = isinstance(found, kind) and _tables(kind.load(directory / file, schema)) == _tables(found)
            kept = _network(directory / RESULT)[0] if (directory / RESULT).exists() else None
            told = "" if same else "other widths"
            told = told or ("" if kept == network else "another network") or _changed(directory, config, same_data)
            if told:
                raise UserError(
                    f"{directory} holds another training; give --name, or --run.overwrite true to replace it ({told})"
                )
            check_same_start(directory, start)
    # Read now: it may lie in the directory that is about to be emptied.
    network_body = read_architecture(config.model.architecture) if network else {}
    open_run_directory(config, schema, directory)
    found.save(directory / ("allocation.json" if isinstance(found, Allocation) else GROUPS))
    if start is not None and not (directory / RECORD).exists():
        write_record(directory, start.facts())
    if network and not (directory / RESULT).exists():
        write_sealed(directory / RESULT, network_body)


def _anew(config: Config, directory: Path) -> bool:
    """Whether what a directory holds is to be replaced. What this very job has begun there goes on after a restart."""
    return config.run.overwrite and not emptied_by_this_job(directory)


def _changed(directory: Path, config: Config, same_data: bool) -> str:
    """How the config of a training differs from one that is to go on in its directory; empty where it does not."""
    # Read as a config: one of an older version lacks keys that have been added since.
    old = read_own_config(directory, config)
    if old is None:
        return f"not of method {config.method}"
    before, now = lasting(old, same_data), lasting(config, same_data)
    return tell_changed(before, now, changed_settings(before, now, type(config.search)))


def _network(path: str | Path) -> tuple[tuple[str, int], Space]:
    """What two files of one network have in common (widths of tables are compared elsewhere), and its space."""
    architecture, space = load_architecture(path)
    return (key(architecture), space.tokens), space


def _tables(found: Allocation | GroupedAllocation) -> list[tuple[dict[str, int], dict[str, KeptValues]]]:
    return [(a.widths, a.values) for a in (found.allocations if isinstance(found, GroupedAllocation) else [found])]
