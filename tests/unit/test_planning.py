"""Plans of meta tables on stated machines: where shards lie, what they weigh, and what is said when nothing fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import DistConfig, PlannerConfig
from embsearch_dist.errors import UserError
from embsearch_dist.sharding.dry_run import make_plans, read_schema, read_subjects, supernet_subject
from embsearch_dist.sharding.plan import GIB, Plan, Topology, imbalance
from embsearch_dist.sharding.plan_text import comparison, plan_text, ranges, to_json
from embsearch_dist.sharding.planning import allowed_kinds, column_shard, make_plan
from embsearch_dist.sharding.tables import Table
from tests.factories import CONFIGS, small_schema

MACHINES = Topology(8, 4, "cuda", PlannerConfig())
TABLE = Table("f", 100_001, 64)
USER = Table("user", 50_000_000, 64)  # 11.9 GiB
KINDS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel"]


def told(**tables: str) -> DistConfig:
    return DistConfig(sharding="planner", tables=tables)


def plan_of(topology: Topology, *tables: Table, optimizer: str = "adagrad", **kinds: str) -> Plan:
    return make_plan(tables, topology, told(**kinds), optimizer)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sharding_covers_the_table_once(kind: str, device: str) -> None:
    plan = plan_of(replace(MACHINES, device=device), TABLE, Table("g", 5000, 16), optimizer="adam", f=kind)
    found = plan.placements[0]
    assert (found.kind, found.table) == (kind, TABLE)
    assert len({s.rank for s in found.shards}) == len(found.shards)  # no rank has two parts
    cells = {(*s.offset, *s.size) for s in found.shards}
    machines = {r // 4 for r in found.ranks}
    if kind == "data_parallel":
        assert (cells, found.ranks) == ({(0, 0, 100_001, 64)}, list(range(8)))
        return
    assert sum(rows * columns for _, _, rows, columns in cells) == 100_001 * 64
    if kind == "row_wise":
        assert found.ranks == list(range(8))
    if kind == "column_wise":
        assert sorted(c for _, c, _, _ in cells) == [0, 16, 32, 48]
    if kind == "table_row_wise":
        assert (len(machines), len(cells)) == (1, 4)
    if kind == "grid_shard":  # rows within a machine, columns over machines
        assert (len(machines), len(cells)) == (2, 8)
        assert {s.rank // 4 for s in found.shards if s.offset[1] == 0} != machines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("optimizer", "numbers"), [("adam", 2.0), ("adagrad", 1.0), ("rowwise_adagrad", 0), ("sgd", 0)]
)
def test_bytes_are_rows_times_width_and_the_optimizers_state(kind: str, optimizer: str, numbers: float) -> None:
    plan = plan_of(MACHINES, TABLE, optimizer=optimizer, f=kind)
    weights = 100_001 * 64 * 4
    copies = 8 if kind == "data_parallel" else 1
    assert plan.weights == weights
    assert sum(plan.per_rank("weights")) == copies * weights
    state = numbers * weights
    if optimizer == "rowwise_adagrad":  # one number a row, of every column shard
        state = 4 * 100_001 * {"column_wise": 4, "grid_shard": 2}.get(kind, 1)
    assert sum(plan.per_rank("optimizer")) == copies * state
    assert sum(plan.per_rank("gradient")) == (copies * weights if kind == "data_parallel" else 0)
    assert sum(plan.per_rank("ddr")) == 0
    parts = [sum(p) for p in zip(*(plan.per_rank(m) for m in ("weights", "optimizer", "gradient", "buffers")))]
    assert parts == plan.per_rank("hbm") == plan.bytes


def test_on_cpu_tables_lie_in_ddr_with_both_moments_of_adam_and_no_gradient_of_their_size() -> None:
    plan = plan_of(replace(MACHINES, device="cpu"), TABLE, optimizer="adam", f="row_wise")
    assert plan.placements[0].kernel == "fused"
    assert sum(plan.per_rank("gradient")) == 0
    assert sum(plan.per_rank("hbm")) == 0
    assert 3 * plan.weights < sum(plan.per_rank("ddr")) < 4 * plan.weights  # the buffers too


def test_offload_uses_main_memory_only_where_hbm_is_short() -> None:
    small = replace(MACHINES, world_size=4, planner=PlannerConfig(hbm_gb=8, offload=True))
    kernels = [p.kernel for p in plan_of(small, USER, Table("g", 5000, 16), optimizer="adam").placements]
    assert "uvm" in kernels[0]
    assert kernels[1] == "fused"


def test_times_follow_bandwidth_and_batch() -> None:
    base = plan_of(MACHINES, TABLE, f="row_wise")
    slow = replace(MACHINES, planner=PlannerConfig(inter_host_bandwidth=PlannerConfig().inter_host_bandwidth / 2))
    assert plan_of(slow, TABLE, f="row_wise").per_rank("forward comms")[0] == pytest.approx(
        2 * base.per_rank("forward comms")[0]
    )
    more = replace(MACHINES, planner=PlannerConfig(batch_size=1024))
    assert plan_of(more, TABLE, f="row_wise").step_ms == pytest.approx(2 * base.step_ms, rel=0.01)


def test_the_planner_is_no_slower_than_the_plan_by_hand() -> None:
    tables = [Table(f"f{i}", 10 ** (2 + i % 6), (16, 32, 64)[i % 3]) for i in range(12)]
    plans = {s: make_plan(tables, MACHINES, DistConfig(sharding=s), "adam") for s in ("auto", "planner")}
    assert plans["planner"].step_ms < plans["auto"].step_ms
    assert set(plans["auto"].kinds.values()) == {"table_wise", "row_wise"}
    for plan in plans.values():
        assert [p.table for p in plan.placements] == tables
        assert plan.step_ms == plan.times[plan.slowest] == max(plan.times)
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    again = make_plan(tables, MACHINES, DistConfig(sharding="planner"), "adam")
    assert again == plans["planner"]


def test_untold_tables_get_only_kinds_that_leave_the_result_alone() -> None:
    free = DistConfig(sharding="planner")
    gpu, cpu = MACHINES, replace(MACHINES, device="cpu")
    assert "column_wise" not in allowed_kinds(TABLE, cpu, free, "rowwise_adagrad")
    assert allowed_kinds(TABLE, cpu, told(f="column_wise"), "rowwise_adagrad") == ["column_wise"]
    assert "data_parallel" in allowed_kinds(TABLE, gpu, free, "adam")
    assert "data_parallel" in allowed_kinds(TABLE, cpu, free, "adam")
    assert allowed_kinds(Table("f", 100, 64), gpu, told(f="row_wise"), "sgd") == ["table_wise"]  # nothing to gain
    assert allowed_kinds(TABLE, Topology(1, 1, "cpu", PlannerConfig()), told(f="row_wise"), "sgd") == ["table_wise"]


def test_column_shards_divide_the_width() -> None:
    assert [column_shard(w, 4, 16) for w in (16, 32, 48, 64, 128)] == [16, 16, 16, 16, 32]
    assert column_shard(20, 8, 4) == 4
    assert column_shard(12, 2, 4) == 12  # 6 is no multiple of 4


def refused(topology: Topology, *tables: Table, dist: DistConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(tables, topology, dist or told(), "adam")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def advice(message: str) -> tuple[int, int, float]:
    """Ranks, width and GiB that the message says would do."""
    patterns = (r"more ranks \(about (\d+)\)", r"width (\d+) or less", r"hbm_gb ([\d.]+) or more")
    ranks, width, gib = (re.search(p, message) for p in patterns)
    assert ranks and width and gib, message
    return int(ranks[1]), int(width[1]), float(gib[1])


def test_a_table_too_large_for_any_split_is_named_and_the_advice_works() -> None:
    small = Topology(4, 4, "cuda", PlannerConfig(hbm_gb=8))
    message = refused(small, USER, Table("g", 1000, 16))
    for part in ("no plan for 4 ranks with 8 GiB HBM", "table 'user' (50,000,000 rows x 64 = 11.9 GiB)", "35.8 GiB"):
        assert part in message
    assert "PlannerError" not in message
    ranks, width, gib = advice(message)
    for topology, table in (
        (Topology(ranks, ranks, "cuda", small.planner), USER),
        (small, Table("user", USER.rows, width)),
        (replace(small, planner=PlannerConfig(hbm_gb=gib)), USER),
        (replace(small, planner=PlannerConfig(hbm_gb=8, offload=True)), USER),
    ):
        assert max(plan_of(topology, table, optimizer="adam").per_rank("hbm")) <= topology.budget


def test_a_constraint_that_makes_it_impossible_is_named() -> None:
    message = refused(Topology(4, 4, "cuda", PlannerConfig(hbm_gb=16)), USER, dist=told(user="table_wise"))
    assert "(dist.tables.user allows no other way)" in message
    assert "dist.tables.user=row_wise" in message
    assert "more ranks" not in message  # the table would still be whole on one
    assert plan_of(Topology(4, 4, "cuda", PlannerConfig(hbm_gb=16)), USER, optimizer="adam", user="row_wise")


def test_tables_too_large_together_and_tables_that_cannot_be_packed() -> None:
    tables = [Table(f"t{i}", 5_000_000, 64) for i in range(9)]
    small = Topology(4, 4, "cuda", PlannerConfig(hbm_gb=8))
    message = refused(small, *tables)
    assert "take 32.2 GiB, the ranks together have 27.2 GiB; the largest is table 't0'" in message
    assert "widths times 0.8" in message
    whole = {t.name: "table_wise" for t in tables[:5]}
    message = refused(small, *tables[:5], dist=told(**whole))
    assert "each table would fit, 17.9 GiB in all, but they cannot be packed side by side" in message
    assert "widths times 0.95" in message  # two of them on one rank
    assert plan_of(small, *tables[:5], optimizer="adam")


def test_a_plan_by_hand_that_does_not_fit_says_so() -> None:
    message = refused(replace(MACHINES, planner=PlannerConfig(hbm_gb=16)), USER, dist=DistConfig(sharding="table_wise"))
    assert "dist.sharding table_wise does not fit 8 ranks" in message
    assert "rank 0 would hold 35.8 GiB" in message
    assert "Would help: dist.sharding: planner" in message


def test_machines_must_be_filled() -> None:
    with pytest.raises(UserError, match="10 ranks cannot be spread over machines of 4"):
        Topology(10, 4, "cuda", PlannerConfig())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dist.sharding=planer", "did you mean 'planner'"),
        ("dist.tables.user=grid_shard", "grid_shard needs dist.sharding: planner"),
        ("dist.planner.hbm_gb=-1", "dist.planner.hbm_gb: must be >= 0"),
        ("dist.planner.hbm_bandwidth=-1", "dist.planner.hbm_bandwidth: must be >= 0"),
        ("dist.planner.ddr_gb=0", "dist.planner.ddr_gb: must be above 0"),
        ("dist.planner.ddr_bandwidth=0", "dist.planner.ddr_bandwidth: must be above 0"),
        ("dist.planner.reserve=1", r"dist.planner.reserve: must be in \[0, 1\)"),
        ("dist.planner.column_width=6", "dist.planner.column_width: must be a multiple of 4"),
    ],
)
def test_bad_settings_of_the_planner(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(CONFIGS, None, [override], method="adass")


def test_allocations_are_compared_with_the_first(tmp_path: Path) -> None:
    schema = read_schema("", "user=5e6, item=1000000,age=8")
    assert schema.cardinalities == [5_000_000, 1_000_000, 8]
    mixed = {"user": 8, "item": 30, "age": 0}
    Allocation(schema, mixed, {"name": "adass"}).save(tmp_path / "a.json")
    Allocation(schema, mixed, {"name": "adass"}).save(tmp_path / "b.json")
    subjects = read_subjects(["ues-32", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "ues-64"], schema)
    assert [s.name for s in subjects] == ["ues-32", "adass", str(tmp_path / "b.json"), "ues-64"]
    assert subjects[1].tables == [Table("user", 5_000_000, 8), Table("item", 1_000_000, 32)]  # 30 is stored as 32
    assert subjects[1].parameters == 5_000_000 * 8 + 1_000_000 * 30
    config = load_config(CONFIGS, None, ["dist.sharding=planner"], method="adass")
    plans = make_plans(subjects, MACHINES, config)
    parameters = {s.name: s.parameters for s in subjects}
    lines = comparison(plans, parameters).splitlines()
    assert [line.split()[0] for line in lines] == ["allocation", *plans]
    assert lines[1].split()[-3:] == ["100.0%", "100.0%", "100.0%"]
    assert lines[4].split()[-3:-1] == ["200.0%", "200.0%"]
    assert float(lines[2].split()[-1][:-1]) < 100  # fewer and narrower tables take a shorter step
    body = to_json(plans, parameters)["allocations"]["adass"]
    assert body["step_ms"] == max(body["milliseconds"]["step"])
    text = plan_text("adass", plans["adass"], parameters["adass"])
    assert "70,000,000 parameters, tables 275 MiB" in text
    assert re.search(r"item +1,000,000 +32 +122 MiB", text)
    assert "age" not in text  # dropped


def test_the_supernet_is_as_wide_as_its_candidates() -> None:
    schema = small_schema(100, 50)
    for scheme, width in (("shared", 64), ("independent", 124)):
        overrides = ["search.candidates=[0,4,8,16,32,64]", f"search.scheme={scheme}"]
        subject = supernet_subject(schema, load_config(CONFIGS, None, overrides, method="adass"))
        assert [t.width for t in subject.tables] == [width, width]
        assert subject.parameters == width * 150


@pytest.mark.parametrize("text", ["user", "user=", "user=many", "user=0", "user=1.5", "=5"])
def test_bad_cardinalities(text: str) -> None:
    with pytest.raises(UserError, match="expected NAME=ROWS"):
        read_schema("", text)


def test_an_allocation_of_other_data_gives_its_widths_when_cardinalities_are_stated(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    Allocation(small_schema(100, 50), {"f0": 8, "f1": 4}).save(Path(path))
    larger = read_schema("", "f0=1e6,f1=2e6")
    with pytest.raises(UserError, match="the cardinalities differ"):
        read_subjects([path], larger)
    assert read_subjects([path], larger, any_data=True)[0].parameters == 16_000_000
    with pytest.raises(UserError, match="nothing to plan"):
        read_subjects([], larger)


def test_ranks_are_listed_shortly() -> None:
    assert ranges([0, 1, 2, 3, 8]) == "0-3,8"
    assert ranges(range(0, 20, 2)) == "0,2,4,6,... (10)"
    assert imbalance([1, 1, 4]) == 2
    assert GIB == 2**30
