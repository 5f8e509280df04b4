"""A data source and a supernet of a user's own tables on two ranks, against one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

import embsearch_dist as es
from embsearch_dist import running
from embsearch_dist.config.read import load_config
from embsearch_dist.methods import CONFIGS, METHODS
from embsearch_dist.methods.trial import overrides
from tests.factories import rank_context
from tests.ranks import run_ranks
from tests.unit.test_sources import Clicks


def search(rank: int, world_size: int, directory: str) -> dict[str, Any]:
    es.register_source("clicks")(Clicks)
    words = [*overrides(METHODS["adass"].trial), "data.source=clicks", f"run.dir={directory}", "run.device=cpu"]
    config = load_config(CONFIGS, None, [*words, "search.budget=60%"], method="adass")
    run = running.search(config, rank_context(rank, world_size))
    lines = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    logloss = [line["logloss"] for line in lines if "logloss" in line]
    return {"widths": es.Allocation.load(run.dir / "allocation.json").widths, "logloss": logloss}


def test_a_search_of_a_source_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    alone = run_ranks(search, 1, tmp_path, str(tmp_path / "one"))[0]
    both = run_ranks(search, 2, tmp_path, str(tmp_path / "two"))
    assert both[0] == both[1] and both[0]["widths"] == alone["widths"]
    assert both[0]["logloss"] == pytest.approx(alone["logloss"], rel=1e-4) and alone["logloss"]


NAMES = ["a", "b", "c"]


def masked(rank: int, world_size: int) -> dict[str, Any]:
    """This rank's rows through a sharded supernet, and which columns a fused step has moved."""
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    configs = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            embedding_dim=8,
            num_embeddings=16,
            feature_names=[name],
            init_fn=partial(torch.nn.init.constant_, val=k + 0.5),
        )
        for k, name in enumerate(NAMES)
    ]
    net = es.Supernet(configs, [0, 4, 8], sampling="random", device=torch.device("meta"))
    apply_optimizer_in_backward(torch.optim.SGD, net.tables.parameters(), {"lr": 0.1})
    bound = {c.name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"]) for c in configs}
    planner = EmbeddingShardingPlanner(topology=Topology(world_size, "cpu"), constraints=bound)
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(net, sharders, torch.distributed.GroupMember.WORLD)
    model = DistributedModelParallel(net, device=torch.device("cpu"), plan=plan, sharders=sharders)
    lengths = torch.tensor([1, 2, 0, 1, 1, 3], dtype=torch.int32)  # two rows of three fields
    features = KeyedJaggedTensor(keys=NAMES, values=torch.arange(8) + 8 * rank, lengths=lengths)
    widths = dict(zip(net.own.names, [4, 0, 8], strict=True))
    found = model(features, widths)
    values = {key: found[key].tolist() for key in NAMES}
    found.values().sum().backward()
    after = model(features, None)
    moved = {key: (after[key][-1] != after[key][-1, -1]).any().item() for key in NAMES}
    return {"values": values, "moved": moved, "drawn": [net.sample(step).tolist() for step in range(5)]}


def test_masks_of_a_sharded_supernet_are_those_of_its_tables(tmp_path: Path) -> None:
    both = run_ranks(masked, 2, tmp_path)
    assert both[0]["drawn"] == both[1]["drawn"]
    for found in both:
        zeros = [0.0] * 4
        assert found["values"]["a"] == [[0.5] * 4 + zeros, [1.0] * 4 + zeros]
        assert found["values"]["b"] == [[0.0] * 8] * 2
        assert found["values"]["c"] == [[2.5] * 8, [7.5] * 8]
        # The step behind moved the leading columns of "a" alone, none of "b", and all of "c" alike.
        assert found["moved"] == {"a": True, "b": False, "c": False}
