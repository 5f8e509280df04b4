"""What a table is called inside torch: the field's name where torch can take it, ours otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from embsearch_dist.config.read import load_config
from embsearch_dist.errors import UserError
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.tables import Table, module_name
from tests.factories import CONFIGS, one_rank, optimizer_state, whole_tables
from tests.renamed import ODD


def test_tables_larger_than_the_machine_are_refused_before_anything_is_made() -> None:
    config = load_config(CONFIGS, None, [], method="adass")
    with pytest.raises(UserError, match=r"the largest is 'user', 1,000,000 rows x 1,000,000,000. Lower its width"):
        tables = [Table("user", 10**6, 10**9), Table("item", 10, 4)]
        ShardedTables(tables, one_rank(), config.dist, config.optim, 0, 0.1)


def test_names_are_kept_where_they_can_be_and_never_meet() -> None:
    names = [*ODD, *dir(nn.ModuleDict()), "user_id", "C-1", "über", "sp ace", "0", "weight"]
    ours = [module_name(n) for n in names]
    assert len(set(ours)) == len(set(names))
    for name, own in zip(names, ours, strict=True):
        assert "." not in own and own not in dir(nn.ModuleDict())
        assert module_name(own) != own or own == name
    for name in ("user_id", "C-1", "über", "sp ace", "0", "weight"):
        assert module_name(name) == name  # so checkpoints of versions that knew no other names fit
    assert module_name("type") == "t__1303c06b0b014d0ce7b988ab"


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_tables_of_odd_names_are_looked_up_and_saved(optimizer: str) -> None:
    config = load_config(CONFIGS, None, [f"optim.embedding={optimizer}"], method="adass")
    tables = [Table(name, 10 + k, 4) for k, name in enumerate([*ODD, "weight"])]
    sharded = ShardedTables(tables, one_rank(), config.dist, config.optim, 0, 0.1)
    assert list(whole_tables(sharded)) == [t.name for t in tables]
    states = [n for n in optimizer_state(sharded) if "weight/" in n]
    assert len({n.split("/")[0] for n in states}) == len(tables)
    assert all(torch.isfinite(t).all() for t in whole_tables(sharded).values())
