"""ESAPN: rewards and growth by hand, tables that sampling leaves alone, and fields that grow because it is worth it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.esapn.growth import Growth, replayed
from embsearch_dist.methods.esapn.method import GrowthTask, policy_loss, present
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor
from tests.factories import one_rank, open_run, prepared, random_batch, small_config, whole_tables

TRAINING = [
    "search.training.batch_size=128",
    "search.training.eval_batch_size=400",
    "search.training.epochs=8",
    "search.outer.lr=0.002",
    "search.candidates=[1, 2, 4]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def open_esapn(data: Path, directory: Path, *words: str) -> Run:
    return open_run(small_config(data, directory, *TRAINING, *words, method="esapn"), one_rank())


def search(data: Path, directory: Path, *words: str) -> Allocation:
    run, method = open_esapn(data, directory, *words), METHODS["esapn"]()
    check_stages(method, run)
    run_stages(method, run)
    return Allocation.load(directory / "allocation.json", run.schema)


# ---- growth ----


def test_fields_grow_above_one_half_the_most_probable_first_and_never_beyond_the_widest() -> None:
    growth = Growth([0, 2, 0, 1])
    assert growth.enlarge(7, [0.6, 0.9, 0.5, 0.8], 2)
    assert growth.sizes == [1, 2, 0, 2] and growth.steps == [(7, 3), (7, 0)]
    assert not growth.enlarge(8, [0.1, 1.0, 0.2, 1.0], 2)  # what grew by mistake stays
    assert growth.sizes == [1, 2, 0, 2] and len(growth.steps) == 2


def test_a_budget_refuses_what_breaks_it_and_takes_what_comes_after() -> None:
    """Columns cost 10, 1 and 2. After 1 more column of field 0 the limit 20 has room for fields 1 and 2 alone."""
    growth = Growth([2, 2, 1], [(1, 0), (2, 1), (3, 0), (4, 1), (5, 2)])

    def cost(widths: list[int]) -> float:
        return 10 * widths[0] + widths[1] + 2 * widths[2]

    candidates = [1, 2, 4]
    assert replayed(growth, candidates, cost, math.inf) == ([4, 4, 2], 0)
    assert replayed(growth, candidates, cost, 28) == ([2, 4, 2], 1)
    assert replayed(growth, candidates, cost, 26) == ([2, 4, 1], 2)
    assert replayed(growth, candidates, cost, 20) == ([1, 4, 2], 2)
    assert replayed(growth, candidates, cost, 13) == ([1, 1, 1], 5)


# ---- rewards ----


def test_the_loss_of_the_policy_by_hand() -> None:
    """Row 0 enlarged with probability 3/4, row 1 kept with 1/4; the second field cannot grow and counts for nothing."""
    logits = torch.tensor([[math.log(3.0), 5.0], [math.log(3.0), -5.0]], requires_grad=True)
    action = torch.tensor([[True, False], [False, False]])
    reward = torch.tensor([0.2, -0.4])
    loss = policy_loss(logits, action, torch.tensor([True, False]), reward)
    assert loss.item() == pytest.approx(-(0.2 * math.log(0.75) - 0.4 * math.log(0.25)) / 2)
    loss.backward()
    # d log pi / d logit is 1 - p for an enlargement and -p for a keep.
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.2 * 0.25 / 2, 0.0], [-0.4 * 0.75 / 2, 0.0]]))


def test_the_present_size_chooses_the_output() -> None:
    table = torch.arange(12.0).view(2, 3, 2)
    assert present(table, torch.tensor([0, 1, 2])).tolist() == [[0, 3, 5], [6, 9, 11]]


def test_rows_are_rewarded_for_what_they_drew_and_no_table_is_written_to(data: Path, tmp_path: Path) -> None:
    run = open_esapn(data, tmp_path, "search.outer.pretrain_epochs=0", "search.start=0")
    task = GrowthTask(run, training=True)
    task._take(Growth([0, 2, 1, 0]))
    tables = {n: t.clone() for n, t in whole_tables(task.model.sharded).items()}
    batch = random_batch(run.schema, 40)
    action = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    action[:, 1] = False
    drawn, kept = task._losses(batch, action)
    u, widths = task.model.embed(batch).detach(), torch.tensor([1, 2, 4])
    for sizes, found in ((torch.tensor([0, 2, 1, 0]) + action, drawn), (torch.tensor([0, 2, 1, 0]), kept)):
        cut = u.clone()
        for row in range(40):
            for f in range(4):
                own = widths[sizes[row, f] if sizes.dim() == 2 else sizes[f]]
                cut[row, f, own:] = 0
        logits = task.model.bare_head(batch.dense, cut)
        expected = binary_cross_entropy_with_logits(logits, batch.label, reduction="none")
        torch.testing.assert_close(found, expected.detach())
    loss = task.outer_loss(1)
    assert loss is not None
    loss.backward()
    assert task.net.last_bias.grad[[0, 2, 3]].abs().sum() > 0 and not task.net.last_bias.grad[1].any()
    assert all(p.grad is None for p in task.model.bare_head.parameters()) and task.model.bare_head.training
    assert all(torch.equal(t, tables[n]) for n, t in whole_tables(task.model.sharded).items())
    task.close()


def test_the_baseline_of_the_last_losses_is_the_mean_of_five(data: Path, tmp_path: Path) -> None:
    task = GrowthTask(open_esapn(data, tmp_path, "search.baseline=last"), training=False)
    means = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    found = [float(task._baseline(torch.zeros(2), torch.tensor([m - 0.1, m + 0.1]))[0]) for m in means]
    assert found == pytest.approx([0.9, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6])
    assert task.losses == pytest.approx(means[-5:])


def test_a_size_ahead_is_open_to_a_share_of_the_rows(data: Path, tmp_path: Path) -> None:
    task = GrowthTask(open_esapn(data, tmp_path, "search.ahead=0.25"), training=False)
    task._take(Growth([0, 2, 1, 0]))
    batch = random_batch(task.run.schema, 4000)
    ones = torch.ones(4000, 4, 4)
    open_ = task.select(ones, batch, 3).sum(2)
    assert [sorted(set(column.tolist())) for column in open_.T] == [[1, 2], [4], [2, 4], [1, 2]]
    assert (open_ > torch.tensor([1, 4, 2, 1])).float().mean(0).tolist() == pytest.approx(
        [0.25, 0, 0.25, 0.25], abs=0.03
    )
    assert task.select_final(ones, batch)[0].sum(1).tolist() == [1, 4, 2, 1]
    assert torch.equal(open_, task.select(ones, batch, 3).sum(2)) and not torch.equal(
        open_, task.select(ones, batch, 4).sum(2)
    )


def test_a_field_grows_when_the_average_lookup_would(data: Path, tmp_path: Path) -> None:
    """Half of the lookups enlarge with 0.9, the others with 0.2: 0.55 in the mean. The field of 0.45 stays."""
    run = open_esapn(data, tmp_path, "search.outer.pretrain_epochs=0")
    task = GrowthTask(run, training=False)
    task.net.rows.zero_()
    task.net.rows[:, 2:4] = 100
    p = torch.full((4, 24, 2), 0.01)
    p[0, 2:4, 0], p[1, 2:4, 0] = torch.tensor([0.9, 0.2]), torch.tensor([0.7, 0.2])
    task.net.forward = lambda: p.logit()  # type: ignore[method-assign]
    with Monitor(tmp_path, "growth", quiet=True) as monitor:
        task.after_step(5, monitor)
    assert task.growth.sizes == [1, 0, 0, 0] and task.growth.steps == [(5, 0)]
    again = GrowthTask(run, training=False)
    again.load_state(task.state())
    assert again.growth == task.growth and again.sizes.tolist() == [1, 0, 0, 0]


# ---- what it finds ----


def test_fields_that_matter_grow_and_idle_ones_stay_narrow(data: Path, tmp_path: Path) -> None:
    """The label depends on a table of (left, right) of rank 2."""
    found = search(data, tmp_path, "search.pareto=[3010]", "model.backbone=fm")
    assert found.widths["big"] == found.widths["idle"] == 1
    assert min(found.widths["left"], found.widths["right"]) >= 2
    growth = found.provenance["growth"]
    assert {name for _, name in growth} == {"left", "right"}
    some = Allocation.load(tmp_path / "allocations" / "esapn-3010.json", found.schema)
    assert some.total("parameters") <= 3010 < found.total("parameters")
    assert some.provenance["growth"] == growth and some.provenance["refused"] > 0  # of one search


def test_rewards_against_other_rows_and_a_hasty_policy_let_an_idle_field_grow(data: Path, tmp_path: Path) -> None:
    """Where it must fail: the reward is how hard a row is, more than what its action is worth, and what chance has
    enlarged stays."""
    found = search(data, tmp_path, "search.baseline=last", "search.outer.lr=0.01", "model.backbone=fm")
    assert found.widths["idle"] == 4


def test_sizes_that_cannot_grow_are_refused(data: Path, tmp_path: Path) -> None:
    for word, told in (
        ("search.candidates=[0, 2, 4]", "at least 1"),
        ("search.candidates=[4]", "at least two"),
        ("search.start=1", "at most 0"),
    ):
        with pytest.raises(UserError, match=told):
            open_esapn(data, tmp_path, word)
