"""Several processes that prepare one data set: the bytes of one process, and one error for all."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.data.formats import blocks
from embsearch_dist.data.prepare import heartbeat, partial, vocabulary
from embsearch_dist.data.prepare.partial import JOB
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.prepare.team import Stopped, Team, from_environment
from embsearch_dist.errors import UserError
from tests.ranks import ROOT, run_ranks
from tests.raw_clicks import OPTIONS, digest, make_raw
from tests.scripts import fork_ranks


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
            "Write a number or leave the cell empty"
        )
        assert seconds < 15
    assert not list(tmp_path.glob("out*"))


def apart(rank: int, world_size: int, source: str, out: str) -> list[object]:
    """Each process has a disk of its own."""
    partial.PATIENCE_S = 0.5
    own = Path(out) / f"disk{rank}"
    own.mkdir(parents=True)
    return work(rank, world_size, source, str(own / "data"), "random")


def test_an_output_directory_that_is_not_shared_is_refused_on_all(tmp_path: Path) -> None:
    source = make_raw(tmp_path)
    found = run_ranks(apart, 2, tmp_path, str(source), str(tmp_path / "out"), init=False)
    for name, text, everywhere, _ in found:
        assert (name, everywhere) == ("Stopped", True)
        assert "disk1/data.partial of process 1 on " in text and "Give an --out on a disk that all hosts share" in text
    assert not list(tmp_path.glob("out/disk*/data"))


def broken(rank: int, world_size: int, source: str, out: str) -> list[object]:
    """One rank meets a bug while it counts. The other waits for it, or might count everything alone."""
    met, build = Path(out).with_name("met"), vocabulary.build

    def waiting(*args: Any, **options: Any) -> Any:
        deadline = time.monotonic() + 30
        while not met.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return build(*args, **options)

    def failing(*args: Any, **options: Any) -> Any:
        met.touch()
        raise TypeError("a bug")

    vocabulary.build = failing if rank == 1 else waiting
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


class NextDies:
    """A store in which rank 2 beats two hundred times, and never again."""

    def __init__(self) -> None:
        self.counts, self.news = {"beat/2": 0}, [""]

    def add(self, key: str, n: int) -> int:
        if key == "beat/2":
            n = int(self.counts[key] < 200)
        self.counts[key] = self.counts.get(key, 0) + n
        return self.counts[key]

    def compare_set(self, key: str, expected: str, news: str) -> None:
        self.news.append(f"{key}: {news}")


def test_only_beats_that_stay_away_are_taken_for_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0)
    store = NextDies()
    heartbeat.Heartbeat(1, 3, store)._beat()  # type: ignore[arg-type]
    assert store.counts == {"beat/1": 200 + heartbeat.SILENT_BEATS, "beat/2": 200, "count/stopped": 1, "count/left": 1}
    assert len(store.news) == 2 and "failed: " in store.news[1] and "rank 2 gives no sign of life" in store.news[1]


DYING = """
import os, signal, sys
from embsearch_dist.data.prepare import heartbeat
from embsearch_dist.data.prepare import pipeline as preparing
from embsearch_dist.data.formats import blocks
from launch import prepare
heartbeat.BEAT_S, heartbeat.SILENT_BEATS, blocks.BLOCK_BYTES = 0.05, 40, 1000
if os.environ["RANK"] == sys.argv.pop(1):
    preparing.build_all = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(prepare.script())
"""


@pytest.mark.parametrize(("victim", "told"), [(1, "rank 1 gives no sign of life any more"), (0, "rank 1 has lost the")])
def test_who_survives_a_kill_ends_with_one_line_and_the_same_command_continues(
    tmp_path: Path, victim: int, told: str
) -> None:
    """Without a launcher, which would end the others."""
    source = make_raw(tmp_path)
    (tmp_path / "dying.py").write_text(DYING)
    options = ["--quiet", "--row-group-rows", "100", "--rows-per-shard", "300"]
    words = ["--format", "table", "--input", str(source), "--out", str(tmp_path / "out"), *options]
    folder = tmp_path / "ranks"
    folder.mkdir()
    ends = fork_ranks(2, tmp_path / "dying.py", [str(victim), *words], ROOT, dict(os.environ), 60, folder)
    assert [end and end.returncode for end in ends] == [2 - 11 * (rank == victim) for rank in range(2)], ends
    # Torch's own lines about a lost store are off where prepare.py loads torch; in these forks it is loaded already.
    lines = [line for line in ends[1 - victim].stderr.splitlines() if "error" in line.lower()]  # type: ignore[union-attr]
    lines = [line for line in lines if not line.startswith("frame #")]
    assert len(lines) == 1 and lines[0].startswith(f"error: {told}") and "Start the same command again" in lines[0]
    found = run_ranks(work, 2, tmp_path, str(source), str(tmp_path / "out"), "random", init=False)
    assert [f[0] for f in found] == ["done", "done"]
    prepare("table", source, tmp_path / "one", **OPTIONS)
    assert digest(tmp_path / "out") == digest(tmp_path / "one")


def test_a_team_of_one_needs_no_store() -> None:
    team = Team()
    assert [list(team.claim("a", "xyz")), list(team.claim("a", "xyz"))] == [["x", "y", "z"], []]
    team.barrier("here")
    assert team.share("value", lambda: [1, 2.5]) == [1, 2.5]
    assert team.add("n", 2) + team.add("n", 3) == 2 + 5
    with pytest.raises(ValueError, match="need a store"):
        Team(0, 2)
