"""tools/studies/planted.py: what it runs, and what it makes of the results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.files import write_sealed
from embsearch_dist.schema import Schema
from tools.studies import planted
from tools.studies.asked import keep_to
from tools.studies.jobs import Job
from tools.studies.stability import across

AUC = {"found": [0.80, 0.83], "ues-4": [0.78, 0.81], "ues-16": [0.81, 0.79]}  # of seeds 0 and 1
AUC |= {"found-finetuned": [0.84, 0.82], "ues-4-finetuned": [0.79, 0.80], "ues-16-finetuned": [0.82, 0.78]}
KEPT = 8  # width of the fields whose planted rank is not 0; "idle" of the others


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that would have been run; each leaves a result in place of a training."""
    ran: list[Job] = []

    def run_all(chains: list[list[Job]], logs: Path, side_by_side: int) -> None:
        for job in (job for chain in chains for job in chain if not job.done):
            ran.append(job)
            leave_result(job)

    monkeypatch.setattr(planted, "run_all", run_all)
    return ran


def leave_result(job: Job) -> None:
    assert job.result is not None
    job.result.parent.mkdir(parents=True, exist_ok=True)
    seed, _, name = job.name.removeprefix("seed").partition("-")
    if name:
        figures = {"auc": AUC[name][int(seed)], "embedding_parameters": 100}
        job.result.write_text(json.dumps(figures))
        return
    truth = json.loads((job.result.parents[1] / f"data{seed}" / "truth.json").read_text())["rank"]
    idle = 2 * int(seed)  # seed 1 keeps what it should drop
    write_sealed(job.result, {"widths": {n: KEPT * rank if rank else idle for n, rank in truth.items()}})


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> list[dict[str, Any]]:
    monkeypatch.setattr("sys.argv", ["planted.py", "--out", str(out), "--rows", "300", "--seeds", "2", *more])
    planted.main()
    with (out / "planted.csv").open() as file:
        return list(csv.DictReader(file))


def test_all_sides_are_trained_from_fresh_weights_and_compared_seed_by_seed(
    monkeypatch: pytest.MonkeyPatch, commands: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = call(monkeypatch, tmp_path, "--beside", "ues-4", "ues-16")
    trainings = [job.arguments for job in commands if "retrain" in job.script]
    assert len(trainings) == 6
    assert all(list(arguments[-2:]) == ["--finetune", "false"] for arguments in trainings)
    assert [(r["seed"], r["best_other"], r["above_it"]) for r in lines] == [
        ("0", "ues-16", "-0.0100"),
        ("1", "ues-4", "+0.0200"),
    ]
    assert [float(r["found"]) for r in lines] == AUC["found"]
    whole = 32 * sum(Schema.load(tmp_path / "data0").cardinalities)
    assert lines[0]["share_of_ues32"] == f"{100 / whole:.1%}"
    assert "+0.0050 on average, -0.0100 at least" in capsys.readouterr().out


def test_fine_tuned_what_was_found_is_judged_by_the_best_of_all_others(
    monkeypatch: pytest.MonkeyPatch, commands: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = call(monkeypatch, tmp_path, "--beside", "ues-4", "ues-16", "--finetuned")
    trainings = [job.arguments for job in commands if "retrain" in job.script]
    assert [a[-1] for a in trainings] == 2 * (3 * ["false"] + 3 * ["true"])
    again = [a for a in trainings if a[-1] == "true"]
    assert [a[a.index("--allocation") + 1].rpartition("/")[2] for a in again[:3]] == [
        "allocation.json",
        "ues-4",
        "ues-16",
    ]
    assert [(r["best_other"], r["above_it"]) for r in lines] == [("ues-16-finetuned", "+0.0200"), ("ues-4", "+0.0100")]
    assert [float(r["found_finetuned"]) for r in lines] == AUC["found-finetuned"]
    assert "test AUC of found-finetuned above" in capsys.readouterr().out and "--finetuned" in lines[0]["command"]


def test_idle_fields_that_were_kept_are_counted(
    monkeypatch: pytest.MonkeyPatch, commands: list[Job], tmp_path: Path
) -> None:
    lines = call(monkeypatch, tmp_path)
    truth = json.loads((tmp_path / "data1" / "truth.json").read_text())["rank"]
    idle = sum(rank == 0 for rank in truth.values())
    assert idle and [r["idle_fields_kept"] for r in lines] == ["0", str(idle)]
    assert [float(r["spearman"]) for r in lines] == pytest.approx([1.0, 1.0])
    assert "best_other" not in lines[0]  # nothing was trained


def test_other_idle_fields_are_planted_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, commands: list[Job], tmp_path: Path
) -> None:
    lines = call(monkeypatch, tmp_path, "--idle", "3", "5")
    truth = json.loads((tmp_path / "data1" / "truth.json").read_text())["rank"]
    assert sum(rank == 0 for rank in truth.values()) == 2 == int(lines[1]["idle_fields_kept"])
    assert "--idle 3 5" in lines[0]["command"]


def test_what_is_there_is_not_run_again(monkeypatch: pytest.MonkeyPatch, commands: list[Job], tmp_path: Path) -> None:
    first = call(monkeypatch, tmp_path, "--beside", "ues-4")
    ran = len(commands)
    assert call(monkeypatch, tmp_path, "--beside", "ues-4") == first and len(commands) == ran


def test_results_of_other_settings_are_not_taken_for_these(
    monkeypatch: pytest.MonkeyPatch, commands: list[Job], tmp_path: Path
) -> None:
    call(monkeypatch, tmp_path, "--idle", "3", "5")
    with pytest.raises(SystemExit, match=r"other settings: --idle \[3, 5\], now \[3, 6\]. Give another --out"):
        call(monkeypatch, tmp_path, "--idle", "3", "6")
    with pytest.raises(SystemExit, match="--extra"):
        call(monkeypatch, tmp_path, "--idle", "3", "5", "--extra", "train.epochs=9")
    assert len(call(monkeypatch, tmp_path, "--idle", "3", "5", "--beside", "ues-4")) == 2  # more of the same may follow


def test_a_config_counts_by_its_text(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.yaml").write_text("a: 1\n")
        keep_to(tmp_path / "out", config=tmp_path / name / "c.yaml")
    (tmp_path / "other" / "c.yaml").write_text("a: 2\n")
    with pytest.raises(SystemExit, match="--config c.yaml"):
        keep_to(tmp_path / "out", config=tmp_path / "other" / "c.yaml")


def test_widths_across_searches_are_found_by_the_names_of_their_fields(tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.json" for k in range(3)]
    for file, widths in zip(files, ({"a": 1, "b": 8}, {"b": 8, "a": 2}, {"a": 1, "c": 8}), strict=True):
        file.write_text(json.dumps({"widths": widths}))
    assert across(files[:2]) == (["a", "b"], [[1, 8], [2, 8]])
    with pytest.raises(SystemExit, match="2.json has other fields than"):
        across(files)
