"""Started twice in one directory, and read by a pipe that closes: one line or none, the same on all ranks, no harm."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.data.prepare import pipeline as preparing
from embsearch_dist.data.prepare.team import from_environment
from embsearch_dist.errors import UserError
from embsearch_dist.rundir import LOCK
from launch import evaluate, prepare, report, retrain, search
from launch.common import print_help, run_main
from tests.factories import command_line
from tests.ranks import CONTEXT, run_ranks
from tests.raw_clicks import OPTIONS, digest, make_raw

MAINS: dict[str, Callable[[list[str]], Any]] = {"search": search.main, "retrain": retrain.main}
MAINS["evaluate"] = evaluate.main


def refused(rank: int, world_size: int, script: str, words: list[str]) -> str:
    try:
        MAINS[script](words)
    except UserError as e:
        return str(e)
    return "worked"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a retrained model; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("twice")
    (folder / "ues.yaml").write_text("method: ues\nsearch: {width: 4}\ntrain: {epochs: 1, batch_size: 512}\n")
    words = command_line(data, folder / "run")
    for script, own in {"search": ["--config", str(folder / "ues.yaml"), *words], "retrain": []}.items():
        own = own or ["--run", str(folder / "run")]
        assert run_ranks(refused, 1, folder, script, own, init=False) == ["worked"]
    return folder / "run"


@pytest.mark.parametrize("script", MAINS)
def test_a_second_start_is_told_on_all_ranks_and_changes_nothing(
    data: Path, run: Path, tmp_path: Path, script: str
) -> None:
    own = run if script == "search" else run / "retrain" / "ues-4"
    words = {
        "search": ["--run.dir", str(run)],
        "retrain": ["--run", str(run)],
        "evaluate": ["--run", str(own)],
    }
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != LOCK}
    file = os.open(own / LOCK, os.O_RDWR)
    os.pwrite(file, b'{"host": "node7", "pid": 41, "doing": "another"}\n'.ljust(200), 0)
    fcntl.flock(file, fcntl.LOCK_EX)
    told = run_ranks(refused, 2, tmp_path, script, words[script], init=False)
    assert all(f"{own}: another (process 41 on node7) is at work there" in text for text in told), told
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != LOCK} == before
    os.close(file)
    assert run_ranks(refused, 2, tmp_path, script, words[script], init=False) == ["worked", "worked"]


def prepared_by(rank: int, world_size: int, source: str, out: str) -> str:
    try:
        preparing.prepare("table", source, out, team=from_environment(), **OPTIONS)
    except UserError as e:
        return str(e)
    return "worked"


def test_a_second_prepare_is_told_on_all_ranks_while_the_first_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_raw(tmp_path), tmp_path / "out"
    split_parts, told = preparing.split_parts, []

    def meanwhile(*args: Any) -> Any:
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        told.extend(run_ranks(prepared_by, 2, tmp_path / "second", str(source), str(out), init=False))
        assert {p: p.read_bytes() for p in before} == before
        return split_parts(*args)

    monkeypatch.setattr(preparing, "split_parts", meanwhile)
    preparing.prepare("table", source, out, **OPTIONS)
    busy = f"prepare (process {os.getpid()} on {socket.gethostname()}) is at work there"
    assert told == [f"{out}.partial: {busy}. Wait for it, or give another --out"] * 2
    monkeypatch.undo()
    preparing.prepare("table", source, tmp_path / "alone", **OPTIONS)
    assert digest(out) == digest(tmp_path / "alone")


def chatter(argv: Sequence[str]) -> None:
    for _ in range(100_000):
        print("one of many lines", flush=True)


def into_a_closed_pipe(main: str, words: list[str], err: str) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(os.open(err, os.O_CREAT | os.O_WRONLY), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = ["script", *words]
    if main == "chatter":
        run_main(chatter, "help")
    elif main == "search":
        run_main(search.main, search.__doc__)
    else:
        sys.exit({"prepare": prepare, "report": report}[main].script())


@pytest.mark.parametrize("main", ["chatter", "search", "help", "prepare", "report"])
def test_a_reader_that_goes_ends_a_script_quietly(main: str, data: Path, run: Path, tmp_path: Path) -> None:
    words = {
        "search": ["--print-config"],
        "prepare": ["--verify", str(data)],
        "report": [str(run), "--out", str(tmp_path / "page")],
        "help": ["--help"],
    }.get(main, [])
    err = tmp_path / "err"
    process = CONTEXT.Process(target=into_a_closed_pipe, args=("search" if main == "help" else main, words, str(err)))
    process.start()
    process.join(60)
    assert process.exitcode == 141 and err.read_text() == ""


@pytest.mark.parametrize(
    ("words", "there", "absent"),
    [
        (["--method", "nasrec"], ["of method nasrec", "search.evolution.generations"], ["search.policy.steps"]),
        (["--run", "RUN"], ["of method ues", "search.width"], ["search.policy.steps", "search.evolution"]),
        ([], ["--method NAME", "search.evolution.generations", "search.policy.steps"], []),
    ],
)
def test_help_is_of_one_method_where_one_is_known(
    words: list[str], there: list[str], absent: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_help([str(run) if w == "RUN" else w for w in words], search.__doc__, searching=True)
    told = capsys.readouterr().out
    assert all(w in told for w in there) and not any(w in told for w in absent)
    print_help(words, retrain.__doc__, searching=False)
    told = capsys.readouterr().out
    assert "train.epochs" in told and "  search." not in told
