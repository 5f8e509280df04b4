"""A warm start where fields come in another order, or others than before: what reads a field by its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.run import Run
from embsearch_dist.train.retrain import load_best
from embsearch_dist.train.warm.dense import Layout
from embsearch_dist.train.warm.start import Start
from tests.earlier import STEPS, allocation_of, begun, logits, open_run, train
from tests.factories import make_data, one_rank

MIXED = {"left": 8, "big": 4, "right": 6, "idle": 4}
NORM = "model.norm=field"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same rows twice, with the fields in two orders."""
    folder = tmp_path_factory.mktemp("order")
    first = make_data(folder / "first", rows=1200)
    fields = "idle: categorical, right: categorical, x: dense, left: categorical, big: categorical"
    source = folder / "turned.yaml"
    source.write_text(f"name: tiny\nfiles: first/clicks.csv\nlabel: click\nfields: {{{fields}}}\n")
    prepare("table", source, folder / "second", quiet=True, row_group_rows=500)
    return first, folder / "second"


def trained(data: Path, folder: Path, widths: dict[str, int] | int, *overrides: str) -> tuple[Run, torch.Tensor]:
    """An earlier training, and its logits."""
    run = open_run(data, folder / "old", one_rank(), STEPS, *overrides)
    train(run, widths)
    return run, logits(run, load_best(run.config, allocation_of(run, widths), one_rank(), run.dir))


@pytest.mark.parametrize(
    "model",
    [
        ["model.backbone=deepfm"],
        ["model.backbone=wide_deep", "model.first_order=value"],
        ["model.backbone=mlp", "model.transform=width"],
        ["model.transform=field"],
        [NORM],
        ["model.norm=width", "model.transform=mlp"],
        [NORM, "model.transform=width", "model.backbone=dcnv2"],
    ],
)
def test_fields_in_another_order_change_no_prediction(
    tmp_path: Path, data: tuple[Path, Path], model: list[str]
) -> None:
    run, before = trained(data[0], tmp_path, MIXED, *model)
    other = open_run(data[1], tmp_path / "new", one_rank(), STEPS, *model)
    task, told, _ = begun(other, MIXED, Start.open(run.dir))
    if "model.backbone=dcnv2" in model:  # only what stands in front of it is known field by field
        unify = task.model.bare_head.unify
        assert told["dense"]["found"] == sum(p.numel() for p in unify.parameters() if p.requires_grad)
        assert not torch.equal(unify.norm.mean, torch.zeros_like(unify.norm.mean))
        return
    assert told["dense"]["new"] == 0
    torch.testing.assert_close(logits(other, task), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["dlrm", "dcnv2", "autoint", "masknet"])
def test_a_backbone_that_reads_fields_by_their_places_begins_anew_where_others_stand_there(
    tmp_path: Path, data: tuple[Path, Path], backbone: str
) -> None:
    model, old, new = f"model.backbone={backbone}", {**MIXED, "idle": 0}, {**MIXED, "right": 0, "idle": 8}
    run, _ = trained(data[0], tmp_path, old, model)
    start = Start.open(run.dir, optimizer=True)
    assert begun(run, new, start)[1]["dense"]["found"] == 0, "left, big, right are not left, big, idle"
    other = open_run(data[1], tmp_path / "new", one_rank(), STEPS, model)
    assert begun(other, old, start)[1]["dense"]["found"] == 0, "nor right, left, big"
    assert begun(run, {**old, "big": 8}, start)[1]["dense"]["new"] == 0, "a wider table among the same fields"
    assert begun(run, MIXED, start)[1]["dense"]["found"] > 0, "layers that do not read fields keep their shapes"


@pytest.mark.parametrize("norm", ["field", "width"])
def test_a_norm_goes_with_its_fields_and_ends_with_their_columns(
    tmp_path: Path, data: tuple[Path, Path], norm: str
) -> None:
    model = ["model.backbone=mlp", f"model.norm={norm}"]
    run, _ = trained(data[0], tmp_path, MIXED, *model)
    earlier = load_best(run.config, allocation_of(run, MIXED), one_rank(), run.dir).model.bare_head.unify.norm
    task, _, _ = begun(run, {"left": 4, "big": 0, "right": 6, "idle": 8}, Start.open(run.dir))
    own = task.model.bare_head.unify.norm
    left, right, idle = (0, 1, 2) if norm == "field" else (0, 0, 0)
    was = (0, 2, 3) if norm == "field" else (0, 0, 0)
    assert torch.equal(own.scale[:3], earlier.scale[[0, 1, 2]])  # widths 4, 6 and 8 before and now
    for name in ("mean", "variance"):
        a, b = getattr(own, name), getattr(earlier, name)
        assert torch.equal(a[right, 1, :6], b[was[1], 1, :6])
        if norm == "field":  # of the field's own columns, whatever its width was
            assert torch.equal(a[left, 0], b[was[0], 2]) and torch.equal(a[idle, 2, :4], b[was[2], 0, :4])
            assert torch.equal(a[idle, 2, 4:], torch.full((4,), float(name == "variance")))
        else:
            assert torch.equal(a[0, 2], b[0, 2]) and torch.equal(a[0, 0, :4], b[0, 0, :4])


def test_shapes_tell_fields_apart_only_where_nothing_else_has_their_number() -> None:
    def layout(fields: str, dense: str, width: int) -> Layout:
        return Layout(tuple(fields), (width,) * len(fields), (width,) * len(fields), tuple(dense), False)

    old = layout("abcd", "x", 4)
    assert old.told_by_shapes(layout("abcd", "x", 8)) and old.told_by_shapes(layout("abc", "x", 4))
    for other in (
        layout("abdc", "x", 4),
        layout("abce", "x", 4),
        layout("abcd", "y", 4),
        layout("abc", "xy", 4),  # as many tokens
        layout("ab", "x", 8),  # as many inputs
        layout("abc", "y", 4),
    ):
        assert not old.told_by_shapes(other), other


@pytest.mark.parametrize("first_order", ["embedding", "value"])
def test_dense_columns_that_are_standardised_otherwise_give_what_they_gave(
    tmp_path: Path, data: tuple[Path, Path], first_order: str
) -> None:
    """The rows of the first day's data, with a constant and a factor in a column that takes part in training."""
    run, before = trained(data[0], tmp_path, MIXED, f"model.first_order={first_order}")
    start = Start.open(run.dir, optimizer=True)
    scale = dict(run.schema.provenance["dense"])["x"]
    told = {"mean": scale["mean"] + 0.7 * scale["std"], "std": 2.5 * scale["std"]}
    object.__setattr__(run.schema, "provenance", {**run.schema.provenance, "dense": {"x": told}})
    task, found, optimizer = begun(run, MIXED, start)
    assert found["dense"]["new"] == 0
    task.model.eval()
    batch = next(run.stream("train", 256, shuffle=False).epoch(0))
    with torch.no_grad():
        again = task.predict(replace(batch, dense=(batch.dense - 0.7) / 2.5))
    torch.testing.assert_close(again, before, atol=1e-5, rtol=1e-5)
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())
