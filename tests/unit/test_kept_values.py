"""Tables with rows for some values alone: bits and rows by hand, sizes, files, the same answers as of whole tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.methods.collected import of_single
from embsearch_dist.methods.results import carried_over
from embsearch_dist.report.runs import load_run
from embsearch_dist.report.widths import allocation as widths_found
from embsearch_dist.serving.collect import ids_of_batch
from embsearch_dist.serving.directory import open_directory
from embsearch_dist.sharding.row_map import RowMap
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.warm.ids import Data
from embsearch_dist.train.warm.start import Start
from tests.factories import prepared, random_batch, small_config, small_schema, whole_tables
from tests.served import exported, run_of, shaken

SCHEMA = small_schema(10, 3, 6)
MASK = np.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 1], bool)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def test_bits_and_rows_by_hand() -> None:
    kept = KeptValues.of(MASK)
    assert kept.bits == bytes([0b00100011, 0b10])  # id 0 is always there
    assert (kept.rows, kept.mask_bytes) == (4, 2)
    assert kept.row_of.tolist() == [0, 1, 0, 0, 0, 2, 0, 0, 0, 3] and kept.ids.tolist() == [0, 1, 5, 9]
    assert KeptValues.from_dict(json.loads(json.dumps(kept.to_dict())), 10) == kept
    assert kept.digest != KeptValues.of(~MASK).digest


@pytest.mark.parametrize(
    ("cardinality", "change"),
    [(9, {}), (17, {}), (10, {"rows": 3}), (10, {"bits": "no"}), (10, {"bits": "eJwDAAAAAAE="}), (10, {"bits": 5})],
)
def test_bits_that_are_not_of_the_field_are_refused(cardinality: int, change: dict) -> None:
    with pytest.raises(UserError, match="Search again"):
        KeptValues.from_dict(KeptValues.of(MASK).to_dict() | change, cardinality)


def test_sizes_count_the_rows_that_are_there_and_a_bit_a_value() -> None:
    found = Allocation(SCHEMA, {"f0": 4, "f1": 2, "f2": 0}, extra=1, values={"f0": KeptValues.of(MASK)})
    assert found.rows("f0") == 4 and found.rows("f1") == 3
    assert found.total("parameters") == 4 * 5 + 3 * 3
    assert found.total("bytes") == 4 * (4 * 8 + 3 * 4)
    assert found.total("served_fp32") == 4 * 32 + 3 * 16 + 2  # 20 bytes are served in 32
    assert [c.num_embeddings for c in found.embedding_bag_configs()] == [4, 3]
    assert {n: tuple(t.weight.shape) for n, t in found.to_torch().items()} == {"f0": (4, 4), "f1": (3, 2)}
    dropped = dataclasses.replace(found, widths={"f0": 0, "f1": 2, "f2": 0})
    assert dropped.total("served_fp32") == 3 * 16  # no bits of a field that has no table


def test_the_file_comes_back_and_is_refused_on_other_data(tmp_path: Path) -> None:
    found = Allocation(SCHEMA, {"f0": 4, "f1": 2, "f2": 0}, values={"f0": KeptValues.of(MASK)})
    found.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json", SCHEMA) == found == Allocation.load(tmp_path / "a.json")
    other = small_schema(12, 3, 6)
    with pytest.raises(UserError, match="rows for some values alone"):
        carried_over(tmp_path / "a.json", other)
    with pytest.raises(UserError, match="a field of 10 values; the data have 12"):
        dataclasses.replace(found, schema=other)


def test_a_training_does_not_begin_with_such_tables_nor_such_tables_with_others(tmp_path: Path) -> None:
    """Rows would be those of other values."""
    whole = Allocation(SCHEMA, {"f0": 4, "f1": 2, "f2": 0})
    some, data = dataclasses.replace(whole, values={"f0": KeptValues.of(MASK)}), Data(tmp_path, SCHEMA)
    for old, new in ((whole, some), (some, whole), (some, some)):
        with pytest.raises(UserError, match="rows for some values alone, which are not carried over"):
            Start(tmp_path, data, old, 1, {}, False).check({}, data, new)


def test_ids_are_mapped_field_by_field_and_a_batch_once() -> None:
    batch = random_batch(SCHEMA, 50)
    rows = RowMap({"f0": KeptValues.of(MASK)}, torch.device("cpu"))
    mapped = rows(batch.sparse)
    wanted = torch.from_numpy(KeptValues.of(MASK).row_of)[batch.sparse["f0"].values()]
    assert torch.equal(mapped["f0"].values(), wanted) and mapped["f0"].values().dtype == torch.int32
    assert torch.equal(mapped["f2"].values(), batch.sparse["f2"].values())
    assert rows(batch.sparse) is mapped and rows(random_batch(SCHEMA, 50, 1).sparse) is not mapped


def _small(run, whole: SubnetTask, kept: KeptValues) -> tuple[SubnetTask, Allocation]:
    """A model whose table ``big`` has the rows of ``kept`` alone, with the weights of a model of all rows."""
    widths = {"left": 4, "big": 2, "right": 8, "idle": 0}
    allocation = Allocation(run.schema, widths, {}, run.config.model.extra, values={"big": kept})
    task = SubnetTask(run.config, allocation, run.context)
    task.model.bare_head.load_state_dict(whole.model.bare_head.state_dict())
    tables = whole_tables(whole.model.sharded)
    with torch.no_grad():
        for shard in task.model.sharded.local_shards():
            rows = torch.from_numpy(kept.ids) if shard.table.name == "big" else slice(None)
            shard.tensor.copy_(tables[shard.table.name][rows])
    return task, allocation


@pytest.mark.parametrize("first_order", ["embedding", "value"])
def test_the_model_answers_as_one_whose_dropped_values_are_the_rare_one_and_so_does_its_export(
    first_order: str, data: Path, tmp_path: Path
) -> None:
    run = run_of(data, f"model.first_order={first_order}")
    size = dict(zip(run.schema.names, run.schema.cardinalities, strict=True))["big"]
    kept = KeptValues.of(np.random.default_rng(0).random(size) < 0.3)
    whole = SubnetTask(run.config, Allocation(run.schema, {"left": 4, "big": 2, "right": 8, "idle": 0}), run.context)
    shaken(whole.model)
    task, allocation = _small(run, whole, kept)
    assert whole_tables(task.model.sharded)["big"].shape[0] == kept.rows < size / 2
    with torch.no_grad():
        for shard in whole.model.sharded.local_shards():
            if shard.table.name == "big":
                shard.tensor[torch.from_numpy(~kept.mask)] = shard.tensor[0].clone()
    batch = next(iter(run.stream("test", 100, shuffle=False).epoch(0)))
    whole.model.eval(), task.model.eval()
    with torch.no_grad():
        assert torch.equal(task.predict(batch), whole.predict(batch))

    body = exported(run, of_single(task, allocation, run.config.model), tmp_path / "model", "int8")
    assert body["sizes"]["served_int8"] == allocation.total("served_int8")
    body = exported(run, of_single(task, allocation, run.config.model), tmp_path / "exact")
    assert body["measured"]["bitwise"]
    with torch.no_grad():
        assert torch.equal(
            open_directory(tmp_path / "exact").model()(ids_of_batch(batch, run.schema)), task.predict(batch)
        )


def test_rows_of_dropped_values_are_trained_into_row_0(data: Path) -> None:
    """A step moves the row that a dropped value looks up: row 0, whether or not the batch has id 0."""
    run = run_of(data)
    sizes = dict(zip(run.schema.names, run.schema.cardinalities, strict=True))
    none = {n: KeptValues.of(np.arange(sizes[n]) == 1) for n in ("left", "big")}
    task = SubnetTask(run.config, Allocation(run.schema, dict.fromkeys(run.schema.names, 4), values=none), run.context)
    before = whole_tables(task.model.sharded)["left"].clone()
    batch = next(iter(run.stream("train", 64, shuffle=True).epoch(0)))
    assert bool((batch.sparse["left"].values() > 1).any())
    task.loss(batch, 0).backward()
    task.model.sharded.step()
    after = whole_tables(task.model.sharded)["left"]
    assert after.shape == (2, 4) and not torch.equal(after[0], before[0])


def test_the_report_counts_the_rows_that_are_kept(data: Path, tmp_path: Path) -> None:
    run = run_of(data)
    config = small_config(data, tmp_path)
    config.save(tmp_path)
    run.schema.save(tmp_path)
    size = dict(zip(run.schema.names, run.schema.cardinalities, strict=True))["big"]
    kept = KeptValues.of(np.arange(size) < 100)
    widths = {"left": 4, "big": 4, "right": 4, "idle": 0}
    Allocation(run.schema, widths, values={"big": kept}).save(tmp_path / "allocation.json")
    section = widths_found([load_run(tmp_path)], tmp_path / "report")
    assert section is not None and ">400<" in section.body and "Rows kept" in section.body
