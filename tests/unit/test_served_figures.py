"""What an evaluation says of tables at a precision is what an export at it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods.collected import of_single
from embsearch_dist.run import Run
from embsearch_dist.serving.directory import open_directory
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.served import evaluate_served, rounded_tables
from tests.served import WIDTHS, exported, run_of, shaken


def model_of(run: Run) -> tuple[SubnetTask, Allocation]:
    allocation = Allocation(run.schema, WIDTHS).counted(run.config.model.extra)
    task = SubnetTask(run.config, allocation, run.context)
    shaken(task.model)
    return task, allocation


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("first_order", ["embedding", "value"])
def test_figures_at_a_precision_are_those_of_the_export(
    precision: str, first_order: str, data: Path, tmp_path: Path
) -> None:
    run = run_of(data, f"model.first_order={first_order}")
    task, allocation = model_of(run)
    before = [s.tensor.clone() for s in task.model.sharded.local_shards()]
    stream = run.stream("test", 200, shuffle=False)
    told = evaluate_served(task, allocation, precision, stream, "test", run.context)
    body = exported(run, of_single(task, allocation, run.config.model), tmp_path / "model", precision)
    served, plain = body["measured"]["served"], body["measured"]["trained"]
    assert told["auc"] == pytest.approx(served["auc"], abs=1e-9)
    assert told["logloss"] == pytest.approx(served["logloss"], abs=1e-7)
    assert told["logloss"] != pytest.approx(plain["logloss"], abs=1e-7)  # rounding does something
    assert told["bytes"] == body["sizes"][f"served_{precision}"] == allocation.total(f"served_{precision}")
    after = [s.tensor for s in task.model.sharded.local_shards()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_fields_have_precisions_of_their_own_where_the_search_chose_them(data: Path, tmp_path: Path) -> None:
    run = run_of(data)
    allocation = Allocation(
        run.schema, WIDTHS, precisions={"left": "int4", "right": "int8"}
    )  # big: int8, as all others
    task = SubnetTask(run.config, allocation, run.context)
    shaken(task.model)
    found = of_single(task, allocation, run.config.model)
    told = evaluate_served(task, allocation, "mixed", run.stream("test", 200, shuffle=False), "test", run.context)
    body = exported(run, found, tmp_path / "model", "mixed", ["torch", "onnx"])
    assert body["precisions"] == {"left": "int4", "big": "int8", "right": "int8"}
    assert told["logloss"] == pytest.approx(body["measured"]["served"]["logloss"], abs=1e-7)
    for name in ("torch", "onnx"):
        assert body["measured"][name]["max_difference_to_served"] < 2e-5
    arrays = load_file(tmp_path / "model" / "tables.safetensors")
    assert arrays["left/codes"].shape[1] == 2 and arrays["right/codes"].shape[1] == 8
    assert open_directory(tmp_path / "model").model() is not None
    for precision in ("int4", "int8"):
        stream = run.stream("test", 200, shuffle=False)
        assert evaluate_served(task, allocation, precision, stream, "test", run.context)["logloss"] != told["logloss"]
    plain = of_single(task, Allocation(run.schema, WIDTHS), run.config.model)
    with pytest.raises(UserError, match="no precision for each field"):
        exported(run, plain, tmp_path / "other", "mixed")


def test_values_come_back_after_an_error_too(data: Path) -> None:
    run = run_of(data)
    task, allocation = model_of(run)
    shards = [s.tensor for s in task.model.sharded.local_shards()]
    with torch.no_grad():
        shards[-1][0, 0] = 1e9
    before = [t.clone() for t in shards]
    with (
        pytest.raises(UserError, match="beyond float16, which int8 needs"),
        rounded_tables(task, allocation, "int8", run.context),
    ):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, shards, strict=True))
