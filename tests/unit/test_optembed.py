"""OptEmbed: prefixes drawn row by row, an evolution that writes to no parent, and fields that are known to be idle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.optembed.evolution import Evolution, EvolutionConfig, Widths
from embsearch_dist.methods.optembed.method import OptEmbed, PrefixStage, closed, measured
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.methods.widest import Sample
from embsearch_dist.run import Run
from embsearch_dist.train.metrics import evaluate
from tests.factories import one_rank, open_run, prepared, small_config, table_gradients, whole_tables

ROWS = [10, 100, 1, 40]
SEARCH = [
    "search.width=4",
    "search.rows=400",
    "search.training.batch_size=128",
    "search.training.eval_batch_size=400",
    "search.training.epochs=6",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def open_optembed(data: Path, directory: Path, *words: str) -> Run:
    return open_run(small_config(data, directory, *SEARCH, *words, method="optembed"), one_rank())


def cost(widths: Sequence[int]) -> float:
    return float(sum(n * w for n, w in zip(ROWS, widths, strict=True)))


def evolution(limit: float, seed: int = 0, least: int = 0) -> Evolution:
    """The best score is that of the widths 1, 2, 3, 4."""

    def score(widths: Widths) -> float:
        assert cost(widths) <= limit and any(widths)
        return -float(sum(abs(w - k - 1) for k, w in enumerate(widths)))

    return Evolution(EvolutionConfig(), 4, least, 8, cost, limit, score, [seed])


def test_evolution_finds_the_best_widths_and_the_best_that_a_budget_holds() -> None:
    free = evolution(1e9)
    assert free.run() == (1, 2, 3, 4)
    assert len(free.scored) <= 20 + 30 * 20
    # The best costs 373. Two columns less fit: (1, 0, 3, 4) at 173 and (1, 1, 3, 3) at 233, the cheaper one first.
    assert evolution(233).run() == (1, 0, 3, 4)
    assert evolution(1e9, seed=1).run() == evolution(1e9, seed=1).run()


def test_no_parent_is_written_to() -> None:
    """The published code edits the parents and with them the best candidate that it has recorded."""
    one = evolution(1e9)
    parent, other = (1, 2, 3, 4), (8, 7, 6, 5)
    for _ in range(200):
        child = one.mutated(parent)
        assert parent == (1, 2, 3, 4) and all(0 <= w <= 8 for w in child)
        cut = one.crossed(parent, other)
        assert tuple(cut) in {(1, 7, 6, 5), (1, 2, 6, 5), (1, 2, 3, 5)}
    before = dict(one.scored)
    one.run()
    assert all(one.scored[w] == one.score(w) for w in one.scored) and before == {}


def test_repair_cuts_what_is_too_dear_and_keeps_a_field() -> None:
    search = evolution(60)
    for _ in range(100):
        fixed = search.repaired([8, 8, 8, 8])
        assert cost(fixed) <= 60 and all(w <= 8 for w in fixed)
    assert search.repaired([1, 0, 2, 1]) == (1, 0, 2, 1)  # it fits
    assert search.repaired([0, 0, 0, 0]) == (0, 0, 1, 0)  # the cheapest
    with pytest.raises(ValueError, match="the least widths"):
        evolution(100, least=1).repaired([1, 1, 1, 1])


def test_each_row_and_field_draws_a_width_and_only_its_columns_learn(data: Path, tmp_path: Path) -> None:
    run = open_optembed(data, tmp_path, "optim.embedding=sgd", "optim.embedding_lr=1e4", "model.init_std=0.1")
    task = PrefixStage().task(run)
    drawn = torch.stack([task.drawn(500, step) for step in range(8)])
    shares = torch.stack([(drawn == w).float().mean((0, 1)) for w in range(6)])
    torch.testing.assert_close(shares[1:5], torch.full((4, 4), 0.25), atol=0.03, rtol=0)
    assert shares[0].sum() == shares[5].sum() == 0
    assert torch.equal(task.drawn(500, 3), drawn[3]) and not torch.equal(drawn[2], drawn[3])
    batch = next(iter(run.stream("train", 128, shuffle=True).epoch(0)))
    before, widths = whole_tables(task.model.sharded), task.drawn(128, 0)
    task.loss(batch, 0).backward()
    task.model.sharded.step()
    gradient = table_gradients(task.model.sharded, before)
    ids = batch.sparse["big"].values().long()
    once = [r for r in range(128) if (ids == ids[r]).sum() == 1]
    assert len(once) > 50
    for r in once:  # a value that a single row has moves in the columns that the row drew
        assert (gradient["big"][ids[r]] != 0).sum() <= widths[r, run.schema.names.index("big")]
    assert any((gradient["big"][ids[r]] != 0).any() for r in once)


def test_a_score_is_that_of_the_model_with_closed_columns(data: Path, tmp_path: Path) -> None:
    run = open_optembed(data, tmp_path, "model.init_std=0.5")
    task = PrefixStage().task(run)
    task.model.eval()
    batches = list(run.stream("validation", 200, shuffle=False).epoch(0))
    widths = (1, 0, 4, 2)
    found = measured(task.model, Sample.of(task.model, iter(batches), torch.device("cpu")), widths, run.context)
    task.mask.widths = torch.tensor(widths)
    whole = evaluate(task.predict, iter(batches), run.context)
    assert found == pytest.approx({key: whole[key] for key in found}, rel=1e-5) and {"auc", "logloss"} <= found.keys()
    torch.testing.assert_close(closed(torch.ones(2, 3), torch.tensor([1, 3])), torch.tensor([[1.0, 0, 0], [1, 1, 1]]))


def test_fields_that_do_not_matter_are_dropped_or_narrow(data: Path, tmp_path: Path) -> None:
    run = open_optembed(data, tmp_path, "search.drop=true", "search.pareto=[60]")
    check_stages(OptEmbed(), run)
    run_stages(OptEmbed(), run)
    found = Allocation.load(tmp_path / "allocation.json", run.schema)
    assert found.widths["big"] == found.widths["idle"] == 0
    assert min(found.widths["left"], found.widths["right"]) >= 2
    some = Allocation.load(tmp_path / "allocations" / "optembed-60.json", run.schema)
    assert 0 < some.total("parameters") <= 60
