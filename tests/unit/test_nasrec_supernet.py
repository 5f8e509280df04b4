"""NASRec's supernet as a training: what breaks it continues it, whatever the optimizer of its slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.methods.nasrec.supernet_stage import SupernetTask, load_supernet
from embsearch_dist.methods.stages import run_stages
from tests.factories import prepared, recorded, whole_tables
from tests.unit.test_nasrec_scoring import OnlySupernet, nasrec_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


class Stopped(Exception):
    """Raised in place of a kill."""


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_a_continued_supernet_equals_the_unbroken_one_bitwise(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Broken two steps behind a checkpoint; the slices of the steps after it need the state of what they use."""
    overrides = [f"optim.dense={optimizer}", "search.supernet.save_every=4", "search.sampling.warmup=0.2"]
    one, two = (nasrec_run(data, tmp_path / name, *overrides) for name in ("unbroken", "broken"))
    run_stages(OnlySupernet(), one)

    def stop(self: SupernetTask, step: int, monitor: Any) -> None:
        if step == 6:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(SupernetTask, "after_step", stop)
        with pytest.raises(Stopped):
            run_stages(OnlySupernet(), two)
    run_stages(OnlySupernet(), two)
    found = [load_supernet(run).model for run in (one, two)]
    for name, weight in found[0].head.weights.items():
        assert torch.equal(weight, found[1].head.weights[name]), name
    tables = [whole_tables(model.sharded) for model in found]
    assert all(torch.equal(t, tables[1][name]) for name, t in tables[0].items())
    losses = [recorded(tmp_path / name, "supernet", "loss") for name in ("unbroken", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) > 6
