"""The comparison at equal budgets: its jobs, what is trained once, and the tables and verdicts from finished runs."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.files import write_json, write_sealed
from embsearch_dist.kept_values import KeptValues
from tests.compared_budgets import CONFIG, FOUND, ROOT, SCHEMA, call, searched, trained
from tests.factories import CONFIGS
from tools.studies.finals import copy_search


@pytest.fixture
def tool() -> ModuleType:
    return importlib.import_module("tools.studies.compare_budgets")


def test_a_dry_run_lists_every_command_and_starts_none(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["--variants", "plain:model.unify=mixed,model.hidden=[8,4]", "--settings", "utilities:search.evidence=2"]
    call(tool, monkeypatch, tmp_path, "--dry-run", *variants)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0] for line in lines]
    assert len(names) == len(set(names)) == 2 * (4 + 4 + 8)
    assert "seed1-ues-8-plain" in names and "seed0-magnitude-50pct" in names
    assert next(x for x in lines if x.startswith("seed0-search-utilities")).endswith("--search.evidence=2")
    assert "--model.unify=mixed '--model.hidden=[8,4]' --allocation ues-4 --name ues-4-plain" in "".join(lines)
    assert not list(tmp_path.glob("seed*"))
    for method in ("utilities", "fdo", "magnitude"):  # the written configs have the recipe, and keys that are there
        config = load_config(CONFIGS, tmp_path / "configs" / f"{method}.yaml")
        assert config.train.batch_size == yaml.safe_load(CONFIG.read_text())["train"]["batch_size"]
        assert config.search.width == 32


def test_every_method_with_budgets_can_be_compared_under_one_recipe(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Search sections are those of the configs in the folder, or the methods' defaults."""
    one = ROOT / "configs" / "movielens_1m_time" / "ues_deepfm.yaml"
    methods = [m for m in tool.comparable() if m != "adass"]
    assert {"utilities", "fdo", "magnitude", "random", "mde", "sseds", "autofield", "autodim"} <= set(methods)
    call(tool, monkeypatch, tmp_path, "--dry-run", "--methods", ",".join(methods), config=one)
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    recipe = yaml.safe_load(one.read_text())
    for method in methods:
        config = load_config(CONFIGS, tmp_path / "configs" / f"{method}.yaml")
        assert (config.train.epochs, config.optim.embedding_l2) == (8, recipe["optim"]["embedding_l2"])
        if hasattr(config.search, "training"):
            assert (config.search.training.batch_size, config.search.training.epochs) == (512, 8)
        folder = "widest" if method in ("utilities", "fdo", "magnitude", "sseds") else method
        folder, name = ("auto-20pct", "search-auto-20pct") if method == "auto" else (folder, f"search-{method}")
        command, result = lines[f"seed0-{name}"], method if method == "auto" else f"{method}-20pct"
        assert f"seed0/{folder} " in command and f"--search.name={result} " in command
        assert hasattr(config.search, "width") is False or config.search.width in (16, 32)
    assert load_config(CONFIGS, tmp_path / "configs" / "autofield.yaml").search.width == 16  # its own config says so
    with pytest.raises(SystemExit, match="--methods adass: .* is a config of ues"):
        call(tool, monkeypatch, tmp_path, "--dry-run", "--methods", "adass", config=one)


def test_the_line_of_auto_is_that_of_the_model_it_chooses(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--methods", "auto", "--seeds", "1", "--widths", "4"]
    call(tool, monkeypatch, tmp_path, "--dry-run", *words)
    chains = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    budgets = ("20pct", "50pct")
    assert chains == ["seed0-ues-4", *(f"seed0-{job}-{b}" for b in budgets for job in ("search-auto", "auto"))]
    trained(tmp_path, 0, "ues-4", dict.fromkeys(SCHEMA.names, 4), 0.70)
    home = tmp_path / "seed0" / "auto-20pct"
    for name, auc in (("auto", 0.71), ("ues-6-finetuned", 0.72)):
        trained(tmp_path, 0, name, FOUND, auc)
        shutil.move(tmp_path / "seed0" / "models" / "retrain" / name, home / "retrain" / name)
    write_sealed(home / "final.json", {"name": "ues-6-finetuned", "model": "retrain/ues-6-finetuned"})
    call(tool, monkeypatch, tmp_path, "--dry-run", *words)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [chains[0], *chains[-2:]]
    call(tool, monkeypatch, tmp_path, "--only-tables", *words)
    with (tmp_path / "comparison.csv").open() as file:
        lines = {(r["method"], r["budget"]): r["test_auc"] for r in csv.DictReader(file)}
    assert lines == {("uniform", ""): "0.7", ("auto", "20%"): "0.72"}


def test_auto_begins_with_the_widest_model_of_other_searches(tmp_path: Path) -> None:
    (tmp_path / "widest" / "checkpoints" / "retrain").mkdir(parents=True)
    (tmp_path / "widest" / "retrain").mkdir()
    copy_search(tmp_path / "widest", tmp_path / "auto")
    assert [p.name for p in (tmp_path / "auto").iterdir()] == ["checkpoints"]
    assert (tmp_path / "auto" / "checkpoints" / "retrain").exists()
    (tmp_path / "widest" / "new").touch()
    copy_search(tmp_path / "widest", tmp_path / "auto")  # what has begun goes on
    copy_search(tmp_path / "nothing", tmp_path / "other")
    assert not (tmp_path / "auto" / "new").exists() and not (tmp_path / "other").exists()


def test_widths_that_are_the_same_are_trained_once(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for budget in ("20%", "50%"):
        searched(tmp_path, 0, "utilities", budget, FOUND)
        searched(tmp_path, 0, "fdo", budget, dict.fromkeys(SCHEMA.names, 4))
    call(tool, monkeypatch, tmp_path, "--dry-run", "--methods", "utilities,fdo", "--seeds", "1")
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["seed0-ues-4", "seed0-ues-8", "seed0-utilities-20pct"]


def test_all_is_fine_tuned_from_the_widest_uniform_model_and_judged_apart(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(tmp_path, 0, "utilities", "20%", FOUND)
    searched(tmp_path, 0, "utilities", "50%", dict.fromkeys(SCHEMA.names, 4))
    words = ["--methods", "utilities", "--seeds", "1", "--finetuned"]
    call(tool, monkeypatch, tmp_path, "--dry-run", *words)
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    fresh = ["seed0-ues-4", "seed0-ues-8", "seed0-utilities-20pct"]
    assert list(lines) == [*fresh, *(f"{name}-finetuned" for name in fresh)]
    widest = tmp_path / "seed0" / "models" / "retrain" / "ues-8"
    for name in fresh:
        assert f"--from {widest} --from-optimizer false" in lines[f"{name}-finetuned"] and "--from" not in lines[name]
    trained(tmp_path, 0, "utilities-20pct", FOUND, 0.70)
    trained(tmp_path, 0, "utilities-20pct-finetuned", FOUND, 0.75)
    for width, auc in ((4, 0.68), (8, 0.71)):
        trained(tmp_path, 0, f"ues-{width}", dict.fromkeys(SCHEMA.names, width), auc)
        trained(tmp_path, 0, f"ues-{width}-finetuned", dict.fromkeys(SCHEMA.names, width), auc + 0.02)
    call(tool, monkeypatch, tmp_path, "--only-tables", *words)
    text = capsys.readouterr().out
    assert "- **utilities, budget 20%**: at 19% of UES-32: -0.0100 AUC over UES-8, " in text
    assert "- **utilities fine-tuned, budget 20%**: at 19% of UES-32: +0.0200 AUC over UES-8 fine-tuned, " in text
    # Both budgets of utilities that gave uniform widths are those models.
    assert "| utilities fine-tuned 50% | 400 | 12% | 0.7000 (one seed) |" in text


def test_tables_of_the_same_widths_and_other_values_are_trained_each(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, size = SCHEMA.names[0], SCHEMA.cardinalities[0]
    for text, budget, kept in (("optfs", "20%", size // 2), ("optfs-50pct", "50%", size - 1)):
        values = {name: KeptValues.of(np.arange(size) < kept)}
        found = Allocation(SCHEMA, dict.fromkeys(SCHEMA.names, 4), {"budget": budget}, values=values)
        found.save(tmp_path / "seed0" / "optfs" / "allocations" / f"{text}.json")
    call(tool, monkeypatch, tmp_path, "--dry-run", "--methods", "optfs", "--seeds", "1")
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names[-2:] == ["seed0-optfs-20pct", "seed0-optfs-50pct"]


def test_tables_and_verdicts_come_from_what_is_finished(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, (ours, eight, fdo) in enumerate([(0.760, 0.757, 0.758), (0.764, 0.759, 0.757)]):
        searched(tmp_path, seed, "utilities", "20%", FOUND)
        searched(tmp_path, seed, "fdo", "20%", {"f0": 5, "f1": 5, "f2": 4})
        trained(tmp_path, seed, "utilities-20pct", FOUND, ours)
        trained(tmp_path, seed, "fdo-20pct", {"f0": 5, "f1": 5, "f2": 4}, fdo)
        trained(tmp_path, seed, "ues-4", dict.fromkeys(SCHEMA.names, 4), 0.79)
        trained(tmp_path, seed, "ues-8", dict.fromkeys(SCHEMA.names, 8), eight)
    log = {"job": "seed0-search-utilities", "seconds": 40.0, "exit": 1, "commit": "abc", "command": "python x"}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "jobs.jsonl").write_text(json.dumps(log) + "\n" + json.dumps({**log, "seconds": 2.0}) + "\n")
    call(tool, monkeypatch, tmp_path, "--only-tables")
    text = capsys.readouterr().out
    assert (tmp_path / "comparison.md").read_text() in text
    assert (
        "- **utilities, budget 20%**: at 19% of UES-32: +0.0040 AUC over UES-8, the best uniform width that is not "
        "smaller (25%), 2 seeds, s.e. 0.0010: better; at 19% of UES-32: +0.0045 AUC over fdo 20%" in text
    )
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert len(rows) == 8
    ours = next(r for r in rows if r["method"] == "utilities" and r["seed"] == "0")
    assert (ours["widths"], ours["parameters"]) == ("f0=6 f1=8 f2=2", "620")
    assert float(ours["validation_auc"]) == pytest.approx(0.78)  # of step 20, whose weights were kept
    assert (ours["search_seconds"], ours["training_seconds"]) == ("42.0", "12.3")
    assert (tmp_path / "comparison.png").exists()


def test_a_command_in_the_table_names_no_folder_of_the_machine(tool: ModuleType, tmp_path: Path) -> None:
    words = (
        f"python launch/retrain.py --config {CONFIG} --data.path={tmp_path}/data --run.dir={tmp_path}/out/seed0/models"
    )
    told = "python launch/retrain.py --config configs/synthetic/adass_deepfm.yaml --data.path=PREPARED"
    assert importlib.import_module("tools.studies.budget_tables").portable(words, tmp_path / "out") == (
        f"{told} --run.dir=OUT/seed0/models"
    )


def test_at_a_precision_bytes_and_figures_as_served_judge(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--precision", "int8", "--methods", "utilities", "--budgets", "ues-12"]
    call(tool, monkeypatch, tmp_path, *arguments, "--dry-run")
    jobs = capsys.readouterr().out.splitlines()
    assert all("--search.precision=int8" in line for line in jobs)
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}" / "widest" / "allocations"
        told = {"budget": "ues-12", "precision": "int8"}
        Allocation(SCHEMA, {"f0": 12, "f1": 28, "f2": 0}, told).save(folder / "utilities.json")
        for name, width, auc in (("utilities-ues-12", 0, 0.753), ("ues-4", 4, 0.7), ("ues-8", 8, 0.75 - 0.001 * seed)):
            widths = dict.fromkeys(SCHEMA.names, width) if width else {"f0": 12, "f1": 28, "f2": 0}
            size = Allocation(SCHEMA, widths).total("served_int8")
            served = {"precision": "int8", "bytes": size, "ues32_bytes": 4800, "auc": auc, "logloss": 0.6}
            trained(tmp_path, seed, name, widths, 0.9, served)
    call(tool, monkeypatch, tmp_path, *arguments, "--only-tables")
    text = capsys.readouterr().out
    # 60 rows of 16 bytes and 30 of 32 are more than UES-8 takes, 100 of 16; so no width judges.
    assert "- **utilities, budget ues-12**: no verdict: no uniform width that is not smaller was trained" in text
    assert "| UES-8 | 1,600 | 33% | 0.7495 (0.0005) | 0.6000 |" in text and "| bytes at int8 |" in text
    row = next(r for r in csv.DictReader((tmp_path / "comparison.csv").open()) if r["method"] == "utilities")
    assert (row["precision"], row["served_bytes"], row["served_auc"]) == ("int8", "1920", "0.753")


def test_a_comparison_of_nothing_and_wrong_arguments_are_told(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="no training is finished yet"):
        call(tool, monkeypatch, tmp_path, "--only-tables")
    with pytest.raises(SystemExit, match="--methods truncation: none of adass"):
        call(tool, monkeypatch, tmp_path, "--methods", "truncation")
    with pytest.raises(SystemExit, match="--variants plain: write NAME:section.key=value"):
        call(tool, monkeypatch, tmp_path, "--variants", "plain")
    with pytest.raises(SystemExit, match="--finetuned begins with the widest uniform width: name one"):
        call(tool, monkeypatch, tmp_path, "--finetuned", "--widths", "")


def test_searches_alone_are_a_comparison_without_verdict(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ["--methods", "utilities", "--widths", ""]
    call(tool, monkeypatch, tmp_path, *alone, "--dry-run")
    assert all("utilities" in line.split(":")[0] for line in capsys.readouterr().out.splitlines())
    searched(tmp_path, 0, "utilities", "20%", FOUND)
    trained(tmp_path, 0, "utilities-20pct", FOUND, 0.76)
    call(tool, monkeypatch, tmp_path, *alone, "--only-tables")
    assert "no verdict: no uniform width that is not smaller was trained" in capsys.readouterr().out


def test_a_shared_training_counts_in_full_for_each_search_that_needs_it(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Utilities ran first and trained the widest model, which took 30 of their 42 seconds; fdo found it there."""
    found = {"utilities": FOUND, "fdo": {"f0": 5, "f1": 5, "f2": 4}, "random": {"f0": 4, "f1": 8, "f2": 8}}
    for method, widths in found.items():
        searched(tmp_path, 0, method, "20%", widths)
        trained(tmp_path, 0, f"{method}-20pct", widths, 0.76)
    trained(tmp_path, 0, "ues-4", dict.fromkeys(SCHEMA.names, 4), 0.75)
    trained(tmp_path, 0, "ues-8", dict.fromkeys(SCHEMA.names, 8), 0.75)
    write_json(tmp_path / "seed0" / "widest" / "widest" / "training.json", {"seconds": 60.0, "best_step": 1})
    # By the clock twice as long as on the processor: the machine did something else, too; of fdo three times.
    jobs = [
        ("search-utilities", 84.0, 42.0, False),
        ("search-fdo", 18.0, 6.0, True),
        ("search-random", 10.0, 5.0, None),
    ]
    jobs += [("ues-4", 32.0, 16.0, None), ("ues-8", 40.0, 20.0, None)]
    (tmp_path / "logs").mkdir()
    told: list[dict[str, object]] = []
    for name, seconds, processor, there in jobs:
        line = {"job": f"seed0-{name}", "seconds": seconds, "cpu_seconds": processor, "exit": 0}
        shared = {} if there is None else {"found": there, "shared": "seed0/widest/widest/training.json"}
        told.append({**line, "commit": "abc", "command": "x", **shared})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "logs" / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    call(tool, monkeypatch, tmp_path, "--only-tables", "--methods", "utilities,fdo,random", "--seeds", "1")
    rows = {r["method"]: r for r in csv.DictReader((tmp_path / "comparison.csv").open())}
    cost = {m: (r["search_seconds"], r["search_cost_seconds"], r["search_cost"]) for m, r in rows.items()}
    assert cost["utilities"] == ("84.0", "42.0", "2.100")
    assert cost["fdo"] == ("18.0", "36.0", "1.800")
    assert cost["random"] == ("10.0", "5.0", "0.250")
    assert {r["cost_clock"] for m, r in rows.items() if m != "uniform"} == {"processor"}
    assert cost["uniform"] == ("", "", "")
    assert rows["fdo"]["cost_reference"] == "UES-8"  # the widest, as there is no UES-32
    ours = rows["utilities"]
    # 60 rows of 6 columns, 30 of 8, 10 of 2: rows of 16 bytes at int8, of 32, 32 and 16 bytes at fp32.
    assert (ours["served_int8_bytes"], ours["served_fp32_bytes"]) == ("1600", str(60 * 32 + 30 * 32 + 10 * 16))
    # auto, which has nothing left to search, chooses between models that take 48 seconds to train.
    chosen = tmp_path / "seed0" / "auto-20pct"
    shutil.copytree(tmp_path / "seed0" / "models" / "retrain" / "utilities-20pct", chosen / "retrain" / "found")
    write_sealed(chosen / "final.json", {"model": "retrain/found"})
    choice = {
        "job": "seed0-auto-20pct",
        "seconds": 50.0,
        "cpu_seconds": 48.0,
        "exit": 0,
        "commit": "abc",
        "command": "x",
    }
    (tmp_path / "logs" / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*told, choice]))
    both = ["--only-tables", "--methods", "utilities,auto", "--seeds", "1"]
    call(tool, monkeypatch, tmp_path, *both)
    rows = {r["method"]: r for r in csv.DictReader((tmp_path / "comparison.csv").open())}
    assert (rows["auto"]["search_cost_seconds"], rows["auto"]["search_cost"]) == ("90.0", "4.500")
    told[1].pop("found")  # a record of before
    (tmp_path / "logs" / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    call(tool, monkeypatch, tmp_path, "--only-tables", "--methods", "utilities,fdo,random", "--seeds", "1")
    rows = {r["method"]: r for r in csv.DictReader((tmp_path / "comparison.csv").open())}
    assert (rows["fdo"]["search_cost"], rows["random"]["search_cost"]) == ("", "0.250")
