"""The best candidates of a search trained alone: who is chosen, on which rows, and what a killed comparison keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.methods.nasrec import choosing
from embsearch_dist.methods.nasrec.choosing import candidate_files, chosen, reason, train_best
from embsearch_dist.methods.nasrec.method import NASRec
from embsearch_dist.methods.retraining import Retraining
from embsearch_dist.methods.wish import Wish
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import Space
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.faults import VARIABLE
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.retrain import load_best
from tests.factories import one_rank, open_run, prepared, recorded, small_config

SPACE = Space(blocks=2, dense_widths=(8, 16), sparse_widths=(4, 6), tokens=2, width=8)
RANKS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def searched(directory: Path) -> Path:
    """What a search leaves for ``--best``: three networks."""
    folder = directory / "architectures"
    folder.mkdir(parents=True)
    for k in range(1, RANKS + 1):
        a = draw(SPACE, SCHEMES[0], np.random.default_rng(k))
        a.save(folder / f"rank-{k}.json", space=SPACE.to_json(), provenance={"logloss": 0.5 + k / 100})
    return directory


def run_of(data: Path, directory: Path, *overrides: str) -> Run:
    model = ["model.backbone=nasrec", "model.unify=mixed", "model.unified_width=8"]
    model.append(f"model.architecture={directory / 'architectures' / 'rank-1.json'}")
    own = ["train.epochs=1", "train.evals_per_epoch=3", "train.patience=0", "train.metric=logloss"]
    return open_run(small_config(data, directory, *model, *own, *overrides, method="nasrec"), one_rank())


def train(run: Run, count: int = RANKS, refit: bool = False, name: str = "best") -> dict[str, Any]:
    files = candidate_files(run.dir, count)
    allocation = Allocation.uniform(run.schema, 8)
    return train_best(run, allocation, files, run.dir / "retrain" / name, refit)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """Three candidates trained, one chosen; not to be written to."""
    run = run_of(data, searched(tmp_path_factory.mktemp("best") / "run"))
    return run, train(run)


def test_validation_chooses_and_the_winner_alone_sees_the_test_split(compared: tuple[Run, dict[str, Any]]) -> None:
    run, result = compared
    folder = run.dir / "retrain"
    assert sorted(p.name for p in folder.iterdir()) == ["best", "best-rank-1", "best-rank-2", "best-rank-3"]
    losses = {}
    for k in range(1, RANKS + 1):
        own = folder / f"best-rank-{k}"
        assert not (own / "evaluation.json").exists()
        losses[own.name] = json.loads((own / "evaluation-validation.json").read_text())["logloss"]
        # Of the best weights, not of the last ones.
        assert losses[own.name] == pytest.approx(min(recorded(own, "retrain", "logloss", "validation")), abs=1e-9)
    choice = json.loads((folder / "best" / "choice.json").read_text())
    assert choice["chosen"] == min(losses, key=lambda n: losses[n]) and choice["refit"] is None
    assert {c["name"]: c["logloss"] for c in choice["candidates"]} == losses
    assert [c["score"] for c in choice["candidates"]] == [0.51, 0.52, 0.53]
    assert choice["why"].startswith(f"{choice['chosen']} has the least validation logloss")
    assert (result["name"], result["split"]) == ("best", "test")
    assert read_sealed(folder / "best" / "evaluation.json") == result


def test_the_winners_directory_is_that_of_a_training(compared: tuple[Run, dict[str, Any]], data: Path) -> None:
    run, result = compared
    own = run.dir / "retrain" / "best"
    choice = json.loads((own / "choice.json").read_text())
    winner = next(c for c in choice["candidates"] if c["name"] == choice["chosen"])
    kept = (own / "architecture.json").read_text()
    assert kept == (run.dir / "architectures" / f"rank-{winner['rank']}.json").read_text()
    config = run_of(data, run.dir, f"model.architecture={own / 'architecture.json'}").config
    task = load_best(config, Allocation.load(own / "allocation.json", Schema.load(own)), run.context, own)
    task.model.eval()
    metrics = evaluate(task.predict, run.stream("test", 200, shuffle=False).epoch(0), run.context)
    assert metrics["auc"] == result["auc"]
    assert json.loads((own / "training.json").read_text())["best_step"] == winner["best_step"]


def test_the_winner_is_trained_again_on_both_splits_for_the_steps_that_validation_chose(
    compared: tuple[Run, dict[str, Any]],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, result = compared
    streams: list[tuple[BatchStream, BatchStream | None]] = []
    original = choosing.retrain

    def spy(config: Any, allocation: Any, training: Any, validation: Any, *more: Any) -> Any:
        streams.append((training, validation))
        return original(config, allocation, training, validation, *more)

    monkeypatch.setattr(choosing, "retrain", spy)
    # The candidates are those of before, so nothing but the winner is trained here.
    for k in range(1, RANKS + 1):
        copy = shutil.copytree(run.dir / "retrain" / f"best-rank-{k}", run.dir / "retrain" / f"again-rank-{k}")
        config = copy / "config.yaml"
        config.write_text(config.read_text().replace(f"best-rank-{k}", copy.name) + "# edited\n")
    before = {p: p.stat().st_mtime_ns for p in (run.dir / "retrain").glob("again-rank-*/checkpoints/retrain/*/data/*")}
    refit = train(run_of(data, run.dir), refit=True, name="again")
    own = run.dir / "retrain" / "again"
    choice = json.loads((own / "choice.json").read_text())
    best = next(c for c in choice["candidates"] if c["name"] == choice["chosen"])
    assert choice["refit"]["steps"] == best["best_step"] == json.loads((own / "training.json").read_text())["steps"]
    training, validation = streams[-1]
    rows = run.schema.rows
    assert validation is None and training.rows == rows["train"] + rows["validation"]
    assert refit["logloss"] != result["logloss"]
    for name, split, told in (("again", "validation", True), ("again", "test", False), ("best", "validation", False)):
        file = f"model.architecture={run.dir / 'retrain' / name / 'architecture.json'}"
        NASRec().evaluate(run_of(data, run.dir, file), run.dir / "retrain" / name, split, "", "")
        assert ("again was trained on the validation split too" in capsys.readouterr().err) == told
    (run.dir / "retrain" / "best" / "evaluation-validation.json").unlink()
    assert before == {
        p: p.stat().st_mtime_ns for p in (run.dir / "retrain").glob("again-rank-*/checkpoints/retrain/*/data/*")
    }
    for k in range(1, RANKS + 1):
        shutil.rmtree(run.dir / "retrain" / f"again-rank-{k}")
    shutil.rmtree(own)


def test_a_stopped_comparison_goes_on_with_the_candidate_that_was_under_way(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: tuple[Run, dict[str, Any]]
) -> None:
    run = run_of(data, searched(tmp_path / "run"))
    original, calls = choosing.evaluate_model, 0

    def dies(*arguments: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(choosing, "evaluate_model", dies)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert not (tmp_path / "run" / "retrain" / "best").exists()
    found = train(run)
    expected = compared[1]
    assert {k: found[k] for k in ("auc", "logloss")} == {k: expected[k] for k in ("auc", "logloss")}
    for k in range(1, RANKS + 1):
        assert len(recorded(run.dir / "retrain" / f"best-rank-{k}", "retrain", "loss")) == 12  # no step twice


def test_a_candidate_that_diverges_has_lost_and_the_others_are_compared(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(data, searched(tmp_path / "run"), "train.steps=3")
    monkeypatch.setenv(VARIABLE, "nan step=2")
    with pytest.raises(UserError, match="all 2 candidates have diverged, the first one so: loss is not finite at step"):
        train(run, 2)
    shutil.rmtree(run.dir / "retrain" / "best-rank-2")
    original = choosing.retrain

    def first_alone(config: Any, *arguments: Any) -> Any:
        if not config.run.dir.endswith("-1"):
            monkeypatch.delenv(VARIABLE, raising=False)
        return original(config, *arguments)

    monkeypatch.setattr(choosing, "retrain", first_alone)
    result = train(run, 2)
    assert "best-rank-1 has diverged and is out: loss is not finite at step 2" in capsys.readouterr().out
    choice = read_sealed(run.dir / "retrain" / "best" / "choice.json")
    lost, won = choice["candidates"]
    assert (choice["chosen"], result["name"]) == ("best-rank-2", "best")
    assert lost["logloss"] is None and lost["score"] == 0.51 and "not finite" in lost["diverged"]
    assert won["logloss"] > 0 and "diverged" not in won
    assert choice["why"].endswith("no other candidate has a loss (of 2 candidates; best-rank-1 diverged)")


def test_each_training_of_a_comparison_has_a_mirror_where_its_directory_is(data: Path, tmp_path: Path) -> None:
    run = run_of(data, searched(tmp_path / "run"), f"run.mirror=file://{tmp_path}/mirror", "train.steps=2")
    job = Retraining(Wish.of({"best": "1"}, []), run, run.dir, "best", "", Allocation.uniform(run.schema, 8))
    assert list(NASRec().retrain(job)) == ["best"]
    kept = {str(p.parent.relative_to(tmp_path / "mirror")) for p in (tmp_path / "mirror").rglob("state.json")}
    assert kept == {"retrain/best", "retrain/best-rank-1"}


def test_an_epoch_of_two_splits_has_every_row_of_both_once(data: Path) -> None:
    schema = Schema.load(data)

    def stream(split: str, rank: int, ranks: int) -> BatchStream:
        return BatchStream(data, schema, split, 3, rank, ranks, window_rows=700, prefetch=0)

    def values(found: BatchStream) -> list[float]:
        return [float(x) for b in found.epoch(1) for x in b.dense[:, 0]]

    for ranks in (1, 2):
        joined = []
        for rank in range(ranks):
            both = stream("train", rank, ranks)
            both.extend(stream("validation", rank, ranks))
            joined += values(both)
            assert both.rows_left_out == 0 and both.rows == schema.rows["train"] + schema.rows["validation"]
        alone = [float(x) for s in ("train", "validation") for x in column(data, schema, s)]
        assert len(joined) == len(alone) // 3 * 3 and set(joined) <= set(alone)
        assert len(set(joined)) > schema.rows["train"] + 300  # the shorter split is there, too


def column(data: Path, schema: Schema, split: str) -> torch.Tensor:
    """``x`` of all rows."""
    return torch.cat([b.dense[:, 0] for b in BatchStream(data, schema, split, 200, shuffle=False).epoch(0)])


def test_equal_losses_keep_the_order_of_the_search() -> None:
    assert chosen([0.5, 0.4, 0.4, 0.6]) == 1
    found = [{"name": n, "rank": k, "logloss": x, "best_step": 7} for k, (n, x) in enumerate(zip("ab", (0.5, 0.4)))]
    assert reason(found, found[1]).endswith("0.40000 after 7 steps; next comes a with 0.50000 (of 2 candidates)")
    assert reason(found[:1], found[0]).endswith("it was the only candidate")


@pytest.mark.parametrize(("count", "message"), [(0, "at least 1"), (4, "holds 3 .*rank-4.json.*evolution.keep 4")])
def test_more_candidates_than_were_kept(tmp_path: Path, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        candidate_files(searched(tmp_path / "run"), count)


@pytest.mark.parametrize(
    ("plain", "overrides", "message"),
    [
        ({"refit": "true"}, [], "give both"),
        ({"best": "x"}, [], "--best x: give how many"),
        ({"best": "0"}, [], "--best 0"),
        ({"best": "2"}, ["model.architecture=a.json"], "leave out --model.architecture"),
    ],
)
def test_options_that_do_not_go_together(plain: dict[str, str], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Wish.of(plain, overrides)
    assert Wish.of({"best": "3", "refit": "true"}, []).best == 3 and Wish.of({}, []).best == 0
