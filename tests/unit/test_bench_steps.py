"""The steps that the training benchmark times are whole training steps."""

from __future__ import annotations

import pytest
import torch

from tests.factories import one_rank, small_config
from tools.bench.steps import CRITEO, cardinalities, make_rows, ours

PARTS = {"feeding", "look-up", "forward", "backward", "checks", "tables", "dense update"}


def test_table_sizes_add_up_to_about_what_was_asked_for() -> None:
    for rows in (3_000, 230_000, 5_400_000):
        sizes = cardinalities(rows)
        assert 0.95 * rows < sum(sizes) <= rows
        assert all(a <= b for a, b in zip(sizes, CRITEO, strict=True))
    ids, label = make_rows([3, 1000], 512, 0)[0]
    assert ids.min() == 0 and ids[0].max() == 2 and 100 < ids[1].max() < 1000
    assert set(label) == {0.0, 1.0}


@pytest.mark.parametrize("kind", ["ues", "supernet"])
def test_a_step_has_all_parts_and_trains_tables_and_head(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.nn.Module] = []
    import tools.bench.steps as bench

    for name in ("SubnetModel", "SupernetModel"):
        build = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda *a, build=build: made.append(build(*a)) or made[-1])
    spec = {"kind": kind, "rows": 500, "batch": 64, "width": 8, "candidates": [2, 4, 8]}
    config = small_config("no-data", "no-run", "optim.embedding=rowwise_adagrad")
    step = ours(spec, one_rank(), config)
    before = [v.clone() for v in made[0].head.state_dict().values() if isinstance(v, torch.Tensor)]
    shards = [s.tensor.clone() for s in made[0].sharded.local_shards()]  # type: ignore[operator,union-attr]
    found = step(0)
    assert set(found) == PARTS and all(seconds > 0 for seconds in found.values())
    after = [v for v in made[0].head.state_dict().values() if isinstance(v, torch.Tensor)]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    now = [s.tensor for s in made[0].sharded.local_shards()]  # type: ignore[operator,union-attr]
    assert all(not torch.equal(a, b) for a, b in zip(shards, now, strict=True))
