"""Relaxed choices, AutoField and AutoDim: formulas by hand, who learns when, and fields that are known to be idle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.autodim.method import MixtureStage
from embsearch_dist.methods.autofield.method import GateStage, top
from embsearch_dist.methods.gated.config import RelaxConfig
from embsearch_dist.methods.gated.mixture import MixtureModel, probable
from embsearch_dist.methods.gated.relaxed import Choice, step_noise
from embsearch_dist.methods.gated.unrolled import unrolled_loss
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.run import Run
from embsearch_dist.train.bilevel import frozen
from tests.factories import one_rank, open_run, prepared, small_config

TRAINING = [
    "search.training.batch_size=128",
    "search.training.eval_batch_size=400",
    "search.training.epochs=6",
    "search.outer.every=2",
    "search.outer.lr=0.05",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def open_method(name: str, data: Path, directory: Path, *words: str) -> Run:
    return open_run(small_config(data, directory, *TRAINING, *words, method=name), one_rank())


def search(name: str, data: Path, directory: Path, *words: str) -> Allocation:
    run, method = open_method(name, data, directory, *words), METHODS[name]()
    check_stages(method, run)
    run_stages(method, run)
    return Allocation.load(directory / "allocation.json", run.schema)


# ---- the relaxation ----


def test_weights_of_a_choice_by_hand() -> None:
    """p = 1/4, 3/4. At tau 1/2 squares count: 1 to 9. Noise -log(-log u) of u = exp(-1), exp(-3) is 0 and -log 3."""
    choice = Choice(1, 2)
    choice.logits.data = torch.tensor([[1.0, 3.0]]).log()
    torch.testing.assert_close(choice(1.0), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(choice(0.5), torch.tensor([[0.1, 0.9]]))
    uniform = torch.tensor([[-1.0, -3.0]]).exp()
    torch.testing.assert_close(choice(1.0, uniform), torch.tensor([[0.5, 0.5]]))


def test_the_temperature_falls_with_steps_to_a_floor_and_only_where_there_is_one() -> None:
    assert RelaxConfig().temperature(4000) == pytest.approx(0.8)
    assert RelaxConfig().temperature(1_000_000) == 0.01
    assert RelaxConfig(mode="softmax").temperature(4000) == 1.0


def test_noise_draws_each_candidate_as_often_as_its_probability_says() -> None:
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    choice = Choice(1, 3)
    choice.logits.data = logits
    config, drawn = RelaxConfig(), torch.zeros(3)
    for step in range(4000):
        drawn[int(choice(0.01, step_noise(config, logits, 1, step, 0)).argmax())] += 1
    torch.testing.assert_close(drawn / 4000, torch.tensor([0.125, 0.25, 0.625]), atol=0.02, rtol=0)
    assert step_noise(RelaxConfig(mode="tempered"), logits, 1, 0, 0) is None
    own = [step_noise(config, logits, *at) for at in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0))]
    assert len({tuple(x.flatten().tolist()) for x in own}) == 4  # seed, step and stream each count


@pytest.mark.parametrize("name", ["autofield", "autodim"])
def test_held_out_rows_train_the_choice_and_nothing_else(name: str, data: Path, tmp_path: Path) -> None:
    run = open_method(name, data, tmp_path, "search.outer.pretrain_epochs=0.1")  # 2 steps of 24
    task = {"autofield": GateStage, "autodim": MixtureStage}[name]().task(run, training=True)
    batch = next(iter(run.stream("train", 128, shuffle=True).epoch(0)))
    for step in (0, 5):  # before and after the choice sets in
        task.loss(batch, step).backward()
        assert task.model.bare_selector.logits.grad is None
        assert any(p.grad is not None for p in task.model.bare_head.parameters())
        task.model.zero_grad(set_to_none=True)
    buffers = {n: b.clone() for n, b in task.model.replicated.named_buffers()}
    assert task.outer_loss(5) is None
    loss = task.outer_loss(4)
    assert loss is not None
    loss.backward()
    assert task.model.bare_selector.logits.grad.abs().sum() > 0
    assert all(torch.equal(b, buffers[n]) for n, b in task.model.replicated.named_buffers())
    assert all(m.training for m in task.model.normed)
    task.close()


def test_a_second_order_step_has_the_gradient_of_the_unrolled_loss() -> None:
    """Against the exact derivative through the virtual step, of losses that are no polynomials of degree two."""
    generator = torch.Generator().manual_seed(0)
    x, y, target = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 6, 6))
    w = torch.nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64), requires_grad=False)
    a = torch.nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def train_at(w: torch.Tensor) -> torch.Tensor:
        return ((a * w * x).tanh() - target).square().mean()

    def held_out_at(w: torch.Tensor) -> torch.Tensor:
        return (w * y).sigmoid().mean() + 0.1 * (a * w).sin().mean()

    before, rate = w.detach().clone(), 0.5
    found = unrolled_loss(lambda: train_at(w), lambda: held_out_at(w), [w, unused], [a], rate, one_rank())
    found.backward()
    assert torch.equal(w, before) and not w.requires_grad and w.grad is None and unused.grad is None
    free = before.clone().requires_grad_(True)
    moved = free - rate * torch.autograd.grad(train_at(free), free, create_graph=True)[0]
    exact = torch.autograd.grad(held_out_at(moved), a, retain_graph=True)[0]
    first_order = torch.autograd.grad(held_out_at(moved.detach()), a)[0]
    assert found.item() == pytest.approx(held_out_at(moved).item())
    torch.testing.assert_close(a.grad, exact, rtol=1e-3, atol=0)
    assert abs(float(first_order - exact)) > 0.05 * abs(float(exact))


def test_the_second_order_of_autodim_leaves_head_and_statistics_as_they_are(data: Path, tmp_path: Path) -> None:
    gradients = []
    for order in ("first", "second"):
        words = ("search.outer.pretrain_epochs=0", f"search.order={order}", "optim.dense_lr=0.5")
        task = MixtureStage().task(open_method("autodim", data, tmp_path, *words), training=True)
        task.loss(next(iter(task.batches.epoch(0))), 1).backward()
        task.model.zero_grad(set_to_none=True)
        before = {n: t.clone() for n, t in task.model.replicated.state_dict().items()}
        with frozen(list(task.model.bare_head.parameters())):  # as the trainer does it
            task.outer_loss(2).backward()
        after = task.model.replicated.state_dict()
        assert all(torch.equal(t, after[n]) for n, t in before.items())
        assert all(p.grad is None for p in task.model.bare_head.parameters()) and task.model.bare_head.training
        gradients.append(task.model.bare_selector.logits.grad.clone())
        task.close()
    assert gradients[1].isfinite().all() and not torch.allclose(*gradients)


# ---- AutoField ----


def test_the_top_fields_are_kept_and_of_equal_ones_the_first() -> None:
    assert top(torch.tensor([0.1, 0.7, 0.4, 0.7]), 2) == [0, 1, 0, 1]
    assert top(torch.tensor([0.5, 0.5, 0.5]), 1) == [1, 0, 0]


def test_autofield_finds_the_fields_that_matter(data: Path, tmp_path: Path) -> None:
    """The label depends on the pair (left, right) alone. Half of four fields are kept; a budget that holds three of the
    small ones keeps them, by their probabilities, before the field of thousands of values, which it cannot hold."""
    found = search("autofield", data, tmp_path, "search.width=4", "search.pareto=[250]")
    assert found.widths == {"left": 4, "big": 0, "right": 4, "idle": 0}
    some = Allocation.load(tmp_path / "allocations" / "autofield-250.json", found.schema)
    assert some.widths == {"left": 4, "big": 0, "right": 4, "idle": 4} and some.total("parameters") <= 250
    probabilities = dict(zip(found.schema.names, found.provenance["probabilities"], strict=True))
    assert (
        min(probabilities["left"], probabilities["right"])
        > 0.8
        > 0.3
        > max(probabilities["big"], probabilities["idle"])
    )


def test_more_fields_than_there_are_cannot_be_kept(data: Path, tmp_path: Path) -> None:
    run = open_method("autofield", data, tmp_path, "search.k=5")
    with pytest.raises(UserError, match=r"search.k: must be at most 4"):
        check_stages(METHODS["autofield"](), run)


# ---- AutoDim ----


def test_the_mixture_by_hand(data: Path, tmp_path: Path) -> None:
    """At the start a map copies the columns: a candidate is the normalised prefix, and zeros behind it."""
    run = open_method("autodim", data, tmp_path, "search.candidates=[0, 2, 4]")
    model = MixtureModel(run.config, run.schema, [0, 2, 4], Choice(4, 3), run.context)
    u = torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    whole = (u - u.mean(0)) / (u.var(0, unbiased=False) + 1e-5).sqrt()
    prefix = whole.clone()
    prefix[..., 2:] = 0
    expected = torch.stack([prefix[:, 0], whole[:, 1], 0 * whole[:, 2], 0.3 * prefix[:, 3] + 0.5 * whole[:, 3]], 1)
    torch.testing.assert_close(model.mixed(u, weights), expected, rtol=1e-4, atol=1e-5)
    trained = {n for n, p in model.mixture.named_parameters() if p.requires_grad}
    assert trained == {"weight"}  # neither scale nor shift


def test_autodim_drops_fields_that_do_not_matter_and_widens_those_that_do(data: Path, tmp_path: Path) -> None:
    found = search("autodim", data, tmp_path, "search.candidates=[0, 2, 4, 8]", "search.pareto=[60]")
    assert found.widths["big"] == found.widths["idle"] == 0
    assert min(found.widths["left"], found.widths["right"]) >= 2  # the planted rank
    some = Allocation.load(tmp_path / "allocations" / "autodim-60.json", found.schema)
    assert 0 < some.total("parameters") <= 60


def test_the_most_probable_widths_under_a_budget() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.8, 0.1]]).log().double()
    costs = torch.tensor([[0.0, 20, 40], [0, 10, 20]]).double()
    candidates = [0, 2, 4]
    assert probable(scores, costs, 1000, candidates) == [2, 1]
    assert probable(scores, costs, 49, candidates) == [1, 1]
    assert probable(scores, costs, 10, candidates) == [0, 1]
    likely_none = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.15, 0.05]]).log().double()
    assert probable(likely_none, costs, 1000, candidates) == [0, 1]  # one field must stay
    assert probable(likely_none, costs, 10, candidates) == [0, 1]
