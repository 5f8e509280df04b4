"""Some rows of a batch: what TorchRec is given with them, single ids and lists."""

from __future__ import annotations

import pytest
import torch
from torchrec import KeyedJaggedTensor

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchMaker
from embsearch_dist.data.load.select import select
from tests.factories import ids_of, random_batch, small_schema
from tests.raw_lists import list_schema, random_lists

SCHEMA = small_schema(11, 7, 90, dense=2)
ROWS = [5, 0, 31, 5, 16]


def bags_of(batch: Batch, name: str) -> list[list[tuple[float, ...]]]:
    """A field of every row: its ids, each with its weight if there are weights. Read by the lengths alone."""
    jagged = batch.sparse[name]
    weights = jagged.weights_or_none()
    cells = list(zip(*([jagged.values().tolist()] + ([] if weights is None else [weights.tolist()]))))
    found = []
    for n in jagged.lengths().tolist():
        found.append(cells[:n])
        cells = cells[n:]
    assert not cells
    return found


def check_given(batch: Batch) -> None:
    """What was given with the values must be what TorchRec would compute from the lengths."""
    sparse = batch.sparse
    lengths = sparse.lengths().view(len(sparse.keys()), -1)
    counts = lengths.sum(1)
    assert sparse.stride() == lengths.shape[1] == batch.size
    assert sparse.length_per_key_or_none() == counts.tolist()
    assert sparse.offset_per_key_or_none() == [0, *counts.cumsum(0).tolist()]
    assert sparse.offsets().tolist() == [0, *lengths.reshape(-1).cumsum(0).tolist()]
    assert len(sparse.values()) == int(counts.sum())
    dtypes = {sparse.values().dtype, sparse.lengths().dtype, sparse.offsets().dtype}
    assert dtypes == {torch.int32}


@pytest.mark.parametrize("single", [True, None, False])
def test_rows_of_single_ids(single: bool | None) -> None:
    batch = random_batch(SCHEMA, 32)
    rows = torch.tensor(ROWS)
    chosen = select(batch, rows, single)
    check_given(chosen)
    before, after = ids_of(batch, SCHEMA), ids_of(chosen, SCHEMA)
    for name in SCHEMA.names:
        assert after[name].tolist() == [int(before[name][r]) for r in ROWS]
    assert torch.equal(chosen.dense, batch.dense[ROWS])
    assert torch.equal(chosen.label, batch.label[ROWS])
    assert chosen.position == batch.position
    made = BatchMaker(SCHEMA).sparse(torch.stack([before[n][rows] for n in SCHEMA.names]).int())
    for key in ("values", "lengths", "offsets", "keys", "stride", "length_per_key", "offset_per_key"):
        ours, theirs = getattr(chosen.sparse, key)(), getattr(made, key)()
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("single", [None, False])
def test_rows_of_lists(weighted: bool, single: bool | None) -> None:
    schema = list_schema(weighted=weighted)
    batch = random_lists(schema, 32)
    chosen = select(batch, torch.tensor(ROWS), single)
    check_given(chosen)
    for name in schema.names:
        before = bags_of(batch, name)
        assert bags_of(chosen, name) == [before[r] for r in ROWS]
    assert any(not bag for bag in bags_of(batch, "sum"))
    assert (chosen.sparse.weights_or_none() is not None) == weighted


def test_lists_of_one_id_on_average_are_lists() -> None:
    sparse = KeyedJaggedTensor(
        keys=["tags"], values=torch.tensor([4, 7], dtype=torch.int32), lengths=torch.tensor([2, 0], dtype=torch.int32)
    )
    batch = Batch(torch.zeros(2, 0), sparse, torch.zeros(2), random_batch(SCHEMA).position)
    assert bags_of(select(batch, torch.tensor([1, 0])), "tags") == [[], [(4,), (7,)]]


def test_all_rows_and_none() -> None:
    for batch, names in (
        (random_batch(SCHEMA, 6), SCHEMA.names),
        (random_lists(list_schema(), 6), list_schema().names),
    ):
        same = select(batch, torch.arange(6))
        assert all(bags_of(same, n) == bags_of(batch, n) for n in names)
        nobody = select(batch, torch.zeros(0, dtype=torch.int64))
        check_given(nobody)
        assert nobody.size == 0
        assert all(bags_of(nobody, n) == [] for n in names)
