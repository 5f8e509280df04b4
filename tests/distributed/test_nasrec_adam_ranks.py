"""NASRec's lazy Adam on two ranks that draw architectures of their own: against a computation by hand, and as a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.methods.nasrec.model import Blocks, SliceAdam, SlicedNetwork
from embsearch_dist.methods.nasrec.supernet_stage import SupernetTask, load_supernet
from embsearch_dist.methods.stages import run_stages
from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.sampling import SCHEMES, training_architecture
from embsearch_dist.networks.slices import Layout, merged, slices_of
from tests.distributed.test_nasrec_ranks import digest
from tests.factories import open_run, prepared, rank_context, small_config
from tests.ranks import run_ranks
from tests.unit.test_nasrec_scoring import NASREC, SPACE, OnlySupernet
from tools.bench.masked import MaskedNetwork

STEPS, ROWS, FIELDS, COLUMNS = 6, 16, 4, 2
LR, EPS, BETAS = 0.01, 1e-3, (0.9, 0.99)  # a large eps: gradients of rounding errors alone must not decide
OWN = ["search.sampling.same_network=false", "optim.dense=adam", "optim.dense_lr=0.01", "search.supernet.steps=6"]


def network() -> SlicedNetwork:
    torch.manual_seed(0)
    return SlicedNetwork(Layout(SPACE, COLUMNS, FIELDS))


def drawn(step: int) -> list[Blocks]:
    """What each rank trains in a step; after the warm-up the two have little in common."""
    return [prune(training_architecture(SPACE, SCHEMES[0], 0, step, rank, warmup_steps=2)) for rank in range(2)]


def loss_of(model: torch.nn.Module, blocks: Blocks, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    dense, u = (torch.randn(ROWS, *s, generator=generator) for s in ((COLUMNS,), (FIELDS, SPACE.width)))
    return torch.as_tensor(model(blocks, dense, u).square().mean())


def train(rank: int, world_size: int, data: str, folder: str) -> dict[str, Any]:
    context, ours = rank_context(rank, world_size), network()
    optimizer = SliceAdam(ours, LR)
    optimizer.param_groups[0]["eps"] = EPS
    for step in range(STEPS):
        blocks = drawn(step)
        loss_of(ours, blocks[rank], step, rank).backward()
        ours.average(context, blocks)
        optimizer.step()
    steps = [int(optimizer.state[w]["step"]) for w in ours.weights.values()]
    run = open_run(small_config(data, folder, *NASREC, *OWN, method="nasrec"), context)
    kept: list[SupernetTask] = []
    init = SupernetTask.__init__

    def spy(self: SupernetTask, *args: Any) -> None:
        init(self, *args)
        kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SupernetTask, "__init__", spy)
        run_stages(OnlySupernet(), run)
    trained = digest(kept[0])  # before anything is loaded
    return {"vector": ours.vector.tolist(), "steps": steps, "trained": trained, "loaded": digest(load_supernet(run))}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder, data = tmp_path_factory.mktemp("nasrec-adam"), str(prepared(tmp_path_factory))
    return list(run_ranks(train, 2, Path(folder), data, str(folder / "run"), timeout=240))


def test_ranks_end_with_the_same_bits(ranks: list[Any]) -> None:
    assert ranks[0] == ranks[1]
    assert ranks[0]["trained"] == ranks[0]["loaded"]


def test_moments_age_where_any_rank_has_used_them(ranks: list[Any]) -> None:
    """Whole weights, the masked supernet, and Adam written out for the union of what both ranks use."""
    other = network()
    masked, weights = MaskedNetwork(other), dict(other.weights.items())
    first, second = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    counts = dict.fromkeys(weights, 0)
    for step in range(STEPS):
        blocks = drawn(step)
        loss = torch.stack([loss_of(masked, b, step, rank) for rank, b in enumerate(blocks)]).mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True)))
        parts = [slices_of(b, other.layout) for b in blocks]
        with torch.no_grad():
            for n in {n for p in parts for n in p}:
                union, w, g = merged([p[n] for p in parts if n in p]), weights[n], gradients[n]
                assert g is not None
                used = torch.zeros_like(w)
                union.put(used, torch.ones(union.shape))
                counts[n] += 1
                first[n] += used * (1 - BETAS[0]) * (g - first[n])
                second[n] += used * (1 - BETAS[1]) * (g * g - second[n])
                roots = (second[n] / (1 - BETAS[1] ** counts[n])).sqrt()
                w -= used * LR * first[n] / (1 - BETAS[0] ** counts[n]) / (roots + EPS)
    assert ranks[0]["steps"] == list(counts.values()) and len(set(counts.values())) > 2
    expected = torch.cat([w.detach().flatten() for w in weights.values()])
    torch.testing.assert_close(torch.tensor(ranks[0]["vector"]), expected, rtol=1e-3, atol=1e-4)
    assert (expected - network().vector).abs().max() > 0.02
