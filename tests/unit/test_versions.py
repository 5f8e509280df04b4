"""Both TorchRec releases are spoken to in their own words, and the agreement before the first collective is kept."""

from __future__ import annotations

from typing import Any

import pytest
from torchrec import EmbeddingBagCollection
from torchrec.distributed.planner.types import SharderData

from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.sharding import placing, versions
from embsearch_dist.sharding.sharded_tables import ShardedTables, Table
from embsearch_dist.sharding.tables import Sharder
from tests.factories import one_rank


class Old:
    """As in TorchRec 1.6."""

    def estimate(self, sharding_options: list[Any], sharder_map: dict[str, Any] | None = None) -> None: ...


class New:
    """As in TorchRec 1.8."""

    def estimate(self, sharding_options: list[Any], sharder_data_map: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("release", "name", "kind"), [(Old, "sharder_map", Sharder), (New, "sharder_data_map", SharderData)]
)
def test_estimators_of_each_release_get_what_they_ask_for(
    monkeypatch: pytest.MonkeyPatch, release: type, name: str, kind: type
) -> None:
    monkeypatch.setattr(versions, "EmbeddingPerfEstimator", release)
    named = versions.estimated_by(EmbeddingBagCollection, Sharder())
    (known,) = named[name].values()
    assert list(named) == [name] and isinstance(known, kind)


def test_the_validation_is_set_up_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(versions.collective_utils, "init_collective_validation", told.append, raising=False)
    versions.init_collective_validation("group")  # type: ignore[arg-type]
    assert told == ["group"]
    monkeypatch.delattr(versions.collective_utils, "init_collective_validation")
    versions.init_collective_validation("group")  # type: ignore[arg-type]
    assert told == ["group"]


def test_a_release_that_skips_the_agreement_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a rank that fails leaves the others in a collective: an error now is better than a hang then."""
    monkeypatch.delattr(placing.AgreeingCollection, "_create_output_dist")
    with pytest.raises(RuntimeError, match="without asking whether all ranks"):
        ShardedTables([Table("f0", 10, 4)], one_rank(), DistConfig(), OptimConfig(), 0, 0.1)


def test_the_agreement_comes_when_all_look_ups_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    whole = placing.AgreeingCollection.__init__

    def init(self: Any, agree: Any, **arguments: Any) -> None:
        def watched() -> None:
            seen.append([len(self._lookups), len(self._embedding_shardings), len(self._output_dists)])
            agree()

        whole(self, watched, **arguments)

    monkeypatch.setattr(placing.AgreeingCollection, "__init__", init)
    tables = [Table("f0", 10, 4), Table("f1", 12, 8)]
    kinds = {"f0": "data_parallel", "f1": "table_wise"}
    ShardedTables(tables, one_rank(), DistConfig(tables=kinds), OptimConfig(), 0, 0.1)
    assert len(seen) == 1 and len(set(seen[0])) == 1 and seen[0][0] >= 1
