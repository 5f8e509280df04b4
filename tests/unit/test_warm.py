"""Training that begins with an earlier model: rows by value, columns into new widths, the dense part, exactness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.prepare.vocabulary import load_values
from embsearch_dist.errors import UserError
from embsearch_dist.run import Run
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.retrain import STAGE, SubnetTask, load_best
from embsearch_dist.train.tensors import tensors_of
from embsearch_dist.train.warm.ids import Data, id_map
from embsearch_dist.train.warm.start import RECORD, Start
from tests.earlier import STEPS, allocation_of, begun, change, logits, open_run, settings, train, two_days
from tests.factories import one_rank, recorded, whole_tables

MIXED = {"left": 8, "big": 4, "right": 6, "idle": 0}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return two_days(tmp_path_factory.mktemp("days"))


@pytest.fixture(scope="module")
def old(days: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A DeepFM that was trained on the first day, of mixed widths."""
    run = open_run(days[0], tmp_path_factory.mktemp("old") / "retrain" / "old", one_rank(), STEPS)
    train(run, MIXED)
    return run


def of_model(tmp_path: Path, data: Path, widths: dict[str, int] | int, *overrides: str) -> Run:
    run = open_run(data, tmp_path / "old", one_rank(), STEPS, *overrides)
    train(run, widths)
    return run


def flat(tensors: dict[str, Any], before: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested groups on one rank."""
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name} ")
        else:
            found[before + name] = (value.local_tensor() if hasattr(value, "local_tensor") else value).detach().clone()
    return found


def test_where_nothing_changed_the_first_evaluation_is_yesterdays_to_the_bit(tmp_path: Path, old: Run) -> None:
    run = open_run(Path(old.config.data.path), tmp_path / "new", one_rank(), STEPS)
    result = train(run, MIXED, Start.open(old.dir))
    begun_with = json.loads((run.dir / RECORD).read_text())
    assert begun_with["validation"] == {
        key: recorded(old.dir, STAGE, key, "validation")[-1] for key in ("auc", "logloss")
    }
    assert {f["how"] for f in begun_with["fields"].values()} == {"same"} and begun_with["dense"]["new"] == 0
    assert result["start"]["from"] == str(old.dir) and result["start"]["step"] == begun_with["step"] == 3


@pytest.mark.parametrize("optim", [[], ["optim.embedding=rowwise_adagrad", "optim.dense=adagrad"]])
def test_with_the_optimizers_state_the_next_step_is_that_of_the_earlier_training(
    tmp_path: Path, days: tuple[Path, Path], optim: list[str]
) -> None:
    run = of_model(tmp_path, days[0], MIXED, *optim)
    task, _, optimizer = begun(run, MIXED, Start.open(run.dir, optimizer=True))
    other = SubnetTask(run.config, allocation_of(run, MIXED), run.context)
    other_optimizer = other.model.make_optimizer(run.config.optim)
    Checkpointer(run.dir / "checkpoints" / STAGE, other.model, other_optimizer, run.context).load(3)
    both = ((task, optimizer), (other, other_optimizer))
    for _ in range(2):
        found = [flat(tensors_of(t.model, o, True)) for t, o in both]
        assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])
        for t, o in both:  # the optimizers go on from equal states, so one step more keeps them equal
            o.zero_grad()
            t.model.sharded.zero_grad()
            t.loss(next(run.stream("train", 256, shuffle=True).epoch(7)), 0).backward()
            o.step()
            t.model.sharded.step()


def test_rows_go_by_value_and_new_values_begin_as_the_rare_one(
    tmp_path: Path, days: tuple[Path, Path], old: Run
) -> None:
    run = open_run(days[1], tmp_path / "new", one_rank(), STEPS)
    earlier = whole_tables(load_best(old.config, allocation_of(old, MIXED), one_rank(), old.dir).model.sharded)
    task, told, _ = begun(run, MIXED, Start.open(old.dir))
    tables, moved = whole_tables(task.model.sharded), 0
    for field in ("left", "big", "right"):
        before = load_values(days[0], field)["value"].to_list()
        now = load_values(days[1], field)["value"].to_list()
        assert torch.equal(tables[field][0], earlier[field][0])
        for k, value in enumerate(now, 1):
            row = before.index(value) + 1 if value in before else 0
            moved += row not in (0, k)
            assert torch.equal(tables[field][k], earlier[field][row]), (field, value)
    assert moved > 10, "the example must give values other ids"
    assert told["fields"]["left"]["new_values"] == 2 and told["fields"]["right"]["new_values"] == 0


def test_of_new_values_the_optimizers_keep_nothing(tmp_path: Path, days: tuple[Path, Path], old: Run) -> None:
    run = open_run(days[1], tmp_path / "new", one_rank(), STEPS)
    task, _, _ = begun(run, MIXED, Start.open(old.dir, optimizer=True))
    moments = task.model.sharded.optimizer_state()["adam"]["embedding_bags.left.weight/exp_avg_sq"]
    moments = moments.local_tensor() if hasattr(moments, "local_tensor") else moments
    new = [k for k, v in enumerate(load_values(days[1], "left")["value"].to_list(), 1) if int(v) > 100]
    assert len(new) == 2 and not moments[new].any() and moments[1:].any(1).sum() >= len(moments) - 4


def test_kept_ids_need_no_vocabulary_of_the_earlier_data(tmp_path: Path, days: tuple[Path, Path]) -> None:
    source = days[1].parent / "clicks.yaml"
    options: dict[str, Any] = {"quiet": True, "vocabulary": days[0]}
    prepare("table", source, tmp_path / "kept", **options)
    (old, kept), by_value = (open_run(d, tmp_path, one_rank()) for d in (days[0], tmp_path / "kept")), {}
    told = Data(tmp_path / "kept", kept.schema)
    for path in (tmp_path / "gone", days[0]):
        from_old = Data(path, old.schema)
        by_value[path] = {f: id_map(from_old, told, f).rows.tolist() for f in kept.schema.names}
    assert by_value[tmp_path / "gone"] == by_value[days[0]]
    forgetful = Data(tmp_path / "kept", open_run(tmp_path / "kept", tmp_path, one_rank()).schema)
    object.__setattr__(forgetful.schema, "provenance", {})
    assert {f: id_map(from_old, forgetful, f).rows.tolist() for f in kept.schema.names} == by_value[days[0]]


def low_rank(task: SubnetTask, rank: int, common: bool) -> None:
    """Tables whose rows span ``rank`` directions, which no column is; with ``common`` the same ones in all."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(rank, 8, generator=generator)
    for shard in task.model.sharded.local_shards():
        rows, width = len(shard.tensor), shard.table.width
        own = shared if common else torch.randn(rank, width, generator=generator)
        shard.tensor.copy_(torch.randn(rows, rank, generator=generator) @ own)


@pytest.mark.parametrize(
    ("model", "common", "widths"),
    [
        (["model.backbone=wide_deep"], False, {"left": 4, "big": 8, "right": 3, "idle": 3}),
        (["model.backbone=deepfm"], True, {"left": 4, "big": 8, "right": 3, "idle": 3}),
        (["model.transform=field"], False, {"left": 4, "big": 8, "right": 3, "idle": 3}),
    ],
)
def test_narrower_tables_keep_the_directions_that_rows_span(
    tmp_path: Path, days: tuple[Path, Path], model: list[str], common: bool, widths: dict[str, int]
) -> None:
    run = of_model(tmp_path, days[0], 8, *model)
    before = change(run, 8, lambda task: low_rank(task, 3, common))
    task, told, _ = begun(run, widths, Start.open(run.dir))
    assert told["fields"]["left"]["how"] == "turned, cut"
    assert torch.allclose(logits(run, task), logits(run, before), atol=1e-4)
    task, told, _ = begun(run, widths, Start.open(run.dir), turn=False)
    assert told["fields"]["left"]["how"] == "cut"
    assert (logits(run, task) - logits(run, before)).abs().max() > 0.1, "the example must have something to lose"


def test_with_fm_and_several_earlier_widths_columns_are_cut_as_they_are(tmp_path: Path, old: Run) -> None:
    earlier = whole_tables(load_best(old.config, allocation_of(old, MIXED), one_rank(), old.dir).model.sharded)
    task, told, _ = begun(old, MIXED | {"left": 4}, Start.open(old.dir))
    assert told["fields"]["left"] == {"width": [8, 4], "how": "cut", "new_values": 0}
    assert torch.equal(whole_tables(task.model.sharded)["left"], earlier["left"][:, :4])


@pytest.mark.parametrize("first_order", ["embedding", "value"])
def test_wider_tables_change_no_prediction_of_a_model_without_products(
    tmp_path: Path, days: tuple[Path, Path], first_order: str
) -> None:
    run = of_model(tmp_path, days[0], MIXED, "model.backbone=wide_deep", f"model.first_order={first_order}")
    before = load_best(run.config, allocation_of(run, MIXED), one_rank(), run.dir)
    wider = {"left": 12, "big": 4, "right": 8, "idle": 8}  # idle was dropped
    task, told, _ = begun(run, wider, Start.open(run.dir))
    assert told["fields"]["left"]["how"] == "padded" and "idle" not in told["fields"]
    difference = (logits(run, task) - logits(run, before)).abs().max()
    # With weights of values the dropped field has fresh ones of its own, of the order of init_std.
    assert difference < (1e-6 if first_order == "embedding" else 0.05)
    task.loss(next(run.stream("train", 256, shuffle=False).epoch(0)), 0).backward()
    weight = task.model.bare_head.backbone.first.weight
    assert weight.grad is not None and weight.grad[:, 8:12].abs().max() > 0, "new columns are not at a standstill"


@pytest.mark.parametrize("transform", ["width", "mlp", "field"])
def test_learned_maps_follow_their_width_or_field(tmp_path: Path, days: tuple[Path, Path], transform: str) -> None:
    run = of_model(tmp_path, days[0], MIXED | {"idle": 4}, f"model.transform={transform}", "model.backbone=mlp")
    before = load_best(run.config, allocation_of(run, MIXED | {"idle": 4}), one_rank(), run.dir)
    task, _, _ = begun(run, MIXED | {"idle": 4, "right": 8}, Start.open(run.dir))
    own, other = task.model.bare_head.unify, before.model.bare_head.unify
    for name in ("left", "big", "idle"):
        f = list(MIXED).index(name)
        for a, b in zip(own.map_of(f), other.map_of(f), strict=True):
            assert torch.equal(a, b), name
    if transform == "field":  # 6 columns became 8
        assert torch.equal(own.map_of(2)[0][:6], other.map_of(2)[0]) and not own.map_of(2)[0][6:].any()


def test_a_layer_of_another_size_begins_anew(tmp_path: Path, old: Run) -> None:
    run = open_run(Path(old.config.data.path), tmp_path / "new", one_rank(), STEPS, "model.hidden=[8,6]")
    _, told, _ = begun(run, MIXED, Start.open(old.dir))
    assert told["dense"] == {"found": 8 * 19 + 8 + 19 + 1 + 1, "new": 6 * 8 + 6 + 6}


def test_another_start_is_another_training(tmp_path: Path, old: Run) -> None:
    run = open_run(Path(old.config.data.path), tmp_path / "new", one_rank(), STEPS)
    first = train(run, MIXED, Start.open(old.dir))
    assert train(run, MIXED, Start.open(old.dir))["auc"] == first["auc"], "the same command finds it done"
    for start, told in (
        (None, "it began with .*step 3, without the state of the optimizers"),
        (Start.open(old.dir, optimizer=True), "it began with .*, without the state"),
    ):
        with pytest.raises(UserError, match=f"holds another training: {told}"):
            train(run, MIXED, start)
    cold = open_run(Path(old.config.data.path), tmp_path / "cold", one_rank(), STEPS)
    train(cold, MIXED)
    with pytest.raises(UserError, match="it began without --from"):
        train(cold, MIXED, Start.open(old.dir))
    with pytest.raises(UserError, match="is where the new training would be kept"):
        train(old, MIXED, Start.open(old.dir))


def test_what_cannot_be_begun_with_is_told(tmp_path: Path, days: tuple[Path, Path], old: Run) -> None:
    with pytest.raises(UserError, match="holds no trained model"):
        Start.open(tmp_path)
    for key, told in (
        ("model.backbone=mlp", "model.backbone 'deepfm' there, 'mlp' here"),
        ("model.transform=width", "model.transform 'identity' there"),
        ("optim.dense=adagrad", "optim.dense 'adam' there, 'adagrad' here. Put that back, give --from-optimizer false"),
    ):
        run = open_run(days[0], tmp_path / "new", one_rank(), key)
        with pytest.raises(UserError, match=told):
            begun(run, MIXED, Start.open(old.dir, optimizer=True))
    with pytest.raises(UserError, match="keeps no field that is kept here"):
        begun(old, {"left": 0, "big": 0, "right": 0, "idle": 4}, Start.open(old.dir))
    start = Start.open(old.dir)
    moved = Start(start.directory, Data(tmp_path / "gone", start.data.schema), *list(vars(start).values())[2:])
    with pytest.raises(UserError, match="gone: the data of the earlier model and their vocabulary/ are not there"):
        begun(open_run(days[1], tmp_path / "new", one_rank()), MIXED, moved)
    (old.dir / "training.json").rename(tmp_path / "kept")
    with pytest.raises(UserError, match="its training has not ended"):
        Start.open(old.dir)
    (tmp_path / "kept").rename(old.dir / "training.json")


def test_settings_of_the_test_are_those_of_a_training(old: Run) -> None:
    """What ``begun`` passes is a part of what a checkpoint of a real training says."""
    task = SubnetTask(old.config, allocation_of(old, MIXED), old.context)
    told = Start.open(old.dir).manifest["settings"]
    assert all(told[k] == json.loads(json.dumps(v)) for k, v in settings(old.config, task).items())
