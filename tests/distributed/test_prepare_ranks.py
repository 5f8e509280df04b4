"""Several processes that prepare one data set: the bytes of one process, and one error for all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from embsearch_dist.data import vocabulary
from embsearch_dist.data.formats import blocks
from embsearch_dist.data.partial import JOB
from embsearch_dist.data.prepare import prepare
from embsearch_dist.data.team import Stopped, Team, from_environment
from embsearch_dist.errors import UserError
from tests.ranks import run_ranks
from tests.raw_clicks import OPTIONS, digest, make_raw


def work(rank: int, world_size: int, source: str, out: str, split: str) -> list[object]:
    blocks.BLOCK_BYTES = 1000
    start = time.monotonic()
    try:
        schema = prepare("table", source, out, team=from_environment(), split=split, **OPTIONS)
    except UserError as e:
        return [type(e).__name__, str(e), e.everywhere, time.monotonic() - start]
    return ["done", schema.rows]


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_raw(tmp_path)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    schema = prepare("table", source, tmp_path / "one", split="time", **OPTIONS)
    found = run_ranks(work, 3, tmp_path, str(source), str(tmp_path / "several"), "time", init=False)
    assert found == [["done", schema.rows]] * 3
    assert digest(tmp_path / "several") == digest(tmp_path / "one")
    assert not (tmp_path / "several.partial").exists()


def test_a_bad_line_is_told_by_all_within_seconds_and_leaves_nothing(tmp_path: Path) -> None:
    source = make_raw(tmp_path)
    lines = (tmp_path / "clicks.csv").read_text().splitlines()
    lines[900] = "1,1,a,cheap,1"
    (tmp_path / "clicks.csv").write_text("\n".join(lines) + "\n")
    found = run_ranks(work, 2, tmp_path, str(source), str(tmp_path / "out"), "random", init=False)
    for name, text, everywhere, seconds in found:
        assert (name, everywhere) == ("UserError", True)
        assert text == f"{tmp_path}/clicks.csv, line 901, column 'price': not a finite number: 'cheap'. " + (
            "Write a number or leave it blank"
        )
        assert seconds < 15
    assert not list(tmp_path.glob("out*"))


def broken(rank: int, world_size: int, source: str, out: str) -> list[object]:
    """One rank meets a bug while it counts."""
    if rank == 1:
        vocabulary.build = None  # type: ignore[assignment]
    try:
        return work(rank, world_size, source, out, "random")
    except TypeError as e:
        return ["TypeError", str(e)]


def test_a_bug_on_one_rank_stops_the_others_and_keeps_what_is_done(tmp_path: Path) -> None:
    source = make_raw(tmp_path)
    found = run_ranks(broken, 2, tmp_path, str(source), str(tmp_path / "out"), init=False)
    assert [f[0] for f in found] == ["Stopped", "TypeError"], found
    assert "rank 1 failed: TypeError(" in found[0][1]
    assert (tmp_path / "out.partial" / JOB).exists()
    found = run_ranks(work, 2, tmp_path, str(source), str(tmp_path / "out"), "random", init=False)
    assert [f[0] for f in found] == ["done", "done"]
    assert (tmp_path / "out" / "schema.json").exists() and not (tmp_path / "out.partial").exists()


def lonely(rank: int, world_size: int) -> list[object]:
    """Rank 0, which holds the store here, dies; rank 1 must not wait for it."""
    team = from_environment()
    team.barrier("met")
    if rank == 0:
        team.add("gone", 1)
        team._until(lambda: team.add("ready", 0) > 0)
        return ["left"]
    start = time.monotonic()
    try:
        team.add("ready", 1)
        team.barrier("never")
    except Stopped as e:
        return ["stopped", str(e), time.monotonic() - start]
    return ["met"]


def test_who_loses_the_others_does_not_wait(tmp_path: Path) -> None:
    found = run_ranks(lonely, 2, tmp_path, init=False, timeout=60)
    assert found[0] == ["left"]
    assert found[1][0] == "stopped" and "rank 1 has lost the other processes" in found[1][1]
    assert found[1][2] < 30


def test_a_team_of_one_needs_no_store() -> None:
    team = Team()
    assert [list(team.claim("a", "xyz")), list(team.claim("a", "xyz"))] == [["x", "y", "z"], []]
    team.barrier("here")
    assert team.share("value", lambda: [1, 2.5]) == [1, 2.5]
    assert team.add("n", 2) + team.add("n", 3) == 2 + 5
    with pytest.raises(ValueError, match="need a store"):
        Team(0, 2)
