"""Zero-cost proxies and the population they leave: what each measures, and that ranks and repetition change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.config.read import load_config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.methods.nasrec import config as settings
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.evolution import Evolution, Limits
from embsearch_dist.methods.nasrec.prefilter import FILE, batch_of, draw_distinct, mean_ranks, prefilter, vectors
from embsearch_dist.methods.nasrec.proxies import PARTS, PROXIES, jacob_cov, snip, zico
from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.canonical import key
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import Space
from embsearch_dist.schema import Field, Schema
from embsearch_dist.train.monitor import Monitor
from tests.factories import prepared, random_batch
from tests.unit.test_nasrec_evolution import ONE_BLOCK, toy
from tests.unit.test_nasrec_scoring import NASREC, SPACE, nasrec_run

ROWS, COLUMNS, FIELDS = 64, 3, 4
OVERRIDES = ["search.prefilter.proxies=[snip,zico,jacob_cov]", "search.prefilter.sample=12", "search.prefilter.rows=64"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def network(seed: int = 0) -> ArchitectureNetwork:
    torch.manual_seed(seed)
    return ArchitectureNetwork(
        draw(SPACE, SCHEMES[0], np.random.default_rng(seed)), SPACE, FIELDS, COLUMNS, "attention"
    )


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dense, u = torch.randn(ROWS, COLUMNS, generator=generator), torch.randn(ROWS, FIELDS, 8, generator=generator)
    return dense, u, torch.randint(2, (ROWS,), generator=generator).float()


def gradients(net: ArchitectureNetwork, part: slice = slice(None)) -> list[torch.Tensor]:
    net.zero_grad()
    dense, u, label = batch()
    binary_cross_entropy_with_logits(net(u[part], dense[part]), label[part]).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_snip_is_what_small_changes_of_single_weights_do_to_the_loss() -> None:
    net = network()
    expected = sum(float((g * p).abs().sum()) for g, p in zip(gradients(net), net.parameters(), strict=True))
    assert snip(net, batch()) == pytest.approx(expected, rel=1e-5) and expected > 0
    assert all(p.grad is None or p.requires_grad for p in net.parameters())


def test_zico_is_the_mean_over_the_deviation_of_gradients_of_parts() -> None:
    net, size = network(), ROWS // PARTS
    parts = [gradients(net, slice(k * size, (k + 1) * size)) for k in range(PARTS)]
    expected = 0.0
    for k, p in enumerate(net.parameters()):
        values = np.stack([g[k].abs().numpy() for g in parts])
        if p.ndim == 2:
            deviation = values.std(0, ddof=1)
            expected += np.log((values.mean(0) / np.where(deviation > 0, deviation, np.inf)).sum())
    assert zico(net, batch()) == pytest.approx(expected, rel=1e-3)


def test_jacob_cov_is_greatest_where_all_rows_pull_in_other_directions() -> None:
    class Made(torch.nn.Module):
        """Row k reads the input through a vector of its own, or all through one."""

        def __init__(self, vectors: torch.Tensor) -> None:
            super().__init__()
            self.vectors = vectors

        def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
            return (u.flatten(1) * self.vectors).sum(1)

    inputs = (torch.zeros(8, 0), torch.randn(8, 4, 8), torch.zeros(8))
    torch.manual_seed(0)
    own, one = torch.randn(8, 32), torch.randn(1, 32).expand(8, -1)
    found = [jacob_cov(Made(v), inputs) for v in (torch.linalg.qr(own.T)[0].T, own, one)]  # type: ignore[arg-type]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_is_a_number_of_every_network_and_leaves_it_as_it_was(name: str) -> None:
    found = []
    for seed in range(8):
        net = network(seed)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        found.append(PROXIES[name](net, batch()))
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert np.isfinite(found).all() and len(set(found)) == 8


def test_proxies_of_the_config_are_those_there_are() -> None:
    assert tuple(PROXIES) == settings.PROXIES


def test_ranks_are_averaged_over_proxies_whatever_their_scales() -> None:
    assert mean_ranks([[1.0, 900.0], [3.0, 100.0], [2.0, 500.0]]).tolist() == [1.0, 1.0, 1.0]
    assert mean_ranks([[1.0, 1e9], [3.0, 1e3], [3.0, -5.0]]).tolist() == [1.0, 0.75, 1.25]


def test_networks_are_drawn_once_and_a_small_space_runs_out() -> None:
    found = draw_distinct(SPACE, 40, 0)
    assert len({name for _, name in found}) == 40 and all(key(a) == name for a, name in found)
    assert draw_distinct(SPACE, 40, 0) == found != draw_distinct(SPACE, 40, 1)
    assert len(draw_distinct(ONE_BLOCK, 40, 0)) == 4


def test_networks_outside_of_the_limits_of_the_cost_are_not_drawn() -> None:
    def blocks(architecture: Architecture) -> float:
        return float(sum(b.fm for b in architecture.blocks))

    limits = Limits(settings.EvolutionConfig(cost="flops", cost_at_most=1), blocks)
    free, found = draw_distinct(SPACE, 40, 0), draw_distinct(SPACE, 40, 0, limits)
    assert max(blocks(a) for a, _ in free) > 1
    assert len(found) == 40 and max(blocks(a) for a, _ in found) == 1


def test_vectors_are_of_values_and_have_variance_one() -> None:
    schema = Schema("x", (Field("a", 5000), Field("b", 5000)), ("x0",))
    b = random_batch(schema, rows=4000)
    a = vectors(b, "a", 0, 16)
    assert a.mean() == pytest.approx(0, abs=0.02) and a.var() == pytest.approx(1, abs=0.03)
    ids = b.sparse["a"].values()
    assert all(len({tuple(v) for v in a[ids == i].tolist()}) == 1 for i in ids[:20])
    assert not torch.equal(vectors(b, "a", 1, 16), a)
    columns = np.corrcoef(a.numpy().T) - np.eye(16)
    assert np.abs(columns).max() < 0.08


def test_the_upper_share_is_kept_in_order(data: Path, tmp_path: Path) -> None:
    run = nasrec_run(data, tmp_path, *OVERRIDES)
    with Monitor(tmp_path, "evolution", 0, quiet=True) as monitor:
        found = prefilter(run, SPACE, monitor)
    body = json.loads((tmp_path / FILE).read_text())
    assert len(found) == 3 and body["drawn"] == 12 and [c["key"] for c in body["kept"]] == [n for _, n in found]
    means = [c["mean_rank"] for c in body["kept"]]
    assert means == sorted(means) and means[0] < 5.5  # the mean of all
    drawn = {n: a for a, n in draw_distinct(SPACE, 12, 0)}
    assert all(drawn[n] == a for a, n in found)


def test_a_batch_is_of_training_rows_with_the_labels_they_have(data: Path, tmp_path: Path) -> None:
    run = nasrec_run(data, tmp_path, *OVERRIDES)
    dense, u, label = batch_of(run, 8)
    assert (dense.shape, u.shape, label.shape) == ((64, 1), (64, 4, 8), (64,))
    b: Batch = next(run.stream("train", 64, shuffle=True).epoch(0))
    assert torch.equal(dense, b.dense) and torch.equal(label, b.label)


def test_evolution_starts_from_what_was_kept_and_fills_up_at_random() -> None:
    start = draw_distinct(SPACE, 5, 0)
    sizes = {"population": 8, "generations": 3, "parents": 4, "children": 3, "keep": 5}
    evolution = Evolution(SPACE, settings.EvolutionConfig(**sizes), 0)
    evolution.start = start
    proposed = evolution.propose()
    assert proposed[:5] == start and len({n for _, n in proposed}) == 8
    evolution.record(proposed, [toy(a, n) for a, n in proposed])
    assert len(evolution.propose()) == 3  # generations after it are as they were
    few = Evolution(SPACE, settings.EvolutionConfig(**(sizes | {"population": 4})), 0)
    few.start = start
    assert few.propose() == start[:4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.prefilter.proxies=[snap]", "search.prefilter.proxies: 'snap' is none of snip.*'snip'"),
        ("search.prefilter.proxies=[snip,snip]", "name each once"),
        ("search.prefilter.keep=0", "search.prefilter.keep"),
        ("search.prefilter.rows=8", "at least 16"),
        ("search.prefilter.sample=1", "at least 2"),
    ],
)
def test_a_setting_out_of_range_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config({"nasrec": NASRecConfig}, None, [*NASREC, override], method="nasrec")


def test_blocks_of_products_alone_are_ranked_too() -> None:
    """No ReLU anywhere, and every dense part an inner product."""
    block = Block(("dot_product",), 8, ("attention",), 4, (0,), (0,), (), (), False, False)
    space = Space(1, ("dot_product",), ("attention",), (8,), (4,), 1, 2, 8)
    net = ArchitectureNetwork(Architecture((block,)), space, FIELDS, COLUMNS, "attention")
    assert all(np.isfinite(f(net, batch())) for f in PROXIES.values())
