"""A comparison at equal budgets that goes on: what is there is not run again, and nothing else is taken for it."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.files import write_sealed
from tests.compared_budgets import FOUND, SCHEMA, call, searched, trained
from tools.studies.earlier import Earlier


@pytest.fixture
def tool() -> ModuleType:
    return importlib.import_module("tools.studies.compare_budgets")


def test_what_an_earlier_table_tells_is_not_run_again_and_joins_the_new_one(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run directories of seed 0 are gone; its file goes on with a third budget and with seed 1."""
    data = tmp_path / "data"
    SCHEMA.save(data)
    old, new = tmp_path / "old", tmp_path / "new"
    searched(old, 0, "utilities", "20%", FOUND)
    trained(old, 0, "utilities-20pct", FOUND, 0.75)
    trained(old, 0, "ues-8", dict.fromkeys(SCHEMA.names, 8), 0.74)
    words = ["--methods", "utilities", "--data", str(data)]
    call(tool, monkeypatch, old, "--only-tables", "--seeds", "1", *words)
    earlier = ["--earlier", str(old / "comparison.csv"), *words]

    def names(*more: str) -> list[str]:
        capsys.readouterr()
        call(tool, monkeypatch, new, "--dry-run", *earlier, *more)
        return [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]

    # UES-4 and 50% are not in the file; the search has to be made again, as it was not made for 50%.
    assert names("--seeds", "1") == ["seed0-search-utilities", "seed0-ues-4", "seed0-utilities-50pct"]
    assert names("--seeds", "1", "--budgets", "20%") == ["seed0-ues-4"]
    # Fine-tuned models begin with the widest uniform one, which is made again.
    tuned = names("--seeds", "1", "--budgets", "20%", "--finetuned")
    own = ["ues-4", "ues-8", "ues-4-finetuned", "ues-8-finetuned", "utilities-20pct-finetuned"]
    assert tuned == ["seed0-search-utilities", *(f"seed0-{n}" for n in own)]
    assert {n[:5] for n in names("--first-seed", "1", "--seeds", "1")} == {"seed1"}
    # What is found again for 20% is no reason to train it.
    for budget, widths in (("20%", FOUND), ("50%", dict.fromkeys(SCHEMA.names, 8))):
        searched(new, 0, "utilities", budget, widths)
    assert names("--seeds", "1") == ["seed0-ues-4", "seed0-utilities-50pct"]

    trained(new, 0, "utilities-50pct", dict.fromkeys(SCHEMA.names, 8), 0.76)
    searched(new, 1, "utilities", "20%", FOUND)
    trained(new, 1, "utilities-20pct", FOUND, 0.77)
    call(tool, monkeypatch, new, "--only-tables", *earlier)
    with (new / "comparison.csv").open() as file:
        rows = [(r["seed"], r["method"], r["budget"], r["test_auc"]) for r in csv.DictReader(file)]
    assert rows == [
        ("0", "uniform", "", "0.74"),
        ("0", "utilities", "20%", "0.75"),
        ("0", "utilities", "50%", "0.76"),
        ("1", "utilities", "20%", "0.77"),
    ]
    assert "up to 2 seeds" in (new / "comparison.md").read_text()

    # A league's file has the name of the data set in front, and other sets beside it.
    head, *lines = (old / "comparison.csv").read_text().splitlines()
    league = [f"data_set,{head}", *(f"mine,{line}" for line in lines), *(f"other,{line}" for line in lines)]
    (tmp_path / "league.csv").write_text("\n".join(league) + "\n")
    earlier_mine = Earlier.read(tmp_path / "league.csv", data, "mine")
    assert len(earlier_mine.rows) == len(lines) and "data_set" not in earlier_mine.rows[0]


def test_an_earlier_table_of_other_data_or_another_backbone_is_refused(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    SCHEMA.save(data)
    trained(out, 0, "ues-8", dict.fromkeys(SCHEMA.names, 8), 0.74)
    words = ["--methods", "", "--data", str(data), "--only-tables"]
    call(tool, monkeypatch, out, *words)
    told = (out / "comparison.csv").read_text()
    file = tmp_path / "earlier.csv"
    for text, message in (
        (told.replace("deepfm", "fm").replace(",0,", ",1,", 1), "lines of more than one backbone: deepfm, fm"),
        (told.replace(SCHEMA.fingerprint, "abc"), r"seed 0 of uniform was trained on \S+ abc \d+ training rows, and"),
        ("a,b\n1,2\n", "column data is missing. Give the league.csv or comparison.csv"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit, match=message):
            call(tool, monkeypatch, out, *words, "--earlier", str(file))
    with pytest.raises(SystemExit, match="gone.csv: no such file"):
        call(tool, monkeypatch, out, *words, "--earlier", str(tmp_path / "gone.csv"))


def test_what_was_found_under_another_budget_or_precision_is_searched_again(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``utilities.json`` of an earlier call holds whatever budget came first there."""
    searched(tmp_path, 0, "utilities", "20%", FOUND)
    words = ["--methods", "utilities", "--seeds", "1", "--widths", ""]

    def commands(*more: str) -> dict[str, str]:
        call(tool, monkeypatch, tmp_path, "--dry-run", *words, *more)
        return {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}

    assert list(commands("--budgets", "20%")) == ["seed0-utilities-20pct"]
    for budgets in ("50%", "20%,50%", "50%,20%"):
        lines = commands("--budgets", budgets)
        assert (
            "--search.name=utilities-50pct --search.budget=50% '--search.pareto=[]'" in lines["seed0-search-utilities"]
        )
        assert "allocations/utilities-50pct.json " in lines["seed0-utilities-50pct"]
    assert "allocations/utilities.json " in lines["seed0-utilities-20pct"]
    lines = commands("--budgets", "50%,80%,20%")
    assert '--search.pareto=["80%"]' in lines["seed0-search-utilities"]
    assert "allocations/utilities-50pct-80pct.json " in lines["seed0-utilities-80pct"]

    # At a precision 20% are bytes: other tables, beside those that are there.
    lines = commands("--budgets", "20%", "--precision", "int8")
    assert "--search.name=utilities-int8-20pct " in lines["seed0-search-utilities"]
    assert commands("--budgets", "20%", "--extra", "search.precision=int8").keys() == lines.keys()

    # Names that hold the budget count, and what further budgets of a search are called; names alone do not.
    folder = tmp_path / "seed0" / "widest" / "allocations"
    for name, budget in (("utilities-50pct", "50%"), ("utilities-50pct-80pct", "80%"), ("utilities-90pct", "91%")):
        Allocation(SCHEMA, FOUND | {"f2": len(name)}, {"budget": budget}).save(folder / f"{name}.json")
    assert list(commands("--budgets", "50%,20%,80%")) == [f"seed0-utilities-{b}pct" for b in (50, 20, 80)]
    assert list(commands("--budgets", "90%")) == ["seed0-search-utilities", "seed0-utilities-90pct"]


def test_a_finished_training_of_other_tables_than_asked_is_refused(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its place has the name of what is asked, which would be the line of the table."""
    words = ["--methods", "utilities", "--seeds", "1", "--widths", "4", "--budgets", "50%"]
    trained(tmp_path, 0, "utilities-50pct", FOUND, 0.76)
    place = tmp_path / "seed0" / "models" / "retrain" / "utilities-50pct"
    Allocation(SCHEMA, FOUND, {"budget": "20%"}).save(place / "allocation.json")
    for way in ("--dry-run", "--only-tables"):
        with pytest.raises(
            SystemExit, match=f"{place}: its tables were found under the budget 20pct, and 50pct is asked"
        ):
            call(tool, monkeypatch, tmp_path, *words, way)
    Allocation(SCHEMA, FOUND, {"budget": "50%"}).save(place / "allocation.json")
    with pytest.raises(SystemExit, match="under the budget 50pct, and 50pct at int8 is asked. Delete this folder"):
        call(tool, monkeypatch, tmp_path, *words, "--only-tables", "--precision", "int8")
    searched(tmp_path, 0, "utilities", "50%", FOUND)
    call(tool, monkeypatch, tmp_path, *words, "--only-tables")
    searched(tmp_path, 0, "utilities", "50%", FOUND | {"f0": 8})
    with pytest.raises(SystemExit, match="utilities-50pct.json, which a later search has written. Delete this folder"):
        call(tool, monkeypatch, tmp_path, *words, "--only-tables")
    trained(tmp_path, 0, "ues-4", dict.fromkeys(SCHEMA.names, 4), 0.7)
    with pytest.raises(SystemExit, match="ues-4: measured as trained alone, and --precision int8 is asked"):
        call(tool, monkeypatch, tmp_path, "--methods", "", *words[2:], "--precision", "int8")
    chosen = tmp_path / "seed0" / "auto-50pct"
    write_sealed(chosen / "final.json", {"model": "retrain/auto"})
    Allocation(SCHEMA, FOUND, {"budget": "50%", "precision": "int8"}).save(chosen / "allocation.json")
    with pytest.raises(
        SystemExit, match=f"{chosen}: its tables were found under the budget 50pct at int8, and 50pct is"
    ):
        call(tool, monkeypatch, tmp_path, "--methods", "auto", *words[2:], "--only-tables")
