"""What the entry scripts share: arguments, errors, and the run directory."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embsearch_dist.config import SAFETY_KEYS, Config, describe, load_config, nearest
from embsearch_dist.dist.context import Context, group_was_opened
from embsearch_dist.dist.environment import end_restarts
from embsearch_dist.errors import UserError
from embsearch_dist.methods import METHODS
from embsearch_dist.schema import Schema
from embsearch_dist.train import signals

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "synthetic" / "adass_deepfm.yaml"
CONFIGS = {name: method.config for name, method in METHODS.items()}


def run_main(main: Callable[[Sequence[str]], None], document: str | None) -> None:
    """Run an entry script: ``--help``, one-line errors with exit code 2, 130 on Ctrl-C, 75 on a scheduler's signal."""
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print((document or "").strip())
        print(f"\nEvery config key, as --section.key VALUE [default]:\n{describe(CONFIGS)}")
        return
    signals.catch()
    try:
        _run(main, argv)
    except signals.StoppedBySignal as e:
        if os.environ.get("RANK", "0") == "0":
            print(e, file=sys.stderr, flush=True)
        _end_restarts()
        sys.exit(signals.EXIT_CODE)


def _run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Everything but a signal, which may also come while an error is told."""
    try:
        main(argv)
    except UserError as e:
        # One voice is enough when all ranks fail alike.
        if os.environ.get("RANK", "0") == "0" or (group_was_opened() and not e.everywhere):
            print(f"error: {e}", file=sys.stderr, flush=True)
        if e.repeats and (e.everywhere or not group_was_opened()):
            _end_restarts()
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
    except KeyboardInterrupt:
        print("interrupted; start the same command again to continue", file=sys.stderr, flush=True)
        sys.exit(130)


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


def lasting(config: Config) -> dict[str, Any]:
    """All that one training must keep from start to start."""
    found = config.to_dict()
    found["train"] = {k: v for k, v in found["train"].items() if k not in SAFETY_KEYS}
    found["data"] = {k: v for k, v in found["data"].items() if k != "skip_unreadable"}
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
        return Schema.load(path)
    raise AssertionError("unreachable")


def open_run_directory(config: Config, schema: Schema, directory: Path) -> None:
    """Make (or empty, when told) the run directory and leave config and schema in it. Rank 0 calls this."""
    if config.run.overwrite and directory.exists():
        if any(directory.iterdir()) and not (directory / "config.yaml").exists():
            raise UserError(f"{directory} is not a run directory (no config.yaml in it); it is not deleted")
        shutil.rmtree(directory)
    config.save(directory)
    schema.save(directory)
    truth = Path(config.data.path) / "truth.json"
    if truth.exists():
        shutil.copy(truth, directory / "truth.json")
