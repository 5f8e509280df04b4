"""Every method of the table keeps the contract: budgets, resume, refusals, records, pictures."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods import CONFIGS, METHODS
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.report import write_report
from embsearch_dist.run import Run
from embsearch_dist.rundir import release
from embsearch_dist.train.faults import VARIABLE
from tests.factories import one_rank, prepared
from tests.method_contract import (
    BUDGET,
    Case,
    copy_of,
    marks,
    read_found,
    records,
    steps_of,
    weights,
)

ALIKE = {"autodim", "autofield", "autosrh", "esapn", "mde", "optembed", "random", "truncation"}
"""Searches for widths, whose pages have no part that those of adass, autoemb, sseds and utilities lack."""


@pytest.fixture(scope="module", params=sorted(METHODS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, str(prepared(tmp_path_factory)))


@pytest.fixture(scope="module")
def searched(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search; nobody writes into it."""
    return case.search(tmp_path_factory.mktemp(case.name) / "run", one_rank())


@pytest.fixture(scope="module")
def trained(case: Case, searched: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of what was trained of the result, in a copy of the search."""
    home = copy_of(searched.dir, tmp_path_factory.mktemp("trained") / "run")
    if case.method.result:
        case.retrain(home, one_rank())
    return home


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    release()


def test_every_stage_is_done_and_the_result_can_be_read(case: Case, searched: Run) -> None:
    assert {m["state"] for m in marks(searched).values()} == {"done"}
    assert list(marks(searched)) == sorted(s.name for s in case.method.stages())
    if case.method.result:
        read_found(searched, case.method)
    else:
        assert list((searched.dir / "retrain").glob("*/evaluation.json"))


@pytest.mark.parametrize("case", [n for n in sorted(METHODS) if Case(n, "").has_budget], indirect=True)
def test_the_budget_is_held(case: Case, searched: Run) -> None:
    found = [Allocation.load(file, searched.schema) for file in (searched.dir / "allocations").glob("*.json")]
    most = float(BUDGET.rstrip("%")) / 100 * Allocation.uniform(searched.schema, 32).total("parameters")
    for one in [read_found(searched, case.method), *found]:
        assert 0 < one.total("parameters") <= most


def test_the_same_seed_gives_the_same_run_and_a_done_one_is_left_alone(
    case: Case, searched: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = case.search(tmp_path / "run", one_rank())
    assert records(again.dir) == records(searched.dir) and weights(again.dir) == weights(searched.dir)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    run_stages(case.method, again)
    assert capsys.readouterr().out.count("done before, skipped") == len(case.method.stages())
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


def test_stopped_in_any_training_it_goes_on_to_the_same_bits(
    case: Case, searched: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = steps_of(searched)
    assert bool(trainings) == any(not s.repeatable for s in case.method.stages())  # what costs is not made again
    for stage, steps in trainings.items():
        assert steps > 3, "a trial must be long enough to be stopped in"
        monkeypatch.setenv(VARIABLE, f"raise step={steps - 1} stage={stage}")
        with pytest.raises(RuntimeError, match=VARIABLE):
            case.search(tmp_path / stage, one_rank())
        monkeypatch.delenv(VARIABLE)
        release()
        run = case.search(tmp_path / stage, one_rank())
        assert records(run.dir) == records(searched.dir) and weights(run.dir) == weights(searched.dir)


def test_other_settings_and_other_data_are_not_taken_for_the_same(case: Case, searched: Run, tmp_path: Path) -> None:
    """A search that trains refuses them by name; one that costs nothing is made again."""
    home = copy_of(searched.dir, tmp_path / "run")
    other = dataclasses.replace(searched.schema, data="0" * 16)
    same = case.run(home, one_rank())
    kept = [s.name for s in case.method.stages() if not s.repeatable]
    for run, told in (
        (case.run(home, one_rank(), "optim.embedding_lr=0.07"), "optim.embedding_lr"),
        (Run(same.config, other, same.context), "made from data"),
    ):
        if kept:
            with pytest.raises(UserError, match=told):
                check_stages(case.method, run)
        else:
            check_stages(case.method, run)


def test_what_was_found_is_trained_measured_and_measured_again_alike(case: Case, trained: Path) -> None:
    found = sorted(trained.glob("retrain/*/evaluation.json"))
    assert found
    if not case.method.result:
        return
    first = records(found[0].parent)["evaluation.json"]
    assert 0.4 < first["auc"] <= 1 and first["logloss"] > 0 and first["embedding_parameters"] > 0
    case.evaluate(found[0].parent, one_rank())
    assert records(found[0].parent)["evaluation.json"] == first


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in sorted(METHODS)],
    indirect=True,
)
def test_the_report_draws_it(case: Case, trained: Path, tmp_path: Path) -> None:
    page = write_report([trained], tmp_path / "report").read_text()
    names = {p.parent.name for p in trained.glob("retrain/*/evaluation.json")}
    assert "<svg" in page or "<img" in page
    assert any(name.lower() in page.lower() for name in names)


def test_curves_are_in_tensorboard(case: Case, searched: Run) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for stage in steps_of(searched):
        folders = [p for p in searched.dir.rglob(f"tb/{stage}") if p.is_dir()]
        assert folders
        events = loading.EventAccumulator(str(folders[0]))
        events.Reload()
        assert any(tag.endswith("/loss") for tag in events.Tags()["scalars"])


def test_the_page_on_adding_a_method_shows_the_method_that_is_here() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "adding_a_method.md").read_text()
    for name in ("config.py", "method.py"):
        code = (root / "embsearch_dist" / "methods" / "random" / name).read_text()
        assert f"```python\n{code}```" in page
        assert len(code.splitlines()) < 100


def test_the_options_in_the_table_are_those_of_the_method() -> None:
    assert [method.config for method in METHODS.values()] == list(CONFIGS.values())


def test_what_options_there_are_is_known_without_torch() -> None:
    """``--help`` and a mistake in a config are told at once."""
    script = """
import sys
from launch import evaluate, export, retrain, search
from launch.common import CONFIGS, DEFAULT_CONFIG, print_help, read_config

print_help([], search.__doc__, searching=True)
for name in CONFIGS:
    read_config(None, [f"method={name}", "model.backbone=dcnv2"])
read_config(DEFAULT_CONFIG, ["model.backbone=masknet", "model.options.blocks=2"])
assert not {"torch", "torchrec", "polars", "matplotlib"} & set(sys.modules)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.options.head_width" in done.stdout
