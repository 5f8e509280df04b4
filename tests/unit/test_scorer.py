"""The scorer against the supernet's own forward pass, and the work it never does twice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.kernels.bfloat16 import INSTRUCTIONS, multiplies_bfloat16
from embsearch_dist.methods.adass import layout as layouts
from embsearch_dist.methods.adass.layout import ACCELERATOR, CPU, Layout, layout_for
from embsearch_dist.methods.adass.passes import relu_
from embsearch_dist.methods.adass.refit import HeadFit, Inherited
from embsearch_dist.methods.adass.scored_rows import precision_on
from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.methods.adass.terms import STATES, sample_rows, slices
from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.train.metrics import score
from tests.factories import one_rank, random_batch, small_config, small_schema

SCHEMA = small_schema(11, 7, 5)
CANDIDATES = [0, 2, 3, 6]
CHOICES = torch.tensor(list(itertools.product(range(4), repeat=3)))


def supernet(norm: str, backbone: str = "deepfm", scheme: str = "shared") -> SupernetModel:
    overrides = [f"model.norm={norm}", f"model.backbone={backbone}", "model.init_std=0.5", "model.gain=1"]
    model = SupernetModel(small_config("no-data", "no-run", *overrides), SCHEMA, CANDIDATES, scheme, one_rank(), True)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def sample() -> list[Batch]:
    """More rows than the scorer takes at a time, in batches of different sizes."""
    return [random_batch(SCHEMA, rows, seed) for seed, rows in enumerate((100, 100, 37))]


def forward(model: SupernetModel, batches: list[Batch], choice: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        return torch.cat([model(b, choice, keep)[0] for b in batches])


def use_statistics_of(model: SupernetModel, batches: list[Batch]) -> None:
    """Make the running statistics those of the sample, as the scorer takes them."""
    unify = model.bare_head.unify
    with torch.no_grad():
        pooled = torch.cat([model.tables(b.sparse).stack() for b in batches], 1)
        for j in range(len(CANDIDATES)):
            u = unify.mapped(pooled, torch.full((3,), j))
            unify.norm.mean[:, j] = u.mean(1)
            unify.norm.variance[:, j] = u.var(1, unbiased=False)


@pytest.mark.parametrize("scheme", ["shared", "independent"])
@pytest.mark.parametrize("backbone", ["deepfm", "wide_deep", "fm"])
@pytest.mark.parametrize("norm", ["none", "field", "width"])
def test_scored_logits_equal_the_supernets_own(norm: str, backbone: str, scheme: str) -> None:
    model, batches = supernet(norm, backbone, scheme), sample()
    if norm == "field":
        use_statistics_of(model, batches)
    scorer = SubnetScorer(model, batches, one_rank())
    found = scorer.logits(CHOICES)
    for choice, logits in zip(CHOICES, found, strict=True):
        torch.testing.assert_close(logits, forward(model, batches, choice), rtol=1e-4, atol=1e-4)


def test_metrics_are_those_of_the_forward_pass() -> None:
    model, batches = supernet("none"), sample()
    labels = torch.cat([b.label for b in batches])
    for choice, metrics in zip(CHOICES, SubnetScorer(model, batches, one_rank()).score(CHOICES), strict=True):
        logits = forward(model, batches, choice)
        assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-3)
        assert metrics["logloss"] == pytest.approx(score(logits, labels)["logloss"], rel=1e-4)


@pytest.mark.parametrize("chunk_rows", [64, 237])  # several chunks, or one
@pytest.mark.parametrize("backbone", ["deepfm", "wide_deep", "fm"])
def test_the_layout_of_an_accelerator_gives_the_same_metrics(
    monkeypatch: pytest.MonkeyPatch, backbone: str, chunk_rows: int
) -> None:
    model, batches = supernet("none", backbone), sample()
    expected = SubnetScorer(model, batches, one_rank()).score(CHOICES)
    monkeypatch.setattr(layouts, "CPU", Layout(chunk_rows, together=True))
    for one, other in zip(expected, SubnetScorer(model, batches, one_rank()).score(CHOICES), strict=True):
        assert other["auc"] == pytest.approx(one["auc"], abs=1e-4)  # a logit on the edge of a bin may be in the next
        assert other["logloss"] == pytest.approx(one["logloss"], rel=1e-6)
        assert (other["accuracy"], other["rows"]) == (one["accuracy"], one["rows"])


def test_an_accelerator_takes_few_chunks_and_fills_none_up_with_zeros() -> None:
    assert layout_for(torch.device("cpu"), 10**6) == CPU
    for rows, chunks in ((1, 1), (237, 1), (8192, 1), (8193, 2), (100_000, 13)):
        layout = layout_for(torch.device("cuda", 0), rows)
        assert layout.together and layout.chunk_rows <= ACCELERATOR.chunk_rows
        assert rows <= chunks * layout.chunk_rows < rows + chunks


def test_no_table_is_looked_up_after_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = SubnetScorer(supernet("field"), sample(), one_rank())

    def touched(*_: object) -> None:
        raise AssertionError("a table was looked up")

    monkeypatch.setattr(ShardedTables, "forward", touched)
    scorer.score(CHOICES)
    with pytest.raises(AssertionError, match="looked up"):
        SubnetScorer(supernet("field"), sample(), one_rank())


def test_nothing_is_scored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, seen = SubnetScorer(supernet("none"), sample(), one_rank()), []
    original = scorer.logits

    def counted(choices: torch.Tensor) -> torch.Tensor:
        seen.extend(map(tuple, choices.tolist()))
        return original(choices)

    monkeypatch.setattr(scorer, "logits", counted)
    first = scorer.score(torch.tensor([[1, 2, 3], [0, 0, 1], [1, 2, 3]]))
    second = scorer.score(torch.tensor([[0, 0, 1], [3, 3, 3], [1, 2, 3]]))
    assert seen == [(1, 2, 3), (0, 0, 1), (3, 3, 3)]
    assert first[0] == first[2] == second[2]
    assert first[1] == second[0]
    assert len(scorer.archive) == 3


def test_any_number_of_candidates_a_call_gives_the_same_metrics() -> None:
    model, batches = supernet("field"), sample()
    together = SubnetScorer(model, batches, one_rank()).score(CHOICES)
    alone = SubnetScorer(model, batches, one_rank())
    for choice, metrics in zip(CHOICES[::7], together[::7], strict=True):
        assert alone.score(choice[None])[0]["auc"] == pytest.approx(metrics["auc"], abs=1e-4)


def test_scoring_leaves_the_supernet_as_it_was() -> None:
    model = supernet("field")
    before = {k: v.clone() for k, v in model.bare_head.state_dict().items()}
    SubnetScorer(model, sample(), one_rank()).score(CHOICES)
    for name, value in model.bare_head.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_sample_of_one_class_is_refused() -> None:
    batch = random_batch(SCHEMA, 20)
    one_class = Batch(batch.dense, batch.sparse, torch.ones(20), batch.position)
    with pytest.raises(UserError, match="20 rows has one class only"):
        SubnetScorer(supernet("none"), [one_class], one_rank())


@pytest.mark.parametrize("backbone", ["deepfm", "wide_deep", "fm"])
def test_bfloat16_changes_the_metrics_by_its_rounding_only(backbone: str) -> None:
    model, batches = supernet("none", backbone), sample()
    exact, rounded = (SubnetScorer(model, batches, one_rank(), p) for p in ("float32", "bfloat16"))
    a, b = exact.logits(CHOICES), rounded.logits(CHOICES)
    assert torch.equal(a, b) == (backbone == "fm")  # FM has no MLP
    assert float((a - b).abs().max()) < 0.02 * float(a.abs().max())


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_bfloat16_is_for_processors_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch, instruction: str) -> None:
    for name in INSTRUCTIONS:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not multiplies_bfloat16(torch.device("cpu")) and multiplies_bfloat16(torch.device("cuda"))
    assert precision_on(one_rank()) == "float32"
    monkeypatch.setattr(torch.cpu, instruction, lambda: True, raising=False)
    assert multiplies_bfloat16(torch.device("cpu"))
    assert precision_on(one_rank()) == "bfloat16"


def test_one_rank_without_them_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, INSTRUCTIONS[0], lambda: True)
    monkeypatch.setattr(Context, "every", lambda self, value: [value, False])
    assert precision_on(one_rank()) == "float32"


def test_the_relu_of_bfloat16_bits_is_the_relu() -> None:
    x = torch.tensor([-float("inf"), -1e30, -2.5, -1e-40, -0.0, 0.0, 1e-40, 3.0, float("inf")])
    assert torch.equal(relu_(x.bfloat16()), x.bfloat16().relu())
    assert torch.equal(relu_(x.clone()), x.relu())


@pytest.mark.parametrize("norm", ["none", "field"])
def test_terms_that_do_not_fit_are_made_anew_in_each_pass_and_give_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    model, batches = supernet(norm), sample()
    kept = SubnetScorer(model, batches, one_rank())
    monkeypatch.setattr(layouts, "CPU", Layout(chunk_rows=50, together=False))
    monkeypatch.setattr(layouts, "SLAB_BYTES", 50 * 13 * 80 * 2)  # two chunks at a time, and not all five
    made = SubnetScorer(model, batches, one_rank(), cache_mb=0)
    assert kept.terms is not None and made.terms is None
    torch.testing.assert_close(made.logits(CHOICES), kept.logits(CHOICES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_mb", [0, 4096])
@pytest.mark.parametrize("backbone", ["deepfm", "wide_deep", "fm"])
def test_a_subnet_scored_from_one_near_it_is_scored_alike(backbone: str, cache_mb: int) -> None:
    model, batches = supernet("field", backbone), sample()
    found = SubnetScorer(model, batches, one_rank(), cache_mb=cache_mb)
    expected = SubnetScorer(model, batches, one_rank()).logits(CHOICES)
    for base in ((1, 2, 3), (1, 2, 0), (1, 2, 3), (0, 0, 0)):  # the second state is made from the first
        torch.testing.assert_close(found.logits_near(base, CHOICES), expected, rtol=1e-4, atol=1e-4)


def test_near_subnets_need_the_terms_of_their_own_fields_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = SubnetScorer(supernet("none"), sample(), one_rank(), cache_mb=0), []
    found.logits_near((1, 1, 1), torch.tensor([[1, 1, 1]]))
    original = found._make_terms

    def watched(chunks: slice, fields: Sequence[int], *rest: object) -> object:
        asked.append(list(fields))
        return original(chunks, fields, *rest)

    monkeypatch.setattr(found, "_make_terms", watched)
    found.logits_near((1, 1, 1), torch.tensor([[1, 0, 1], [1, 3, 1]]))
    assert asked and all(fields == [1] for fields in asked)


def test_near_scores_tell_the_gain_over_the_base_and_its_standard_error() -> None:
    model, batches = supernet("none"), sample()
    labels, base = torch.cat([b.label for b in batches]), (1, 2, 3)
    found = SubnetScorer(model, batches, one_rank())
    losses = [
        torch.nn.functional.binary_cross_entropy_with_logits(forward(model, batches, c), labels, reduction="none")
        for c in torch.tensor([base, (1, 0, 3), (3, 2, 3)])
    ]
    for own, metrics in zip(losses[1:], found.score_near(base, torch.tensor([[1, 0, 3], [3, 2, 3]])), strict=True):
        gain = losses[0] - own
        assert metrics["gain"] == pytest.approx(float(gain.mean()), rel=1e-3)
        assert metrics["gain_se"] == pytest.approx(float(gain.std()) / len(labels) ** 0.5, rel=1e-3)
        assert metrics["logloss"] == pytest.approx(float(own.mean()), rel=1e-4)


def test_a_part_of_a_scorer_scores_its_first_rows() -> None:
    model, batches = supernet("none"), sample()
    for cache_mb in (0, 4096):
        whole = SubnetScorer(model, batches, one_rank(), cache_mb=cache_mb)
        part = whole.part(100)
        assert part.rows == CPU.chunk_rows < whole.rows
        assert torch.equal(part.logits(CHOICES), whole.logits(CHOICES)[:, : part.rows])
        assert part.score(CHOICES[:1])[0]["rows"] == part.rows
        assert whole.part(200) is whole  # the last chunk is not full


@pytest.mark.parametrize("backbone", ["deepfm", "fm"])
def test_a_head_is_fitted_on_half_of_the_rows_and_scored_on_the_others(backbone: str) -> None:
    batch = random_batch(SCHEMA, 1024, 3)
    model, choice = supernet("none", backbone), torch.tensor([[2, 3, 1]])
    plain = forward(model, [batch], choice[0])
    # Labels that follow the logits turned round: the inherited head is wrong in a way that a fit can undo.
    uniform = torch.rand(1024, generator=torch.Generator().manual_seed(0))
    labels = (uniform < (-2 * (plain - plain.mean()) / plain.std()).sigmoid()).float()
    batch = Batch(batch.dense, batch.sparse, labels, batch.position)
    without = SubnetScorer(model, [batch], one_rank()).score(choice)[0]
    fitted = SubnetScorer(model, [batch], one_rank(), refit="linear")
    found = fitted.score(choice)[0]
    assert (without["rows"], found["rows"]) == (1024, 512)
    assert without["auc"] < 0.5 < 0.6 < found["auc"]
    # The labels of the scored half play no part in the fit.
    others = torch.cat([labels[:512], 1 - labels[512:]])
    turned = SubnetScorer(model, [Batch(batch.dense, batch.sparse, others, batch.position)], one_rank(), refit="linear")
    torch.testing.assert_close(turned.logits(choice), fitted.logits(choice))


def test_the_fitted_head_is_one_newton_step_of_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 3, generator=generator)
    hidden, plain = x[None, :, :2], x[None, :, 2]
    truth = torch.tensor([0.3, -0.2, 0.9, 0.1])
    own = Inherited(torch.tensor([0.2, -0.1]), 0.0)  # close by, so that one step is nearly all
    logits = x @ truth[:3] + truth[3]
    labels = (torch.rand(4000, generator=generator) < logits.sigmoid()).float()
    fit = HeadFit(1, own, one_rank())
    for part in slices(4000, 500):
        fit.add(slice(0, 1), hidden[:, part], plain[:, part], labels[part])
    best = LogisticRegression(C=1e6).fit(x.numpy(), labels.numpy())
    torch.testing.assert_close(fit.solve()[0, :3], torch.from_numpy(best.coef_[0]).float(), atol=0.01, rtol=0)


def test_a_refit_needs_rows_to_hold_apart() -> None:
    one = [Batch(b.dense, b.sparse, torch.ones(1), b.position) for b in [random_batch(SCHEMA, 1)]]
    with pytest.raises(UserError, match=r"search.policy.refit: too few"):
        SubnetScorer(supernet("none"), one, one_rank(), refit="linear")


def test_the_sample_shrinks_to_the_memory_it_may_use() -> None:
    deepfm, fm = (supernet("none", b).bare_head.backbone for b in ("deepfm", "fm"))
    sums, pooled = 1 + deepfm.width + deepfm.first_width, 4 * (39 * 64 + 1)
    assert sample_rows(10_000, 5_000, 39, 64, deepfm, 4096) == 5_000
    assert sample_rows(3_000, 5_000, 39, 64, deepfm, 4096) == 3_000
    assert sample_rows(10**6, 10**6, 39, 64, deepfm, 1) == (1 << 20) // (pooled + STATES * 4 * sums)
    assert sample_rows(10**6, 10**6, 39, 64, fm, 1) == (1 << 20) // (pooled + STATES * 4 * (1 + fm.width))


def test_criteos_fields_score_200_000_rows_in_4_gib() -> None:
    backbone = Backbone(39, 32, 0, True, [400, 400])
    assert sample_rows(10**7, 10**7, 39, 64, backbone, 4096) >= 200_000


def test_chunks_shrink_with_the_terms_of_a_row() -> None:
    assert layout_for(torch.device("cpu"), 10**5, layouts.SLAB_BYTES // 10).chunk_rows == 10
    assert layout_for(torch.device("cpu"), 10**5, 10 * layouts.SLAB_BYTES).chunk_rows == 1
