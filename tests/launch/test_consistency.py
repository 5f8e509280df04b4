"""Ranking by inherited scores: its taus by hand, subnets of a table, and a tiny study from start to table."""

from __future__ import annotations

import csv
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.schema import Field, Schema
from embsearch_dist.width_table import Space, WidthTable
from tests.factories import one_rank
from tests.launch.processes import ROOT
from tests.scripts import fork_script
from tools.studies import alone, consistency
from tools.studies.alone import Truth, of_table, tau
from tools.studies.consistency import SETTINGS, measured, training_only
from tools.studies.jobs import Ended, write_csv


def test_taus_and_ceiling_of_hand_made_scores() -> None:
    truth = Truth(np.zeros((3, 1), int), np.array([[1, 2, 3], [3, 2, 1]]) / 10, np.array([[1, 2, 3], [1, 3, 2]]) / 10)
    assert tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert truth.noise() == pytest.approx(1 / 3)
    # Seed 0's validation ranks seed 1's test rows by 1/3, seed 1's those of seed 0 by -1.
    assert truth.ceiling() == pytest.approx((1 / 3 - 1) / 2)
    row = measured(truth, [0.5, 0.4, 0.3])
    assert row["subnets"] == 3 and row["tau_test"] == pytest.approx(-0.8165, abs=1e-4)  # means .1, .25, .25
    assert row["regret"] == pytest.approx(0.15)
    assert math.isnan(Truth(truth.choices, truth.validation[:1], truth.test[:1]).ceiling())


def test_every_allocation_of_a_table_is_a_subnet(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "config: any.yaml\n"
        "groups:\n  a: {fields: [big], widths: [0, 4]}\n  b: {fields: [left, right], widths: [2, 4]}\n"
    )
    space = Space.load(tmp_path / "space.yaml")
    rows = [
        {"a": a, "b": b, "seed": s, "parameters": 100 * a + 40 * b}
        | {key: a + 10 * b + 100 * s + k for k, key in enumerate(("validation_auc", "test_auc"))}
        | {"validation_logloss": 1, "test_logloss": 1}
        for a, b in space.every
        for s in (0, 1)
    ]
    table = WidthTable(space, [{k: str(v) for k, v in row.items()} for row in rows])
    truth = of_table(table, Schema("any", (Field("left", 10), Field("big", 100), Field("right", 30))))
    assert truth.choices.tolist() == [[1, 0, 1], [2, 0, 2], [1, 2, 1], [2, 2, 2]]
    assert truth.test[1].tolist() == [121, 141, 125, 145] and truth.validation[0].tolist() == [20, 40, 24, 44]


def test_settings_that_differ_in_scoring_share_a_supernet() -> None:
    plain = [name for name, setting in SETTINGS.items() if not training_only(setting)]
    assert plain == ["as configured", "last weights", "2,000 scored rows", "heads refitted"]


@pytest.mark.slow
def test_a_tiny_study_from_start_to_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, config: Path
) -> None:
    started: list[str] = []

    def run(command: list[str], printed: TextIO, environment: dict[str, str]) -> Ended:
        started.append(Path(printed.name).stem)
        done = fork_script(Path(command[3]), command[4:], ROOT, environment | {"PYTHONPATH": str(ROOT)}, 120, tmp_path)
        assert done is not None
        printed.write(done.stdout + done.stderr)
        return Ended(done.returncode, 0.0, 0.5)

    monkeypatch.setattr("tools.studies.jobs.run_command", run)
    monkeypatch.setattr(consistency, "start", lambda run, dist: nullcontext(one_rank()))
    out = tmp_path / "out"
    words = ["--config", config, "--data", data, "--out", out, "--subnets", 3, "--truths", 2, "--seeds", 1, "--jobs", 1]
    words += ["--extra", "train.steps=3", "search.supernet.steps=3", "run.threads=1", "--settings"]
    words += [
        "plain:run.threads=1",
        "last:search.supernet.keep=last,run.threads=1",
        "layer:search.sampling.eq5=layernorm",
    ]
    monkeypatch.setattr(sys, "argv", ["consistency.py", *map(str, words)])
    consistency.main()
    assert len(started) == 2 + 1 + 3 * 2
    consistency.main()
    assert len(started) == 2 + 1 + 3 * 2
    rows = list(csv.DictReader((out / "consistency.csv").open()))
    assert [r["setting"] for r in rows] == ["plain", "last", "layer", consistency.CUT_DOWN]
    assert all(-1 <= float(r[key]) <= 1 for r in rows for key in ("tau_test", "tau_validation", "ceiling", "noise"))
    assert all(float(r["regret"]) >= 0 and str(out) not in r["command"] and str(data) not in r["command"] for r in rows)
    assert (out / "consistency.md").read_text().count("\n| ") == 6  # a head, a rule, four settings
    trained = list(csv.DictReader((out / "subnets.csv").open()))
    assert [(r["subnet"], r["seed"]) for r in trained] == [(k, s) for s in "01" for k in "012"]
    assert all(str(out) not in r["command"] and str(data) not in r["command"] and r["commit"] for r in trained)
    go_on_elsewhere(monkeypatch, words, out, started)


def go_on_elsewhere(monkeypatch: pytest.MonkeyPatch, words: list[Any], out: Path, started: list[str]) -> None:
    """What the files tell is not run again in another folder; other trainings alone are refused."""
    other, before = out.with_name("other"), len(started)
    begun = ["--alone", out / "subnets.csv", "--earlier", out / "consistency.csv"]
    again = [other if word == out else word for word in words] + ["printed:search.sampling.eq5=layernorm"]
    monkeypatch.setattr(sys, "argv", ["consistency.py", *map(str, [*again, *begun])])
    consistency.main()
    assert len(started) == before + 1  # the supernet of the new setting
    assert (other / "subnets.csv").read_text() == (out / "subnets.csv").read_text()
    rows, old = (list(csv.DictReader((d / "consistency.csv").open())) for d in (other, out))
    assert [r for r in rows if r["setting"] != "printed"] == old
    for truths, told in ((1, "here nan"), (3, "3 of them are still to be run")):
        others = [truths if word == 2 else word for word in again]
        monkeypatch.setattr(sys, "argv", ["consistency.py", *map(str, [*others, *begun])])
        with pytest.raises(SystemExit, match=f"judged by other trainings alone .*{told}"):
            consistency.main()
    assert len(started) == before + 1


def test_an_earlier_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "consistency.csv"
    with pytest.raises(UserError, match="no such file"):
        consistency.lines_of(path)
    path.write_text("setting,seed\nplain,0\n")
    with pytest.raises(UserError, match="column subnets is missing"):
        consistency.lines_of(path)


def test_lines_of_other_subnets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "subnets.csv"
    with pytest.raises(UserError, match="no such file"):
        alone.read_lines(path, [])
    path.write_text("subnet,seed\n0,1\n")
    with pytest.raises(UserError, match="column widths is missing"):
        alone.read_lines(path, ["a=4"])
    line = dict.fromkeys(alone.COLUMNS, "1") | {"subnet": "0", "seed": "2", "widths": alone.told({"a": 4, "b": 8})}
    write_csv(path, alone.COLUMNS, [line])
    assert alone.read_lines(path, ["a=4 b=8"]) == {(0, 2): line}
    with pytest.raises(UserError, match="line 2: subnet 0 has the widths a=4 b=8, and the one of this study has a=8"):
        alone.read_lines(path, ["a=8 b=8"])


def test_only_subnets_that_keep_the_named_fields_judge(tmp_path: Path, data: Path, config: Path) -> None:
    def study(*words: Any) -> consistency.Study:
        given = ["--config", config, "--data", data, "--out", tmp_path, "--subnets", 12, "--truths", 2, *words]
        return consistency.Study(consistency.parser().parse_args([str(word) for word in given]))

    plain, path = study(), tmp_path / "subnets.csv"
    lines = [
        dict.fromkeys(alone.COLUMNS, "1")
        | {"subnet": k, "seed": s, "widths": alone.told(plain.widths(k)), "validation_auc": k + s, "test_auc": 100 * k}
        for s in range(2)
        for k in range(12)
    ]
    write_csv(path, alone.COLUMNS, lines)
    name = plain.schema.names[0]
    keep = [k for k in range(12) if plain.widths(k)[name]]
    assert 2 <= len(keep) < 12
    truth = study("--alone", path, "--keeping", name).truth()
    assert truth.test[0].tolist() == [100 * k for k in keep]
    assert truth.choices.shape == (len(keep), len(plain.schema.names))
    assert study("--alone", path).truth().test.shape == (2, 12)
    with pytest.raises(UserError, match="--keeping: .* has no field 'nothing'"):
        study("--keeping", "nothing")
    with pytest.raises(UserError, match=f"--keeping {name}: [01] of 1 subnets keep them all"):
        study("--alone", path, "--keeping", name, "--subnets", 1).truth()
