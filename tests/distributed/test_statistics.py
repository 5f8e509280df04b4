"""Sums over sharded tables: equal to those of the whole table, on every rank, whatever the sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.methods.adass.sampling import candidate_variance
from embsearch_dist.models.tables import MaxTables
from embsearch_dist.sharding.statistics import column_sums
from tests.factories import rank_context, small_schema, whole_tables
from tests.ranks import run_ranks

SCHEMA = small_schema(9000, 2100, 30)
CANDIDATES = [0, 2, 3, 8]
KINDS = ["table_wise", "row_wise", "column_wise", "data_parallel"]


def variances(rank: int, world_size: int, scheme: str) -> list[list[list[float]]]:
    """Per sharding kind ``[F, T]``; the sums are checked against the whole tables here, on every rank."""
    found = []
    for kind in KINDS:
        context = rank_context(rank, world_size)
        config = DistConfig(sharding=kind)
        tables = MaxTables(SCHEMA, CANDIDATES, scheme, context, config, OptimConfig(), 3, 0.1)
        sums, rows = column_sums(tables.sharded)
        assert rows.tolist() == SCHEMA.cardinalities
        whole = whole_tables(tables.sharded)
        for f, name in enumerate(SCHEMA.names):
            wide = whole[name].double()
            expected = torch.stack([wide.sum(0), wide.square().sum(0), wide.abs().sum(0)], 1)
            torch.testing.assert_close(sums[f], expected, rtol=1e-9, atol=1e-9)
        variance = candidate_variance(sums, rows, tables.columns)
        for f, name in enumerate(SCHEMA.names):
            for j, (start, stop) in enumerate(tables.columns):
                part = whole[name][:, start:stop].double()
                expected = part.var(unbiased=False) if stop > start else torch.zeros((), dtype=torch.float64)
                torch.testing.assert_close(variance[f, j], expected, rtol=1e-9, atol=0)
        found.append(variance.tolist())
    return found


@pytest.mark.parametrize("scheme", ["shared", "independent"])
def test_candidate_variance_is_that_of_the_whole_table_on_two_ranks(tmp_path: Path, scheme: str) -> None:
    first, second = run_ranks(variances, 2, tmp_path, scheme)
    assert first == second
    for variance in first[1:]:
        torch.testing.assert_close(torch.tensor(variance), torch.tensor(first[0]), rtol=1e-6, atol=0)
