"""A clustering that is killed between two passes: what it has recorded is what an unbroken one records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.ihas import groups_stage as grouping
from embsearch_dist.methods.ihas.kmeans import KMeans
from embsearch_dist.train.monitor import Monitor
from tests.factories import one_rank, open_run, prepared, recorded, small_config

GROUPS = ["search.groups.k=2", "search.groups.passes=2", "search.groups.exact=2", "search.groups.batch_size=500"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


class IdsRouter:
    """In place of trained gates: the ids themselves are the features."""

    def __init__(self, gates: object, features: str, kmeans: KMeans) -> None:
        self.width, self.scale = kmeans.width, torch.ones(1)
        self.kmeans = kmeans

    def measure(self, batch: Batch) -> None:
        pass

    def look(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids = batch.sparse.values().view(-1, batch.size).T.float()
        features = ids.repeat(1, -(-self.width // ids.shape[1]))[:, : self.width]
        return features, features > 0

    def state(self) -> dict[str, Any]:
        return {"scale": [1.0], "kmeans": self.kmeans.state()}


def cluster(data: Path, directory: Path) -> None:
    run = open_run(small_config(data, directory, *GROUPS, method="ihas"), one_rank())
    with Monitor(directory, "groups", quiet=True) as monitor:
        monitor.resume_at(-1)
        grouping.Clustering(run, monitor).fit()


def test_a_continued_clustering_records_what_the_unbroken_one_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "load_gates", lambda run: None)
    monkeypatch.setattr(grouping, "CentreRouter", IdsRouter)
    cluster(data, tmp_path / "unbroken")
    lines = recorded(tmp_path / "unbroken", "groups", "distance")
    assert len(set(lines)) == 4
    with monkeypatch.context() as patch:
        patch.setattr(KMeans, "lloyd", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cluster(data, tmp_path / "broken")
    cluster(data, tmp_path / "broken")
    assert recorded(tmp_path / "broken", "groups", "distance") == lines
    assert recorded(tmp_path / "broken", "groups", "step") == [0, 1, 2, 3]
