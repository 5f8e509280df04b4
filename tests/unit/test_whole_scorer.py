"""Scores of subnets whose backbone is no sum over fields: those of the supernet's own forward pass."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.methods.adass import whole_scorer
from embsearch_dist.methods.adass.scored_rows import make_scorer
from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.methods.adass.whole_scorer import WholeScorer
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.train.metrics import METRICS, binned_auc, score
from tests.factories import one_rank, open_run, prepared, random_batch, small_config, small_schema
from tests.method_contract import Case

SCHEMA, CANDIDATES = small_schema(11, 7, 5), [0, 2, 3, 6]
CHOICES = torch.tensor(list(itertools.product(range(4), repeat=3)))[::3]
BACKBONES = ["dcnv2", "autoint", "xdeepfm", "masknet", "finalmlp", "dlrm", "deepfm"]


def supernet(backbone: str, *overrides: str) -> SupernetModel:
    own = [f"model.backbone={backbone}", "model.init_std=0.5", "model.gain=1", *overrides]
    model = SupernetModel(small_config("no-data", "no-run", *own), SCHEMA, CANDIDATES, "shared", one_rank(), True)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def sample() -> list[Batch]:
    return [random_batch(SCHEMA, rows, seed) for seed, rows in enumerate((100, 100, 37))]


def forward(model: SupernetModel, batches: list[Batch], choice: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        return torch.cat([model(b, choice, keep)[0] for b in batches])


@pytest.mark.parametrize(
    ("backbone", "transform"), [*((b, "identity") for b in BACKBONES), ("dcnv2", "field"), ("masknet", "mlp")]
)
def test_logits_and_metrics_are_those_of_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch, backbone: str, transform: str
) -> None:
    monkeypatch.setattr(whole_scorer, "ROWS_TOGETHER", 64)  # several parts, the last one smaller
    model, batches = supernet(backbone, f"model.transform={transform}"), sample()
    labels, scorer = torch.cat([b.label for b in batches]), WholeScorer(model, batches, one_rank())
    found = scorer.score(CHOICES)
    for choice, logits, metrics in zip(CHOICES, scorer.logits(CHOICES), found, strict=True):
        wanted = forward(model, batches, choice)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
        own = score(logits, labels, binned_auc)
        assert {n: metrics[n] for n in METRICS} == pytest.approx({n: own[n] for n in METRICS})


@pytest.mark.parametrize("norm", ["none", "width", "field"])
def test_an_additive_backbone_is_scored_alike_both_ways(norm: str) -> None:
    model, batches = supernet("deepfm", f"model.norm={norm}", "model.transform=width"), sample()
    whole, cached = WholeScorer(model, batches, one_rank()), SubnetScorer(model, batches, one_rank())
    torch.testing.assert_close(whole.logits(CHOICES), cached.logits(CHOICES), rtol=1e-4, atol=1e-4)
    base = CHOICES[5].tolist()
    for a, b in zip(whole.score_near(base, CHOICES), cached.score_near(base, CHOICES), strict=True):
        assert a == pytest.approx(b, abs=2e-3)
    assert whole.score_near(base, CHOICES[5:6])[0]["gain"] == 0


def test_a_part_scores_its_rows_and_shares_no_result() -> None:
    model, batches = supernet("dcnv2"), sample()
    whole = WholeScorer(model, batches, one_rank())
    few = whole.part(120)
    torch.testing.assert_close(few.logits(CHOICES), whole.logits(CHOICES)[:, :120])
    assert few.score(CHOICES[:1])[0]["rows"] == 120 and not whole.archive and len(few.archive) == 1
    assert whole.part(237) is whole


def test_no_candidate_is_scored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, seen = WholeScorer(supernet("masknet"), sample(), one_rank()), []
    plain = scorer.logits
    monkeypatch.setattr(scorer, "logits", lambda choices: (seen.append(len(choices)), plain(choices))[1])
    first = scorer.score(CHOICES[[1, 2, 1]])
    assert scorer.score(CHOICES[:3])[1:] == first[:2] and seen == [2, 1]


def test_the_backbone_decides_which_scorer_a_search_takes(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    data = prepared(tmp_path_factory)
    for backbone, kind in (("deepfm", SubnetScorer), ("finalmlp", WholeScorer)):
        run = open_run(small_config(data, tmp_path, f"model.backbone={backbone}"), one_rank())
        found = make_scorer(run, SupernetTask(run))
        assert type(found) is kind and len(found.labels) == run.schema.rows["validation"]


def test_heads_are_refitted_behind_sums_alone(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    case = Case("adass", str(prepared(tmp_path_factory)))
    run = case.run(tmp_path, one_rank(), "model.backbone=dcnv2", "search.policy.refit=linear")
    with pytest.raises(UserError, match=r"search.policy.refit: linear fits .*got model.backbone dcnv2"):
        case.method.check(run)
