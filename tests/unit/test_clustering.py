"""A clustering that is killed between two passes: what it has recorded is what an unbroken one records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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
        return features, (features > 0).float()

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


def clustering_of(
    data: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[grouping.Clustering, Monitor]:
    monkeypatch.setattr(grouping, "load_gates", lambda run: None)
    monkeypatch.setattr(grouping, "CentreRouter", IdsRouter)
    run = open_run(small_config(data, directory, *GROUPS, *more, method="ihas"), one_rank())
    monitor = Monitor(directory, "groups", quiet=True)
    monitor.resume_at(-1)
    return grouping.Clustering(run, monitor), monitor


def test_groups_are_numbered_by_their_rows_whatever_k_means_has_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, monitor = clustering_of(data, tmp_path, monkeypatch, "search.groups.k=3", "search.groups.min_rows=1")
    with monitor:
        found.fit()
        before = found.settle()
        assert before[2].tolist() == sorted(before[2].tolist(), reverse=True)
        found.kmeans.centres = found.kmeans.centres.flip(0)  # as where the last move has changed which is larger
        after = found.settle()
    assert torch.equal(after[1], before[1]) and torch.equal(after[2], before[2])
    for split, groups in before[0].items():
        assert (after[0][split] == groups).all(), split
    assert (found._assign("train")[0] == after[0]["train"]).all()  # the router says the same numbers


def test_why_a_group_is_dissolved_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, monitor = clustering_of(data, tmp_path, monkeypatch)
    said: list[str] = []
    with monitor:
        found.fit()
        monkeypatch.setattr(monitor, "say", said.append)
        whole = found._assign

        def assign(split: str) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
            groups, sums, counts = whole(split)
            return (np.zeros_like(groups) if split == "validation" else groups), sums, counts

        monkeypatch.setattr(found, "_assign", assign)
        _, _, counts = found.settle()
    assert len(counts) == 1
    (line,) = said
    assert "training rows and 0 validation rows: dissolved (each of 1 rank(s) needs one)" in line
