"""Stages: what is done is skipped, what changed is refused by key, and a search is cheap to repeat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import SAFETY_KEYS
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_sealed
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.stages import Stage, check_stages, flatten, run_stages
from embsearch_dist.run import Run
from embsearch_dist.rundir import hold, release
from embsearch_dist.schema import Schema
from tests.factories import one_rank, open_run, prepared, small_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


class Recorded(Stage):
    """Writes down that it ran; fails when told."""

    name = "recorded"
    settings: ClassVar[dict[str, Any]] = {"a": {"b": 1, "c": [1, 2]}}
    log: ClassVar[list[str]] = []
    broken: ClassVar[bool] = False

    def inputs(self, run: Run) -> dict[str, Any]:
        return self.settings

    def run(self, run: Run) -> None:
        self.log.append(self.name)
        if self.broken:
            raise UserError("out of luck")
        self.leave(run)

    def leave(self, run: Run) -> None:
        """What a test puts here."""


class Repeated(Recorded):
    name = "repeated"
    repeatable = True


class Two(Method):
    config = object

    def stages(self) -> list[Stage]:
        return [Recorded(), Repeated()]


def run(two: Run) -> None:
    """What ``search.py`` does."""
    check_stages(Two(), two)
    run_stages(Two(), two)


@pytest.fixture
def two(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(Recorded, "log", [])
    monkeypatch.setattr(Recorded, "broken", False)
    monkeypatch.setattr(Recorded, "settings", {"a": {"b": 1, "c": [1, 2]}})
    return open_run(small_config(data, tmp_path), one_rank())


def test_stages_run_in_order_and_once(two: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(two)
    run(two)
    assert Recorded.log == ["recorded", "repeated"]
    assert "stage recorded: done before, skipped" in capsys.readouterr().out
    mark = read_json(two.dir / "stages" / "recorded.json")
    assert (mark["state"], mark["inputs"], mark["files"]) == ("done", {"a.b": 1, "a.c": [1, 2]}, [])


def test_changed_settings_are_refused_without_a_check_before(two: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stages(Two(), two)
    monkeypatch.setattr(Recorded, "settings", {"a": {"b": 2, "c": [1, 2]}})
    with pytest.raises(UserError, match="stage 'recorded' made with other settings"):
        run_stages(Two(), two)
    assert Recorded.log == ["recorded", "repeated"]


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default(
    two: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(two)
    monkeypatch.setattr(Recorded, "settings", {"a": {"b": 1, "c": [1, 2]}, "optim": {"dense": "adam"}})
    run(two)
    assert Recorded.log == ["recorded", "repeated"]
    monkeypatch.setattr(Recorded, "settings", {"a": {"b": 1, "c": [1, 2]}, "optim": {"dense": "adagrad"}})
    with pytest.raises(UserError, match="optim.dense was 'adam', now 'adagrad'"):
        run(two)


def test_a_stage_that_failed_is_run_again(two: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "broken", True)
    with pytest.raises(UserError, match="out of luck"):
        run(two)
    assert read_json(two.dir / "stages" / "recorded.json")["state"] == "running"
    monkeypatch.setattr(Recorded, "broken", False)
    run(two)
    assert Recorded.log == ["recorded", "recorded", "repeated"]


def test_changed_settings_of_an_expensive_stage_are_refused_by_key(two: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(two)
    monkeypatch.setattr(Recorded, "settings", {"a": {"b": 2, "c": [1, 2]}})
    with pytest.raises(UserError, match=r"stage 'recorded' made with other settings: a.b was 1, now 2\.") as caught:
        run(two)
    assert "--run.overwrite true" in str(caught.value)
    assert Recorded.log == ["recorded", "repeated"]


def test_impossible_settings_are_refused_before_any_stage(two: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Two, run: Run) -> None:
        raise UserError("no such budget")

    monkeypatch.setattr(Two, "check", check)
    with pytest.raises(UserError, match="no such budget"):
        run(two)
    assert Recorded.log == []
    assert not (two.dir / "stages").exists()


def test_changed_settings_of_a_cheap_stage_just_run_it_again(two: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(two)
    monkeypatch.setattr(Repeated, "settings", {"a": 5}, raising=False)
    run(two)
    assert Recorded.log == ["recorded", "repeated", "repeated"]
    assert read_json(two.dir / "stages" / "repeated.json")["inputs"] == {"a": 5}


def test_inputs_are_flattened_through_dataclasses(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path)
    flat = flatten({"search": config.search, "n": 1})
    assert flat["search.policy.steps"] == 8
    assert flat["search.supernet.epochs"] == 2
    assert flat["n"] == 1


@pytest.fixture(scope="module")
def searched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a finished search, without budget."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    search(data, folder)
    return folder


def search(data: Path, folder: Path, *overrides: str) -> Allocation:
    config = small_config(data, folder, *overrides)
    run = open_run(config, one_rank())
    check_stages(METHODS["adass"](), run)
    run_stages(METHODS["adass"](), run)
    return Allocation.load(folder / "allocation.json", run.schema)


def supernet_files(folder: Path) -> dict[str, int]:
    root = folder / "checkpoints" / "supernet"
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_a_search_leaves_an_allocation_of_candidate_widths(data: Path, searched: Path) -> None:
    schema = Schema.load(data)
    allocation = Allocation.load(searched / "allocations" / "adass.json", schema)
    assert set(allocation.widths.values()) <= {0, 2, 4, 8}
    assert allocation.provenance["method"] == "adass"
    assert allocation.provenance["name"] == "adass"
    points = json.loads((searched / "search" / "pareto.json").read_text())
    assert points["points"][0]["widths"] == allocation.widths
    assert points["points"][0]["parameters"] == allocation.total("parameters")
    assert len(points["scored"]) > 10


def test_another_budget_only_searches_again(data: Path, searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = supernet_files(searched)
    assert before
    small = search(data, searched, "search.budget=5%", "search.name=small", "search.pareto=[2%]")
    assert "stage supernet: done before, skipped" in capsys.readouterr().out
    assert supernet_files(searched) == before
    whole = 32 * sum(small.schema.cardinalities)
    assert small.total("parameters") <= 0.05 * whole
    assert small.provenance["budget"] == "5%"
    tiny = Allocation.load(searched / "allocations" / "small-2pct.json", small.schema)
    assert tiny.total("parameters") <= 0.02 * whole
    names = {p["name"]: p["chosen"] for p in json.loads((searched / "search" / "pareto.json").read_text())["points"]}
    assert names == {"small": True, "small-2pct": False, "adass": False}  # earlier searches stay in the picture


def test_a_search_counts_the_values_own_weights(data: Path, tmp_path: Path) -> None:
    settings = ["model.first_order=value", "search.budget=20%", "search.supernet.epochs=1"]
    found = search(data, tmp_path / "run", *settings)
    columns = {n: w + 1 if w else 0 for n, w in found.widths.items()}
    by_hand = sum(f.cardinality * columns[f.name] for f in found.schema.fields)
    assert found.total("parameters") == by_hand <= 0.2 * 33 * sum(found.schema.cardinalities)
    points = json.loads((tmp_path / "run" / "search" / "pareto.json").read_text())
    assert points["points"][0]["parameters"] == by_hand


def test_the_same_search_finds_the_same_again(data: Path, searched: Path, tmp_path: Path) -> None:
    schema = Schema.load(data)
    first = Allocation.load(searched / "allocations" / "adass.json", schema)
    assert search(data, tmp_path / "again") == first


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("search.candidates=[0,2,4]", "search.candidates was [0, 2, 4, 8], now [0, 2, 4]"),
        ("search.supernet.epochs=3", "search.supernet.epochs was 2, now 3"),
        ("search.sampling.mode=random", "search.sampling.mode was 'adaptive', now 'random'"),
        ("search.scheme=independent", "search.scheme was 'shared', now 'independent'"),
        ("model.hidden=[4]", "model.hidden was [8, 4], now [4]"),
        ("optim.embedding_lr=0.5", "optim.embedding_lr was 0.05, now 0.5"),
        ("run.seed=1", "run.seed was 0, now 1"),
    ],
)
def test_changed_supernet_settings_are_refused_by_key(data: Path, searched: Path, override: str, key: str) -> None:
    before = (searched / "allocation.json").read_bytes()
    with pytest.raises(UserError) as caught:
        search(data, searched, override)
    assert f"stage 'supernet' made with other settings: {key}." in str(caught.value)
    assert (searched / "allocation.json").read_bytes() == before


def test_a_damaged_supernet_is_refused_by_file(data: Path, searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path / "run")
    path = next((tmp_path / "run" / "checkpoints" / "supernet").glob("step-24/data/__0_0.distcp"))
    body = bytearray(path.read_bytes())
    body[100] ^= 1
    path.write_bytes(body)
    with pytest.raises(UserError, match=r"__0_0.distcp is damaged.* delete .*stages/supernet.json and give") as caught:
        search(data, tmp_path / "run", "search.budget=10%")
    # An older checkpoint must not pass for the finished supernet.
    (path.parents[1] / "manifest.json").unlink()
    with pytest.raises(UserError, match="step-24 is not a whole checkpoint"):
        search(data, tmp_path / "run", "search.budget=10%")
    assert str(tmp_path / "run" / "stages" / "supernet.json") in str(caught.value)
    (tmp_path / "run" / "stages" / "supernet.json").unlink()
    mended = search(data, tmp_path / "run")
    assert mended == Allocation.load(searched / "allocations" / "adass.json", mended.schema)


def test_keys_that_only_keep_a_run_safe_may_change(data: Path, searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path / "run")
    before = supernet_files(tmp_path / "run")
    assert not any(key in (searched / "stages" / "supernet.json").read_text() for key in SAFETY_KEYS)
    search(data, tmp_path / "run", "search.supernet.save_every=3", "search.supernet.skip_bad_batches=1")
    assert supernet_files(tmp_path / "run") == before


def test_an_impossible_budget_is_refused_before_the_supernet_is_trained(data: Path, tmp_path: Path) -> None:
    for override in ("search.budget=3", "search.pareto=[50%,1B]"):
        with pytest.raises(UserError, match="narrowest allocation"):
            search(data, tmp_path, override)
    assert not (tmp_path / "checkpoints").exists()


def test_ues_writes_the_uniform_allocation_and_a_new_one_when_asked(data: Path, tmp_path: Path) -> None:
    for width in (32, 8):
        run = open_run(small_config(data, tmp_path, f"search.width={width}", method="ues"), one_rank())
        run_stages(METHODS["ues"](), run)
        allocation = Allocation.load(tmp_path / "allocation.json", run.schema)
        assert allocation == Allocation.uniform(run.schema, width)


def test_a_finished_stage_whose_file_is_lost_or_exchanged_is_run_again(
    two: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(two.dir, "test")
    release()
    path = two.dir / "found.json"
    monkeypatch.setattr(Repeated, "leave", lambda self, run: write_sealed(run.dir / "found.json", {"value": 1}))
    run(two)
    whole = path.read_bytes()
    for harm in (path.unlink, lambda: path.write_bytes(whole[:-20]), lambda: path.write_text('{"sha256": "0"}')):
        harm()
        run(two)
        assert path.read_bytes() == whole and f"stage repeated: {path}" in capsys.readouterr().out
    path.write_text('{"value": 2}')  # of a person, who has taken the checksum out
    run(two)
    assert read_json(path) == {"value": 2} and Recorded.log == ["recorded"] + 4 * ["repeated"]


def test_a_broken_mark_is_named(two: Run) -> None:
    run(two)
    mark = two.dir / "stages" / "recorded.json"
    for text in ("", "{}", '{"state": "done", "inputs": []}', mark.read_text().replace("done", "gone")):
        mark.write_text(text)
        with pytest.raises(UserError, match="stages/recorded.json.*Delete it"):
            run(two)
