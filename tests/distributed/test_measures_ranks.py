"""Figures, AUC by group and bootstrap intervals: two ranks say what one says, bit for bit where rows are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.train.figures import Other, Wanted, told
from embsearch_dist.train.metrics import Predictions, figures, predictions
from tests.factories import open_run, prepared, rank_context, small_config
from tests.ranks import run_ranks


def by_hand(batch: Batch) -> torch.Tensor:
    return (batch.dense[:, 0] + 0.1 * (batch.sparse["left"].values() % 5)).round(decimals=1)


def measured(rank: int, world_size: int, data: str, directory: str) -> dict[str, Any]:
    context = rank_context(rank, world_size)
    run = open_run(small_config(data, directory, method="ues"), context)

    def answers(scale: float) -> Predictions:
        stream = run.stream("test", 150, shuffle=False)
        return predictions(lambda b: scale * by_hand(b), stream.epoch(0), context, "left")

    found, other = answers(1.0), answers(0.5).in_stored_order(context)
    stored = found.in_stored_order(context)
    assert stored.groups is not None
    wanted = Wanted("left", 41, 3, Other("other", 0, other))
    return {
        "figures": figures(found),
        "told": told(figures(found), found, wanted, context),
        "rows": [stored.logits.tolist(), stored.labels.tolist(), stored.groups.tolist()],
    }


def test_figures_do_not_depend_on_the_ranks(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = str(prepared(tmp_path_factory))
    one = run_ranks(measured, 1, tmp_path, data, str(tmp_path / "one"))[0]
    two = run_ranks(measured, 2, tmp_path, data, str(tmp_path / "two"))
    assert two[0] == two[1]
    assert two[0]["rows"] == one["rows"]
    assert two[0]["figures"] == pytest.approx(one["figures"], rel=1e-12)
    for key in ("auc", "group_auc", "group_count", "group_share", "calibration", "ece"):
        assert two[0]["figures"][key] == one["figures"][key]
    assert two[0]["figures"]["group_count"] > 5
    for key in ("reliability", "by_group", "intervals", "difference"):
        assert two[0]["told"][key] == one["told"][key]
    difference = one["told"]["difference"]
    assert difference["against"] == "other" and difference["drawn"] == "left" and difference["resamples"] == 41
    assert difference["auc"]["value"] == difference["auc"]["high"] == 0  # a scale changes no order
    assert difference["calibration"]["low"] <= difference["calibration"]["value"] <= difference["calibration"]["high"]
