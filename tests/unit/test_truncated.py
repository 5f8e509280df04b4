"""Cutting a trained model down: bases, losses of every single change, and moments of tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.making import BatchMaker
from embsearch_dist.methods import widest
from embsearch_dist.methods.directions import Bases, by_columns, common, principal, sensitive
from embsearch_dist.methods.truncated import Changes, TruncatedModel, calibration, logit_gram
from embsearch_dist.methods.widest import Moments, Repeats, Sample, known_in, single_ids, table_moments
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.schema import Field, Schema
from tests.factories import one_rank, random_batch, small_config, small_schema, whole_tables

SCHEMA = small_schema(11, 7, 5)
WIDTH, CANDIDATES = 6, [0, 2, 3, 6]


def model_of(*overrides: str, schema: Schema = SCHEMA) -> SubnetModel:
    config = small_config("no-data", "no-run", "model.init_std=0.5", "model.bottom=[4]", *overrides, method="ues")
    model = SubnetModel(config, Allocation.uniform(schema, WIDTH), one_rank())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def sample_of(model: SubnetModel) -> Sample:
    batches = [random_batch(SCHEMA, rows, seed) for seed, rows in enumerate((60, 60, 37))]
    return Sample.of(model, iter(batches), torch.device("cpu"))


def moments_of(sample: Sample) -> Moments:
    moments = Moments(3, WIDTH, torch.device("cpu"))
    for piece in sample.pieces(50):
        moments.add(piece.x)
    return moments


def bases_of(kind: str, model: SubnetModel, sample: Sample) -> Bases:
    moments = moments_of(sample)
    if kind == "sensitivity":
        return sensitive(moments, logit_gram(model, sample, one_rank()))
    return {"variance": principal, "common": common, "columns": by_columns}[kind](moments)


@pytest.mark.parametrize("kind", ["sensitivity", "variance", "common", "columns"])
def test_all_directions_give_the_embedding_back_and_none_its_mean(kind: str) -> None:
    model = model_of()
    sample = sample_of(model)
    bases = bases_of(kind, model, sample)
    coefficients = bases.coefficients(sample.x)
    whole = bases.embeddings(coefficients, torch.full((3,), WIDTH))
    torch.testing.assert_close(whole, sample.x, rtol=1e-3, atol=1e-3)
    nothing = bases.embeddings(coefficients, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(nothing, sample.x.mean(1, keepdim=True).expand_as(nothing), rtol=1e-4, atol=1e-5)


def test_each_basis_loses_least_in_its_own_measure() -> None:
    model = model_of()
    sample = sample_of(model)
    gram = logit_gram(model, sample, one_rank()).float()
    error = {}
    for kind in ("sensitivity", "variance", "columns"):
        bases = bases_of(kind, model, sample)
        lost = bases.embeddings(bases.coefficients(sample.x), torch.full((3,), 2)) - sample.x
        error[kind] = float(lost.square().sum()), float(torch.einsum("fnw,fwv,fnv->", lost, gram, lost))
    assert error["variance"][0] < error["columns"][0] and error["variance"][0] < error["sensitivity"][0]
    assert error["sensitivity"][1] < 0.9 * error["variance"][1]


@pytest.mark.parametrize("unify", ["always", "mixed"])
@pytest.mark.parametrize("backbone", ["deepfm", "wide_deep", "fm", "dlrm", "dcnv2"])
@pytest.mark.parametrize("extra", [(), ("model.first_order=value",), ("model.transform=field",)])
def test_changes_are_those_of_the_whole_model(backbone: str, unify: str, extra: tuple[str, ...]) -> None:
    model = model_of(f"model.backbone={backbone}", f"model.unify={unify}", *extra)
    sample = sample_of(model)
    truncated = TruncatedModel(model, sample, bases_of("sensitivity", model, sample), one_rank())
    choice = [1, 3, 2]
    ranks = [CANDIDATES[j] for j in choice]
    scale, shift = calibration(truncated.logits(ranks), sample.label, one_rank())

    def losses(other: list[int]) -> torch.Tensor:
        logits = scale * truncated.logits(other) + shift
        return binary_cross_entropy_with_logits(logits, sample.label, reduction="none").double()

    found, own = truncated.changes(choice, CANDIDATES), losses(ranks)
    assert found.loss == pytest.approx(float(own.mean()), rel=1e-5)
    for field in range(3):
        new = [losses([*ranks[:field], width, *ranks[field + 1 :]]) - own for width in CANDIDATES]
        assert found.more[field].tolist() == pytest.approx([float(d.mean()) for d in new], abs=1e-5)
        gain, error = found.gain(field, 0, 3)
        paired = new[0] - new[3]
        assert gain == pytest.approx(float(paired.mean()), abs=1e-5)
        assert error == pytest.approx(float(paired.std() / len(paired) ** 0.5), rel=1e-2)
    assert found.more[0, 1] == 0  # the allocation itself: no rounding


def test_a_field_is_judged_by_the_rows_that_know_its_value() -> None:
    model = model_of()
    sample = sample_of(model)
    assert sample.known is not None
    truncated = TruncatedModel(model, sample, bases_of("variance", model, sample), one_rank())
    choice, ranks = [3, 3, 3], [CANDIDATES[3]] * 3
    every, found = (truncated.changes(choice, CANDIDATES, known=known) for known in (False, True))
    scale, shift = calibration(truncated.logits(ranks), sample.label, one_rank())
    for field in range(3):
        known = sample.known[field]
        assert 0 < known.sum() < len(known), "the batch must hold rows of both kinds"
        new = truncated.logits([*ranks[:field], CANDIDATES[0], *ranks[field + 1 :]])
        both = [
            binary_cross_entropy_with_logits(scale * x + shift, sample.label, reduction="none").double()[known]
            for x in (new, truncated.logits(ranks))
        ]
        gain, error = found.gain(field, 0, 3)
        paired = both[0] - both[1]
        assert gain == pytest.approx(float(paired.mean()), abs=1e-5)
        assert error == pytest.approx(float(paired.std() / len(paired) ** 0.5), rel=1e-2)
        assert found.counts is not None and int(found.counts[field]) == int(known.sum())
    assert not torch.allclose(found.more, every.more) and found.loss == every.loss


def test_a_row_knows_a_field_by_any_id_of_its_own() -> None:
    schema = Schema("lists", (Field("a", 5), Field("tags", 4, "sum", True)))
    lengths = torch.tensor([1, 1, 1, 2, 0, 1], dtype=torch.int32)  # of a, then of tags, in three rows
    sparse = KeyedJaggedTensor(list(schema.names), torch.tensor([0, 4, 1, 0, 3, 0]), lengths=lengths)
    assert known_in(sparse, ["tags", "a"]).tolist() == [[True, False, False], [False, True, True]]


@pytest.mark.parametrize("extra", [(), ("model.first_order=value",)])
def test_the_whole_rank_is_the_model_itself(extra: tuple[str, ...]) -> None:
    model = model_of(*extra)
    batch = random_batch(SCHEMA, 40, 3)
    sample = Sample.of(model, iter([batch]), torch.device("cpu"))
    truncated = TruncatedModel(model, sample, bases_of("variance", model, sample), one_rank())
    with torch.no_grad():
        torch.testing.assert_close(truncated.logits([WIDTH] * 3), model(batch)[0], rtol=1e-3, atol=1e-4)


def test_calibration_undoes_a_scale_and_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, generator=generator)
    labels = (torch.rand(20_000, generator=generator) < logits.sigmoid()).float()
    scale, shift = calibration(4 * logits - 6, labels, one_rank())
    assert scale == pytest.approx(0.25, abs=0.02)
    assert shift == pytest.approx(1.5, abs=0.05)


def test_a_sample_of_one_class_has_no_auc_and_a_logloss() -> None:
    model = model_of()
    sample = sample_of(model)
    one = replace(sample, label=torch.ones_like(sample.label))
    found = TruncatedModel(model, one, bases_of("variance", model, sample), one_rank()).metrics([WIDTH] * 3)
    assert math.isnan(found["auc"]) and found["logloss"] > 0


def test_moments_of_tables_count_each_row_once() -> None:
    model = model_of()
    found = table_moments(model, SCHEMA, one_rank())
    assert found.count.tolist() == [11, 7, 5]
    for f, (name, table) in enumerate(whole_tables(model.sharded).items()):
        assert name == f"f{f}"
        own = table[:, :WIDTH].double()
        torch.testing.assert_close(found.mean[f], own.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.covariance[f], own.T.cov(correction=0), rtol=1e-4, atol=1e-6)


def test_tables_are_gone_through_in_blocks_that_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widest, "BLOCK_VALUES", 4 * len(SCHEMA.fields) * WIDTH)  # four rows of eleven
    model = model_of()
    blocks = list(widest.blocks_of(model.tables, SCHEMA, one_rank()))
    assert [ids.tolist() for _, _, ids, _ in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [passed for *_, passed in blocks] == [4, 4, 3]
    found = table_moments(model, SCHEMA, one_rank())
    assert found.count.tolist() == [11, 7, 5]
    for f, table in enumerate(whole_tables(model.sharded).values()):
        torch.testing.assert_close(found.mean[f], table[:, :WIDTH].double().mean(0), rtol=1e-5, atol=1e-6)


def test_a_sample_is_its_batches_in_a_row() -> None:
    model = model_of()
    batches = [random_batch(SCHEMA, rows, seed) for seed, rows in enumerate((60, 60, 37))]
    sample = sample_of(model)
    with torch.no_grad():
        parts = [model.tables(batch.sparse).stack() for batch in batches]
    assert torch.equal(sample.x, torch.cat(parts, 1)) and len(sample.label) == 157
    for count in (3, 4):  # there may be fewer than expected
        once = Sample.of(model, iter(batches), torch.device("cpu"), count)
        assert torch.equal(once.x, sample.x) and torch.equal(once.known, sample.known)


def test_rows_of_weighted_lists_are_looked_up_with_weight_one() -> None:
    schema = Schema("lists", (Field("a", 5), Field("tags", 3, "sum", True, 2.0)))
    sparse = single_ids(schema, torch.tensor([[0, 4], [1, 2]], dtype=torch.int32))
    assert sparse.weights().tolist() == [1, 1, 1, 1]
    assert sparse["tags"].values().tolist() == [1, 2]


def test_a_gain_and_its_error_come_from_the_same_rows() -> None:
    rows = torch.tensor([[0.1, 0.3, 0.2], [0.0, 0.1, -0.1]], dtype=torch.float64)
    changes = Changes(0.5, 3, rows.mean(1)[None], (rows @ rows.T / 3)[None])
    paired = rows[0] - rows[1]
    gain, error = changes.gain(0, 0, 1)
    assert gain == pytest.approx(float(paired.mean()))
    assert error == pytest.approx(float(paired.std() / 3**0.5))


def test_how_often_an_id_comes_again_is_told_by_a_sample() -> None:
    """Of 40,000 rows users have 20 each, orders have one; a third field holds one known value, the last none."""
    rows = 40_000
    schema = small_schema(rows // 20 + 1, rows + 1, 2, 2)
    whole = torch.stack([torch.arange(rows) % (rows // 20) + 1, torch.arange(rows) + 1, torch.arange(rows) % 2])
    whole = torch.cat([whole, torch.zeros(1, rows, dtype=torch.int64)]).int()

    def told(ids: torch.Tensor, of: int) -> list[float]:
        counts = Repeats(schema.names)
        for part in ids.split(1000, 1):
            size = part.shape[1]
            batch = Batch(torch.zeros(size, 0), BatchMaker(schema).sparse(part), torch.zeros(size), Position(0, 1))
            assert [b is batch for b in counts.watch(iter([batch]))] == [True]
        return counts.again(of, one_rank()).tolist()

    exact = told(whole, rows)
    assert exact[:3] == pytest.approx([19, 0, rows / 2 - 1]) and math.isnan(exact[3])
    drawn = told(whole[:, torch.randperm(rows, generator=torch.Generator().manual_seed(3))[:8000]], rows)
    assert drawn[:3] == pytest.approx([19, 0, rows / 2 - 1], rel=0.05) and math.isnan(drawn[3])
    assert all(map(math.isnan, told(whole, 0)))
