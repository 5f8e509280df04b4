"""What the entry scripts share: arguments, errors, and the run directory."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.architecture.architecture import read_architecture
from embsearch_dist.architecture.canonical import key
from embsearch_dist.architecture.space import Space
from embsearch_dist.architecture.space import load as load_architecture
from embsearch_dist.config import SAFETY_KEYS, Config, describe, load_config, nearest, split_arguments
from embsearch_dist.data.manifest import MANIFEST, compare_ends, identity
from embsearch_dist.dist import peers
from embsearch_dist.dist.context import Context, group_was_opened
from embsearch_dist.dist.environment import end_restarts
from embsearch_dist.dist.torchrun import note_error
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.base import Run
from embsearch_dist.methods.ihas.router import ROUTER
from embsearch_dist.methods.nasrec.searching import RESULT
from embsearch_dist.models.ctr import common_width
from embsearch_dist.models.network import check_width
from embsearch_dist.pipes import quietly
from embsearch_dist.rundir import check_text, clear, hold, is_ours, release
from embsearch_dist.schema import Schema, copy_sealed, differs, read_sealed, write_sealed
from embsearch_dist.train import signals

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "synthetic" / "adass_deepfm.yaml"
CONFIGS = {name: method.config for name, method in METHODS.items()}


def run_main(main: Callable[[Sequence[str]], None], document: str | None, searching: bool = True) -> None:
    """Run an entry script: ``--help``, one-line errors with exit code 2, 130 on Ctrl-C, 75 on a scheduler's signal.

    ``searching``: the keys of the methods' searches concern it.
    """
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        _run(lambda words: print_help(words, document, searching), argv)
        return
    signals.catch()
    try:
        _run(main, argv)
    except signals.StoppedBySignal as e:
        if os.environ.get("RANK", "0") == "0":
            print(e, file=sys.stderr, flush=True)
        _end_restarts()
        sys.exit(signals.EXIT_CODE)
    if "RANK" in os.environ and group_was_opened():
        # Python's way out has aborted a rank whose work was done, when the machine was busy: a thread of gloo's that
        # was still ending. The launcher would take that for a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def print_help(argv: Sequence[str], document: str | None, searching: bool) -> None:
    """What a script is for and every config key; of the search sections that of the run's method, where one is known:
    by ``--method NAME``, ``--config FILE`` or the config of ``--run DIR``."""
    print((document or "").strip())
    method = asked_method(argv) if searching else ""
    if not searching:
        print("\nEvery config key but those of searches (search.py --help), as --section.key VALUE [default]:")
        print(describe({}))
        return
    if method:
        print(f"\nEvery config key of method {method}, as --section.key VALUE [default]:")
    else:
        print(
            "\nEvery config key, as --section.key VALUE [default]; with --help and --method NAME, --config FILE or "
            f"--run DIR those of one method ({', '.join(CONFIGS)}):"
        )
    print(describe({method: CONFIGS[method]} if method else CONFIGS))


def asked_method(argv: Sequence[str]) -> str:
    """The method that a command line is about, as far as it says so; empty where it does not or cannot be read."""
    plain, overrides = split_arguments([a for a in argv if a not in ("--help", "-h")])
    named = next((o.split("=", 1)[1] for o in overrides if o.startswith("method=")), plain.get("method", ""))
    if not named:
        file = Path(plain["run"]) / "config.yaml" if "run" in plain else Path(plain.get("config", "/"))
        try:
            found = re.search(r"^method: *([a-z]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        except (OSError, UnicodeDecodeError):
            found = None
        named = found.group(1) if found else ""
    if named and named not in CONFIGS:
        raise UserError(f"--method {named!r} is none of {', '.join(CONFIGS)}{nearest(named, list(CONFIGS))}")
    return named


def _run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Everything but a signal, which may also come while an error is told."""
    try:
        try:
            if code := quietly(lambda: main(argv)):
                sys.exit(code)
        finally:
            release()
    except UserError as e:
        # One voice is enough when all ranks fail alike.
        if os.environ.get("RANK", "0") == "0" or (group_was_opened() and not e.everywhere):
            print(f"error: {e}", file=sys.stderr, flush=True)
        note_error()
        if e.repeats and (e.everywhere or not group_was_opened()):
            _end_restarts()
        sys.exit(2)
    except (OSError, MemoryError, torch.OutOfMemoryError) as e:
        print(f"error: {_refused(e)}", file=sys.stderr, flush=True)
        note_error()
        sys.exit(2)
    except RuntimeError as e:
        with signals.noted():  # a launcher ends the ranks beside a lost one; what was lost is told first
            ending = peers.explain(e)
        if ending is None:
            raise
        peers.end(ending)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to continue", file=sys.stderr, flush=True)
        sys.exit(130)


def _refused(e: BaseException) -> str:
    """What the system said no to, in one line."""
    if isinstance(e, OSError):
        where = f"{e.filename}: " if e.filename else ""
        return f"{where}{e.strerror or e}. Check that path, its permissions and the disk"
    told = " ".join(str(e).split())[:200]
    return f"memory ran out{f' ({told})' if told else ''}. Lower widths or batch sizes, or use more ranks"


def _end_restarts() -> None:
    """What ends all ranks would end them again, or they were told to end. SIGTERM is what torchrun itself ends with."""
    if signal.SIGTERM not in signals.received:
        end_restarts()


def known_options(plain: dict[str, str], known: Sequence[str]) -> None:
    """Raise ``UserError`` for an option that the script does not have."""
    for name in plain:
        if name not in known:
            hint = nearest(name, list(known))
            options = ", ".join(f"--{k}" for k in known)
            raise UserError(f"unknown option --{name}{hint}; known: {options}, --section.key")


def read_config(file: str | Path | None, overrides: Sequence[str]) -> Config:
    return load_config(CONFIGS, file, overrides)


def read_run_config(directory: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run directory, which must be as it was written: a cut one would mean the defaults.

    Raises:
        UserError: it is missing, cut or changed.
    """
    check_text(directory / "config.yaml")
    return read_config(directory / "config.yaml", overrides)


def lasting(config: Config, same_data: bool = False) -> dict[str, Any]:
    """All that one training must keep from start to start; ``same_data``: known to be, wherever they lie now."""
    found = config.to_dict()
    if same_data:
        del found["data"]["path"]
    found["train"] = {k: v for k, v in found["train"].items() if k not in SAFETY_KEYS}
    found["dist"] = {k: v for k, v in found["dist"].items() if k not in ("timeout_s", "wait_s")}
    found["data"] = {k: v for k, v in found["data"].items() if k != "skip_unreadable"}
    if config.model.backbone != "nasrec":
        del found["model"]["layer_norm"]  # nothing reads it
    return found


def open_data(config: Config, context: Context) -> Schema:
    """The schema of the run's data; makes the synthetic data on rank 0 when the config asks for it."""
    path = Path(config.data.path)
    if config.data.make == "synthetic":
        from embsearch_dist.data.synthetic import make_synthetic

        def make() -> None:
            if not (path / "schema.json").exists():
                make_synthetic(path, config.data.rows, 0)

        context.first("making synthetic data", make)
    with context.together("reading the schema"):
        schema = Schema.load(path)
        if (path / "vocabulary").is_dir():
            compare_ends(path, "vocabulary")
        if context.rank == 0 and not (path / MANIFEST).exists():
            print(f"{path / MANIFEST} is missing: the files there are compared with nothing", file=sys.stderr)
        return dataclasses.replace(schema, data=identity(path, schema))
    raise AssertionError("unreachable")


def open_search(directory: Path, config: Config, schema: Schema, context: Context) -> Run:
    """The search of groups that ``directory`` belongs to: its run directory, or that of one of its retrainings.

    The settings are those of the search; where the data lie and how tables are spread is as ``config`` says.
    """
    with context.together("looking for the search"):
        places = [directory, *directory.parents, *directory.resolve().parents]
        home = next((p for p in places if (p / ROUTER).exists() and (p / "config.yaml").exists()), None)
        if home is None:
            raise UserError(f"{directory} belongs to no search of groups: no directory above it has {ROUTER}")
        found = read_run_config(home)
        found.run.dir, found.run.overwrite = str(home), False
        found.data, found.dist = copy.copy(config.data), copy.copy(config.dist)
        return Run(found, schema, context)
    raise AssertionError("unreachable")


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
    if config.run.overwrite and directory.exists() and not is_ours(directory) and any(directory.iterdir()):
        raise UserError(f"{directory} is not a run directory (no config.yaml in it); it is not deleted")
    hold(directory, doing)
    if config.run.overwrite:
        clear(directory, Path(given) if given else None)
    config.save(directory)
    schema.save(directory)
    truth = Path(config.data.path) / "truth.json"
    if truth.exists():
        copy_sealed(truth, directory / "truth.json")


def open_retraining(config: Config, schema: Schema, found: Allocation | GroupedAllocation, directory: Path) -> None:
    """The sub-run's directory; a training of another allocation or config under that name is an error."""
    network = None
    if config.model.architecture:
        network, space = _network(config.model.architecture)
        for widths in ({w for w in part.values() if w} for part in _widths(found)):
            check_width(config.model.architecture, space, common_width(config.model, sorted(widths)))
    same_data = False
    if (directory / "schema.json").exists() and not config.run.overwrite:
        before = Schema.load(directory)
        same_data = bool(schema.data) and before.data == schema.data
        if differs(before.data, schema.data):
            raise UserError(
                f"{directory} was trained on data {before.data}, {config.data.path} is {schema.data}: the same fields, "
                "but other rows or ids. Give --name, the --data.path it was trained on, or --run.overwrite true"
            )
    kinds: dict[str, type[Allocation | GroupedAllocation]] = {"allocation.json": Allocation, GROUPS: GroupedAllocation}
    for file, kind in kinds.items():
        if (directory / file).exists() and not config.run.overwrite:
            same = isinstance(found, kind) and _widths(kind.load(directory / file, schema)) == _widths(found)
            # Read as a config: one of an older version lacks keys that have been added since.
            kept = _network(directory / RESULT)[0] if (directory / RESULT).exists() else None
            old = read_run_config(directory)
            if not same or kept != network or lasting(old, same_data) != lasting(config, same_data):
                raise UserError(
                    f"{directory} holds another training; give --name, or --run.overwrite true to replace it"
                )
    # Read now: it may lie in the directory that is about to be emptied.
    network_body = read_architecture(config.model.architecture) if network else {}
    open_run_directory(config, schema, directory)
    found.save(directory / ("allocation.json" if isinstance(found, Allocation) else GROUPS))
    if network and not (directory / RESULT).exists():
        write_sealed(directory / RESULT, network_body)


def _network(path: str | Path) -> tuple[tuple[str, int], Space]:
    """What two files of one network have in common (widths of tables are compared elsewhere), and its space."""
    architecture, space = load_architecture(path)
    return (key(architecture), space.tokens), space


def _widths(found: Allocation | GroupedAllocation) -> list[dict[str, int]]:
    return [a.widths for a in (found.allocations if isinstance(found, GroupedAllocation) else [found])]


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


def read_result(text: str, run_dir: Path, schema: Schema) -> tuple[str, Allocation | GroupedAllocation]:
    """(default name, result) from ``ues-WIDTH``, a file, or the run's own result, which may be groups."""
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
    allocation = Allocation.load(path, schema)
    return str(allocation.provenance.get("name", path.stem if text else "found")), allocation
