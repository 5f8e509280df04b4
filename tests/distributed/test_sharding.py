"""Tables over ranks: initial values, the kind of sharding each table gets, and equal look-ups."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.errors import UserError
from embsearch_dist.sharding.sharded_tables import ShardedTables, Table, choose_sharding, initial_block
from tests.factories import one_rank, random_batch, rank_context, small_schema, whole_tables
from tests.ranks import run_ranks

# f0 spans three blocks of initial values and splits over two ranks inside one of them.
SCHEMA = small_schema(9000, 2100, 30)
TABLES = [Table("f0", 9000, 8), Table("f1", 2100, 12), Table("f2", 30, 4)]
KINDS = ["auto", "table_wise", "row_wise", "column_wise", "data_parallel"]


def build(rank: int, world_size: int, kinds: list[str], optimizer: str = "adam") -> list[dict[str, Any]]:
    """Per sharding kind: a digest of each whole table, what kind it got, the local shapes, and a look-up."""
    found = []
    for kind in kinds:
        context = rank_context(rank, world_size)
        tables = ShardedTables(TABLES, context, DistConfig(sharding=kind), OptimConfig(embedding=optimizer), 3, 0.1)
        whole = whole_tables(tables)
        batch = random_batch(SCHEMA, 16, seed=rank)
        pooled = tables(batch.sparse).to_dict()
        for name, value in pooled.items():
            assert torch.equal(value, whole[name][batch.sparse[name].values().long()]), (kind, name)
        digest = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in whole.items()}
        shapes = {s.table.name: list(s.tensor.shape) for s in tables.local_shards()}
        found.append({"digest": digest, "kinds": tables.kinds, "shapes": shapes})
    return found


def test_initial_values_are_equal_for_any_world_size_and_sharding(tmp_path: Path) -> None:
    one = run_ranks(build, 1, tmp_path, ["auto"])[0][0]["digest"]
    for world_size in (2, 3):
        for rank in run_ranks(build, world_size, tmp_path, KINDS):
            for kind, found in zip(KINDS, rank, strict=True):
                assert found["digest"] == one, (world_size, kind)


def test_two_ranks_share_tables_as_their_kind_says(tmp_path: Path) -> None:
    first, second = run_ranks(build, 2, tmp_path, KINDS)
    kinds = dict(zip(KINDS, zip(first, second, strict=True), strict=True))
    a, b = kinds["row_wise"]
    assert a["shapes"]["f0"] == b["shapes"]["f0"] == [4500, 8]
    assert a["kinds"] == {"f0": "row_wise", "f1": "row_wise", "f2": "table_wise"}  # 30 rows gain nothing
    a, b = kinds["column_wise"]
    assert a["shapes"]["f0"] == b["shapes"]["f0"] == [9000, 4]
    assert a["kinds"]["f2"] == "table_wise"  # four columns cannot be split
    a, b = kinds["table_wise"]
    assert sorted([*a["shapes"], *b["shapes"]]) == ["f0", "f1", "f2"]
    assert [*a["shapes"]] == ["f0"]  # the largest alone, the others together
    a, b = kinds["data_parallel"]
    assert a["shapes"] == b["shapes"] == {"f0": [9000, 8], "f1": [2100, 12], "f2": [30, 4]}
    a, _ = kinds["auto"]
    assert a["kinds"] == {"f0": "row_wise", "f1": "table_wise", "f2": "table_wise"}


def test_a_table_may_be_told_its_own_kind() -> None:
    config = DistConfig(sharding="table_wise", tables={"f0": "row_wise", "f2": "data_parallel"})
    kinds = choose_sharding(TABLES, 2, config)
    assert kinds == {"f0": "row_wise", "f1": "table_wise", "f2": "data_parallel"}


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_never_splits_a_table(kind: str) -> None:
    assert set(choose_sharding(TABLES, 1, DistConfig(sharding=kind)).values()) == {"table_wise"}


def test_initial_values_depend_on_seed_table_and_row_alone() -> None:
    tables = [
        ShardedTables(part, one_rank(), DistConfig(), OptimConfig(embedding=opt), seed, 0.1)
        for part, opt, seed in ((TABLES, "adam", 3), (TABLES[:1], "sgd", 3), (TABLES, "adam", 4))
    ]
    first, alone, other = (whole_tables(t)["f0"] for t in tables)
    assert torch.equal(first, alone)
    assert not torch.equal(first, other)
    assert torch.equal(first[4096:8192], initial_block(3, TABLES[0], 1, 0.1))
    assert float(first.std()) == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(first[:4096], first[4096:8192])


def test_initial_values_leave_torchs_own_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    initial_block(3, TABLES[0], 0, 0.1)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("width", [0, 6])
def test_a_width_fbgemm_cannot_hold_is_refused(width: int) -> None:
    with pytest.raises(UserError, match=f"'f0': physical width {width}"):
        ShardedTables([Table("f0", 10, width)], one_rank(), DistConfig(), OptimConfig(), 0, 0.1)


def test_a_sharding_for_an_unknown_table_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="dist.tables names 'nobody'"):
        ShardedTables(TABLES, one_rank(), DistConfig(tables={"nobody": "row_wise"}), OptimConfig(), 0, 0.1)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "rowwise_adagrad", "sgd"])
def test_a_cut_learning_rate_takes_effect_at_once(optimizer: str) -> None:
    """Fused optimizers keep a copy of it: SGD and the first Adam step move by just the learning rate."""
    moves = []
    for factor in (1.0, 0.1):
        config = OptimConfig(embedding=optimizer, embedding_lr=0.5)
        tables = ShardedTables(TABLES, one_rank(), DistConfig(), config, 0, 0.1)
        before = whole_tables(tables)["f2"].clone()
        tables.set_lr(factor)
        tables(random_batch(SCHEMA, 64).sparse)["f2"].sum().backward()
        tables.step()
        moves.append((whole_tables(tables)["f2"] - before).abs().sum())
    assert float(moves[1] / moves[0]) == pytest.approx(0.1, rel=1e-3)
