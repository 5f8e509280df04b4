"""What a candidate is worth, against a slow reference that knows nothing of slices, on a supernet trained through the
method's own stage; and what the evolution leaves beside it."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.errors import UserError
from embsearch_dist.files import write_sealed
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.latency import PARTS, LatencyTable
from embsearch_dist.methods.nasrec.method import NASRec
from embsearch_dist.methods.nasrec.scoring import Scorer
from embsearch_dist.methods.nasrec.supernet_stage import SupernetStage, load_supernet
from embsearch_dist.methods.stages import Stage, run_stages
from embsearch_dist.networks.architecture import Architecture
from embsearch_dist.networks.canonical import key, prune
from embsearch_dist.networks.cost import network_cost, operator_costs
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import Space
from embsearch_dist.networks.space import load as load_architecture
from embsearch_dist.run import Run
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor
from tests.factories import one_rank, open_run, recorded, small_config
from tools.bench.masked import MaskedNetwork

SPACE = Space(blocks=3, dense_widths=(8, 16), sparse_widths=(4, 6), tokens=2, width=8)
NASREC = [
    "optim.embedding=adagrad",
    "optim.dense=adagrad",
    "optim.dense_lr=0.05",
    "optim.clip_norm=5",
    "model.init_std=0.1",
    "search.space.blocks=3",
    "search.space.dense_widths=[8,16]",
    "search.space.sparse_widths=[4,6]",
    "search.space.tokens=2",
    "search.space.width=8",
    "search.supernet.batch_size=256",
    "search.supernet.eval_batch_size=200",
    "search.supernet.epochs=1",
    "search.supernet.log_every=1",
    "search.supernet.schedule=cosine",
    "search.scoring.rows=300",
    "search.scoring.tune_rows=500",
    "search.scoring.tune_steps=20",
    "search.scoring.tune_batch=128",
    "search.evolution.population=6",
    "search.evolution.generations=4",
    "search.evolution.parents=3",
    "search.evolution.children=2",
    "search.evolution.keep=3",
]
SEEN = "search.scoring.held_out=false"
ARCHITECTURES = [draw(SPACE, SCHEMES[0], np.random.default_rng(seed)) for seed in range(6)]


class OnlySupernet(Method):
    config = NASRecConfig

    def stages(self) -> list[Stage]:
        return [SupernetStage()]


def nasrec_run(data: Path, directory: Path, *overrides: str) -> Run:
    return open_run(small_config(data, directory, *NASREC, *overrides, method="nasrec"), one_rank())


def scorer(data: Path, directory: Path, *overrides: str) -> Scorer:
    return Scorer(nasrec_run(data, directory, *overrides))


def rows_of(run: Run, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense columns, embeddings ``[n, F, width]`` and labels of the first rows of a split as training reads it."""
    task = load_supernet(run)
    parts = []
    with torch.no_grad():
        for b in run.stream(split, 200, shuffle=split == "train").epoch(0):
            fields = task.model.tables(b.sparse)
            columns = [fields.values[:, s : s + 8] for s in fields.starts]
            parts.append((b.dense, torch.stack(columns, 1), b.label))
    dense, u, label = (torch.cat(p)[:count] for p in zip(*parts, strict=True))
    return dense, u, label


def slowly_tuned(
    run: Run, architecture: Architecture, rows: Sequence[torch.Tensor], steps: int, batch: int, lr: float
) -> MaskedNetwork:
    """The supernet with its head, and nothing else, trained by autograd and torch's Adagrad."""
    network = copy.deepcopy(load_supernet(run).model.head)
    masked, blocks = MaskedNetwork(network), prune(architecture)
    for name, p in network.weights.items():
        p.requires_grad_(name.startswith("head_"))
    heads = [p for n, p in network.weights.items() if n.startswith("head_")]
    optimizer = torch.optim.Adagrad(heads, lr=lr, eps=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))
    dense, u, label = rows
    for step in range(steps):
        part = torch.arange(step * batch, (step + 1) * batch) % len(label)
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(masked(blocks, dense[part], u[part]), label[part]).backward()
        optimizer.step()
        cosine.step()
    return masked


@torch.no_grad()
def loss_of(masked: MaskedNetwork, architecture: Architecture, rows: Sequence[torch.Tensor]) -> float:
    dense, u, label = rows
    return float(binary_cross_entropy_with_logits(masked(prune(architecture), dense, u).double(), label.double()))


@pytest.mark.parametrize("rows", [0, 150])
def test_without_tuning_a_score_is_the_loss_of_the_supernets_predictions(data: Path, trained: Path, rows: int) -> None:
    found = scorer(data, trained, SEEN, "search.scoring.tune_steps=0", f"search.scoring.rows={rows}")
    run = nasrec_run(data, trained)
    task = load_supernet(run)
    validation = run.stream("validation", 150, shuffle=False)
    for architecture in ARCHITECTURES:
        blocks = prune(architecture)
        batches = validation.epoch(0) if rows == 0 else itertools.islice(validation.epoch(0), 1)
        metrics = evaluate(lambda b, x=blocks: task.model(b, x), batches, run.context)  # type: ignore[misc]
        score = found(architecture)
        assert score.logloss == pytest.approx(metrics["logloss"], rel=1e-5)
        assert metrics["rows"] == (rows or run.schema.rows["validation"])
    assert found.tuning is None


@pytest.mark.parametrize(
    ("tune_rows", "steps", "batch"),
    [(500, 20, 100), (250, 6, 100), pytest.param(300, 1, 300, marks=pytest.mark.slow), (60, 8, 512)],
)
def test_tuning_is_adagrad_on_the_head(data: Path, trained: Path, tune_rows: int, steps: int, batch: int) -> None:
    """Over more steps than there are batches, with rows that fill no whole number of batches, in one step, and where a
    batch would be more than there is."""
    own = [f"search.scoring.tune_rows={tune_rows}", f"search.scoring.tune_steps={steps}"]
    found = scorer(data, trained, SEEN, *own, f"search.scoring.tune_batch={batch}", "search.scoring.tune_lr=0.3")
    run = nasrec_run(data, trained)
    tuning, validation = rows_of(run, "train", tune_rows), rows_of(run, "validation", 300)
    plain = scorer(data, trained, SEEN, "search.scoring.tune_steps=0")
    for architecture in ARCHITECTURES[:3]:
        masked = slowly_tuned(run, architecture, tuning, steps, min(batch, tune_rows), 0.3)
        expected = loss_of(masked, architecture, validation)
        assert found(architecture).logloss == pytest.approx(expected, abs=1e-5)
        assert abs(expected - plain(architecture).logloss) > 1e-4  # it did move


def test_tuning_lowers_the_loss_on_its_own_rows(data: Path, trained: Path) -> None:
    run = nasrec_run(data, trained)
    tuning = rows_of(run, "train", 500)
    found, plain = scorer(data, trained, SEEN), scorer(data, trained, SEEN, "search.scoring.tune_steps=0")
    found.validation = plain.validation = found.tuning  # type: ignore[assignment]
    for architecture in ARCHITECTURES:
        before, after = plain(architecture).logloss, found(architecture).logloss
        assert before == pytest.approx(loss_of(MaskedNetwork(found.network), architecture, tuning), abs=1e-5)
        assert after < before


def test_rows_are_looked_up_once_and_are_those_of_the_streams(data: Path, trained: Path) -> None:
    found, run = scorer(data, trained, SEEN), nasrec_run(data, trained)
    assert found.tuning is not None
    for own, expected in (
        (found.tuning, rows_of(run, "train", 500)),
        (found.validation, rows_of(run, "validation", 300)),
    ):
        for a, b in zip((own.dense, own.u, own.label), expected, strict=True):
            assert torch.equal(a, b)
    assert not found.tuning.u.requires_grad


def test_chunks_do_not_matter(data: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scorer(data, trained)
    whole = [found(a).logloss for a in ARCHITECTURES]
    monkeypatch.setattr("embsearch_dist.methods.nasrec.scoring.CHUNK", 37)
    assert [found(a).logloss for a in ARCHITECTURES] == pytest.approx(whole, abs=1e-6)


def test_a_score_depends_on_its_candidate_alone(data: Path, trained: Path) -> None:
    one, two = scorer(data, trained), scorer(data, trained)
    before = copy.deepcopy(one.network.state_dict())
    scores = [one(a) for a in ARCHITECTURES]
    assert len({s.logloss for s in scores}) == len(scores)
    assert [two(a) for a in reversed(ARCHITECTURES)] == scores[::-1]
    assert [one(a) for a in ARCHITECTURES] == scores
    assert all(torch.equal(w, before[n]) for n, w in one.network.state_dict().items())


def test_nothing_of_a_candidate_is_kept(data: Path, trained: Path) -> None:
    found = scorer(data, trained)
    found(ARCHITECTURES[0])

    def tensors() -> list[int]:
        gc.collect()
        return sorted(o.nbytes for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))

    before = tensors()
    for architecture in ARCHITECTURES:
        found(architecture)
    assert tensors() == before
    assert not found.network.live
    assert all(p.grad is None for p in found.network.parameters())


def test_costs_stand_beside_the_loss(data: Path, trained: Path) -> None:
    weights = dict.fromkeys(PARTS, 0.25), dict.fromkeys((*PARTS, "head"), 0.0)
    table = LatencyTable({}, "nowhere", 512, 1.0, *weights, error=0.0)
    plain, timed = scorer(data, trained), Scorer(nasrec_run(data, trained), table)
    for architecture in ARCHITECTURES:
        cost = network_cost(architecture, SPACE, n_dense=1, fields=4).total
        score, other = plain(architecture), timed(architecture)
        assert (score.flops, score.parameters, score.latency) == (cost.flops, cost.parameters, 0.0)
        parts = sum(len(block) for block in operator_costs(architecture, SPACE, 1, 4))
        assert other.latency == pytest.approx(1 + 0.25 * parts)
        assert replace(other, latency=0.0) == score


def test_a_score_that_is_no_number_is_told_with_its_candidate(data: Path, trained: Path) -> None:
    spoiled = scorer(data, trained)
    with torch.no_grad():
        spoiled.network.weights["head_bias"].fill_(float("nan"))
    with pytest.raises(UserError, match=rf"candidate {key(ARCHITECTURES[0])}: its logloss is nan.*--optim.dense_lr"):
        spoiled(ARCHITECTURES[0])


def test_a_supernet_that_is_not_there(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoints/supernet holds no checkpoint"):
        scorer(data, tmp_path)


def search(data: Path, directory: Path, *overrides: str) -> dict[str, Any]:
    """Both stages, of which the first is done; what the second left in ``evolution.json``."""
    run_stages(NASRec(), nasrec_run(data, directory, *overrides))
    return dict(json.loads((directory / "evolution.json").read_text()))


def test_the_result_is_the_best_candidate_with_its_score(data: Path, copied: Path) -> None:
    body = search(data, copied)
    best = sorted(body["seen"], key=lambda c: (c["fitness"], c["key"]))[:3]
    files = sorted((copied / "architectures").glob("*.json"))
    assert [f.name for f in files] == ["rank-1.json", "rank-2.json", "rank-3.json"]
    found = scorer(data, copied)
    for rank, (path, candidate) in enumerate(zip(files, best, strict=True), 1):
        architecture, space = load_architecture(path, searched=True)
        assert space == SPACE
        own = json.loads(path.read_text())["provenance"]
        assert (own["method"], own["name"], own["rank"], own["seed"]) == ("nasrec", "nasrec", rank, 0)
        assert own["fitness"] == own["logloss"] == candidate["logloss"] == found(architecture).logloss
    assert (copied / "architecture.json").read_bytes() == files[0].read_bytes()
    front = json.loads((copied / "pareto.json").read_text())["front"]
    assert min(p["logloss"] for p in front) == best[0]["logloss"]
    assert recorded(copied, "evolution", "step") == list(range(5))
    assert recorded(copied, "evolution", "best")[-1] == best[0]["fitness"]


def test_other_settings_search_anew_and_leave_nothing_of_the_old(data: Path, copied: Path) -> None:
    search(data, copied)
    body = search(data, copied, "search.evolution.generations=2", "search.evolution.keep=1")
    assert body["generation"] == 3 and len(body["seen"]) == 10
    assert [p.name for p in (copied / "architectures").iterdir()] == ["rank-1.json"]
    assert recorded(copied, "evolution", "step") == list(range(3))


@pytest.mark.parametrize(("cost", "measured"), [("none", "flops"), ("parameters", "parameters")])
def test_the_front_is_over_the_cost_that_was_asked_for(data: Path, copied: Path, cost: str, measured: str) -> None:
    seen = search(data, copied, f"search.evolution.cost={cost}")["seen"]
    body = json.loads((copied / "pareto.json").read_text())
    assert body["cost"] == measured
    for point in body["front"]:
        assert not any(c[measured] < point[measured] and c["logloss"] <= point["logloss"] for c in seen)


@pytest.mark.parametrize("cost", ["flops", "parameters"])
def test_a_search_keeps_the_limits_of_its_cost(data: Path, copied: Path, cost: str) -> None:
    free = sorted(c[cost] for c in search(data, copied)["seen"])
    low, high = free[len(free) // 4], free[-len(free) // 4]
    limits = [f"search.evolution.cost_at_least={low}", f"search.evolution.cost_at_most={high}"]
    seen = search(data, copied, f"search.evolution.cost={cost}", *limits, "search.prefilter.proxies=[snip]")["seen"]
    assert free[0] < low and free[-1] > high
    assert len(seen) == len(free) and all(low <= c[cost] <= high for c in seen)


def test_limits_that_no_network_keeps_are_refused_before_a_supernet_is_trained(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embsearch_dist.methods.nasrec.evolution.LIMITED_TRIES", 500)
    limits = ["search.evolution.cost=parameters", "search.evolution.cost_at_most=10"]
    run = nasrec_run(data, tmp_path, *limits)
    with pytest.raises(UserError, match=r"cost_at_most 10: of 500 .* has parameters within that"):
        NASRec().check(run)


class Killed(Exception):
    """Raised in place of a kill."""


@pytest.mark.parametrize("place", ["scalars", "write_sealed"])
@pytest.mark.parametrize("late", [False, True])
def test_a_search_that_was_killed_has_every_generation_once_in_its_log(
    data: Path, copied: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, late: bool
) -> None:
    """Killed just before or just after the third generation's state is saved, or its line of the log is written."""
    calls = 0

    def dies(*arguments: Any, original: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 and not late:
            raise Killed
        original(*arguments, **more)
        if calls == 3:
            raise Killed

    def history(path: Path, body: Any) -> None:
        if path.name == "evolution.json":
            dies(path, body, original=write_sealed)
        else:
            write_sealed(path, body)

    with monkeypatch.context() as patch:
        if place == "scalars":
            patch.setattr(Monitor, "scalars", functools.partialmethod(_through, dies, Monitor.scalars))
        else:
            patch.setattr("embsearch_dist.methods.nasrec.evolution_stage.write_sealed", history)
        with pytest.raises(Killed):
            search(data, copied)
    found = search(data, copied)
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    assert found == search(data, other)
    for column in ("step", "best", "population_mean"):
        assert recorded(copied, "evolution", column) == recorded(other, "evolution", column)


def _through(self: Monitor, dies: Any, original: Any, *arguments: Any, **more: Any) -> None:
    dies(self, *arguments, original=original, **more)


def test_another_name_searches_nothing_again(data: Path, copied: Path) -> None:
    before = search(data, copied)
    assert search(data, copied, "search.name=other") == before
    provenance = json.loads((copied / "architecture.json").read_text())["provenance"]
    assert provenance["name"] == "other"


def test_another_supernet_is_searched_anew(data: Path, copied: Path) -> None:
    """After its stage was deleted to train it again, differently."""
    before = search(data, copied)
    shutil.rmtree(copied / "checkpoints")
    (copied / "stages" / "supernet.json").unlink()
    after = search(data, copied, "search.supernet.epochs=2")
    found = scorer(data, copied, "search.supernet.epochs=2")
    first = Architecture.from_json({"format": 1, "kind": "architecture", "blocks": after["seen"][0]["blocks"]}, "test")
    assert after["seen"][0]["logloss"] == found(first).logloss
    assert after["seen"] != before["seen"]


@pytest.mark.parametrize("content", [b'{"signature": {', b"[]", b"\x80\x81\xff not text", b"\0" * 64], ids=repr)
def test_a_history_that_cannot_be_read_is_named(data: Path, copied: Path, content: bytes) -> None:
    (copied / "evolution.json").write_bytes(content)
    with pytest.raises(UserError, match=r"evolution\.json"):
        search(data, copied)


def test_a_history_with_a_hole_is_named(data: Path, copied: Path) -> None:
    body = search(data, copied)
    del body["seen"][1]["logloss"], body["sha256"]
    (copied / "evolution.json").write_text(json.dumps(body))
    (copied / "stages" / "evolution.json").unlink()
    with pytest.raises(UserError, match=r"evolution\.json: not a scored architecture.*Delete the file"):
        search(data, copied)


def test_a_setting_that_no_supernet_can_have_is_refused_before_anything_is_marked(data: Path, tmp_path: Path) -> None:
    for setting in ("optim.weight_decay=0.1", "model.precision=bfloat16"):
        with pytest.raises(UserError, match=f"config key {setting.split('=')[0]}: "):
            run_stages(NASRec(), nasrec_run(data, tmp_path / "run", setting))
    run_stages(NASRec(), nasrec_run(data, tmp_path / "run", "search.supernet.steps=1"))  # put right, as told
