"""What the entry scripts share: arguments, errors, and the run directory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from embsearch_dist.config.read import check_keys, load_config, split_arguments, written_method
from embsearch_dist.config.sections import Config
from embsearch_dist.config.settings import describe
from embsearch_dist.errors import UserError, nearest
from embsearch_dist.files import read_sealed
from embsearch_dist.methods import CONFIGS
from embsearch_dist.pipes import quietly
from embsearch_dist.ranks import peers
from embsearch_dist.ranks.environment import end_restarts
from embsearch_dist.ranks.peers import group_was_opened
from embsearch_dist.ranks.torchrun import note_error
from embsearch_dist.rundir import check_text, plain_word, release, warned_of_anew
from embsearch_dist.train import signals

ROOT = Path(__file__).resolve().parent.parent
FINAL = "final.json"
DEFAULT_CONFIG = ROOT / "configs" / "synthetic" / "adass_deepfm.yaml"


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
            print(warned_of_anew(str(e)), file=sys.stderr, flush=True)
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
        with suppress(UserError):
            named = written_method(file)
    if named and named not in CONFIGS:
        raise UserError(f"--method {named!r} is none of {', '.join(CONFIGS)}{nearest(named, list(CONFIGS))}")
    return named


def _run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Everything but a signal, which may also come while an error is told."""
    try:
        try:
            if code := quietly(lambda: main(argv)):
                sys.exit(code)
        except Exception as e:
            if stopped := signals.raised():  # of which something between has made this error
                raise stopped from e
            raise
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
    except (OSError, MemoryError) as e:
        _refuse(e)
    except RuntimeError as e:
        torch = sys.modules.get("torch")  # not for --help, nor for a mistake in a config
        if torch is not None and isinstance(e, torch.OutOfMemoryError):
            _refuse(e)
        with signals.noted():  # a launcher ends the ranks beside a lost one; what was lost is told first
            ending = peers.explain(e)
        if ending is None:
            raise
        peers.end(ending)
    except KeyboardInterrupt:
        text = "interrupted; start the same command again to continue"
        print(warned_of_anew(text), file=sys.stderr, flush=True)
        sys.exit(130)


def _refuse(e: BaseException) -> NoReturn:
    print(f"error: {_refused(e)}", file=sys.stderr, flush=True)
    note_error()
    sys.exit(2)


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


def known_options(plain: dict[str, str], known: Sequence[str], overrides: Sequence[str] = ()) -> None:
    """Raise ``UserError`` for an option or a config key that the script does not have."""
    for name in plain:
        if name not in known:
            hint = nearest(name, list(known))
            options = ", ".join(f"--{k}" for k in known)
            raise UserError(f"unknown option --{name}{hint}; known: {options}, --section.key")
    check_keys(CONFIGS, overrides)


def override(overrides: Sequence[str], key: str) -> str | None:
    """What the command line says of a key; None where it says nothing."""
    return next((o.split("=", 1)[1] for o in reversed(overrides) if o.startswith(f"{key}=")), None)


def read_config(file: str | Path | None, overrides: Sequence[str]) -> Config:
    return load_config(CONFIGS, file, overrides)


def read_run_config(directory: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run directory, which must be as it was written: a cut one would mean the defaults.

    Raises:
        UserError: it is missing, cut or changed.
    """
    check_text(directory / "config.yaml")
    return read_config(directory / "config.yaml", overrides)


def chosen_model(directory: Path) -> Path:
    """The model that retrain.py has chosen in a run directory, as its ``final.json`` says; any other directory itself.

    Raises:
        UserError: that file is damaged, or names a place elsewhere.
    """
    final = directory / FINAL
    if not final.exists():
        return directory
    return directory / "retrain" / plain_word(str(read_sealed(final)["name"]), f"the name in {final}")


def take_words(argv: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """(the other arguments, all words after ``option`` up to the next option)."""
    rest: list[str] = []
    found: list[str] = []
    taking = False
    for word in argv:
        if word.startswith("--"):
            taking = word.partition("=")[0] == option
            found += [word.partition("=")[2]] if taking and "=" in word else []
            rest += [] if taking else [word]
        else:
            (found if taking else rest).append(word)
    return rest, found


def whole_number(plain: dict[str, str], option: str, default: int) -> int:
    """The number behind an option.

    Raises:
        UserError: it is none above 0.
    """
    text = plain.get(option, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--{option} {text}: expected a whole number above 0")
    return int(text)
