"""Jobs of the studies: how much is left, what a record says, and that nothing runs twice."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.studies.jobs import (
    ROOT,
    STOPPED,
    Job,
    Pace,
    kind_of,
    machine_of,
    machines,
    read_csv,
    recorded,
    run_all,
    write_csv,
)

SCRIPT = "tools/tiny.py"


def job(name: str, result: Path | None = None, script: str = SCRIPT) -> Job:
    return Job(name, script, [], result)


def record(folder: Path, *lines: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    body = [{"exit": 0, "command": f"python {SCRIPT}", **x} for x in lines]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in body))
    return folder


def test_a_job_takes_as_long_as_its_kind_has_taken_and_else_as_its_script(tmp_path: Path) -> None:
    logs = record(tmp_path / "logs", {"job": "seed0-ues-4", "seconds": 600.0}, {"job": "seed0-mde", "seconds": 60.0})
    work = [job(n) for n in ("seed0-ues-4", "seed1-ues-4", "seed1-mde", "seed1-pep")]
    pace = Pace(work, logs, 1)
    # 600 for another ues-4, 60 for another mde, and 330 for what has not ended yet: 990 s.
    assert pace.ended(work[0], 0.0) == "1 of 4 done, about 16 min left"
    assert Pace(work[1:], logs, 2).left() == "about 8 min left"  # two side by side
    assert pace.ended(work[1], 1200.0) == "2 of 4 done, about 11 min left"  # 60 s, and (600 + 60 + 1200) / 3
    pace.keep([work[2]])
    assert pace.ended(work[2], 60.0) == "4 of 4 done"


def test_the_time_left_is_not_told_before_a_job_like_the_others_has_ended(tmp_path: Path) -> None:
    work = [job("seed0-a"), job("seed0-b", script="launch/other.py"), job("seed1-b", script="launch/other.py")]
    pace = Pace(work, tmp_path, 2)
    assert pace.ended(work[0], 60.0) == "1 of 3 done"
    assert pace.ended(work[1], 7200.0) == "2 of 3 done, about 2.0 h left"


def test_what_is_there_counts_as_done_and_failures_teach_no_length(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    logs = record(tmp_path / "logs", {"job": "seed0-b", "seconds": 9000.0, "exit": 1})
    pace = Pace([job("seed0-a", there), job("seed0-b")], logs, 1)
    assert pace.left() == "" and list(pace.open) == ["seed0-b"]
    assert kind_of("seed12-ues-16") == "ues-16" and kind_of("deepfm-8-seed0") == "deepfm-8"


def test_seconds_of_all_starts_are_added_and_found_means_that_each_has_found(tmp_path: Path) -> None:
    lines = [("a", 10.0, False), ("a", 5.0, True), ("b", 1.0, True), ("b", 2.0, True)]
    told = [{"job": j, "seconds": s, "cpu_seconds": s / 2, "memory_gib": s, "found": f} for j, s, f in lines]
    logs = record(tmp_path / "logs", *told)
    found = recorded(logs)
    assert (found["a"]["seconds"], found["a"]["cpu_seconds"], found["a"]["found"]) == (15.0, 7.5, False)
    assert (found["b"]["seconds"], found["b"]["found"]) == (3.0, True)
    assert [found[j]["memory_gib"] for j in "ab"] == [10.0, 2.0]  # of the start that took most


def test_a_job_runs_once_and_its_record_says_whether_it_found_what_it_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.studies.jobs.ROOT", tmp_path)
    # Asleep at the end: what a process holds is looked at from time to time, and a busy machine may look late.
    busy = "while time.process_time() < 0.15: pass\ntime.sleep(1)"
    held = "held = bytes(1) * (200_000_000 if sys.argv[1].endswith('y') else 1)"
    write = "pathlib.Path(sys.argv[1]).touch()"
    (tmp_path / "make.py").write_text(f"import pathlib, sys, time\n{held}\n{busy}\n{write}\n")
    shared = tmp_path / "shared"
    jobs = [Job(f"seed0-{n}", "make.py", [str(p)], p, shared=shared) for n, p in (("x", shared), ("y", tmp_path / "y"))]
    run_all([jobs], tmp_path / "logs", 1)
    found = recorded(tmp_path / "logs")
    assert [(found[j.name]["found"], found[j.name]["shared"]) for j in jobs] == [(False, "shared"), (True, "shared")]
    assert all(found[j.name]["cpu_seconds"] >= 0.1 for j in jobs)  # the loop alone takes more
    # The second one holds 200 MB more.
    assert 0.15 < found["seed0-y"]["memory_gib"] - found["seed0-x"]["memory_gib"] < 0.25
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"seed0-x: \d+ s \(1 of 2 done, about \d+ min left\)", lines[0])
    assert re.fullmatch(r"seed0-y: \d+ s \(2 of 2 done\)", lines[1])
    run_all([jobs], tmp_path / "logs", 1)
    assert capsys.readouterr().out.splitlines()[0] == "seed0-x: there (2 of 2 done)"
    assert len((tmp_path / "logs" / "jobs.jsonl").read_text().splitlines()) == 2


def test_a_record_names_the_machine_and_tables_name_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study may go on elsewhere: its first runs are not those of the machine that makes the tables."""
    monkeypatch.setattr("tools.studies.jobs.ROOT", tmp_path)
    (tmp_path / "make.py").write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).touch()\n")
    for name in ("here", "there"):
        monkeypatch.setattr("tools.studies.jobs.hardware", lambda used="", told=f"{name}, 2 cores": told)
        run_all([[Job(name, "make.py", [str(tmp_path / name)], tmp_path / name)]], tmp_path / "logs", 1)
    rows = [{"hardware": machine_of(job)} for job in recorded(tmp_path / "logs").values()]
    assert machines(rows) == "here, 2 cores; there, 2 cores"
    assert machine_of({}) == "there, 2 cores"  # an old record does not tell


def test_a_record_that_a_full_disk_has_cut_costs_its_own_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.studies.jobs.ROOT", tmp_path)
    (tmp_path / "make.py").write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).touch()\n")
    logs = record(tmp_path / "logs", {"job": "a", "seconds": 3.0}, {"job": "b", "seconds": 4.0})
    whole = (logs / "jobs.jsonl").read_bytes()
    (logs / "jobs.jsonl").write_bytes(whole[:-9])
    assert list(recorded(logs)) == ["a"]
    run_all([[Job(n, "make.py", [str(tmp_path / n)], tmp_path / n)] for n in "bc"], logs, 1)
    assert sorted(recorded(logs)) == ["a", "b", "c"]


def test_a_table_is_whole_or_as_it_was(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, int]]:
        yield {"x": 3}
        raise OSError(28, "No space left on device")

    write_csv(tmp_path / "league.csv", ["x"], [{"x": 1}, {"x": 2}])
    with pytest.raises(OSError, match="No space left"):
        write_csv(tmp_path / "league.csv", ["x"], broken())
    assert [row["x"] for row in read_csv(tmp_path / "league.csv")] == ["1", "2"]


def test_who_ends_the_tool_ends_its_commands_and_no_other_begins(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "long.py").write_text(f"import time; open({str(begun)!r}, 'w').close(); time.sleep(100)")
    body = f"""
from pathlib import Path
from tools.studies.jobs import Job, run_all
run_all([[Job(name, {str(tmp_path / "long.py")!r}, [], None) for name in "ab"]], Path({str(tmp_path)!r}), 1)
"""
    tool = subprocess.Popen([sys.executable, "-c", body], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    tool.send_signal(signal.SIGTERM)
    told = tool.communicate(timeout=60)[1]
    assert tool.returncode == 1 and told.strip() == STOPPED
    lines = recorded(tmp_path)
    assert set(lines) == {"a"} and lines["a"]["exit"] == -signal.SIGTERM
