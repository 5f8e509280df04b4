"""Checks 8, 9, 10 and 15: what a step takes on tables of Criteo's sizes, beside a plain copy, torch alone, a plan.

Times are the device's own. On a CPU and on the pretend device sizes are tiny and times mean nothing: there these checks
show that they would run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.plan import Topology
from embsearch_dist.sharding.planning import make_plan
from embsearch_dist.sharding.statistics import column_sums
from embsearch_dist.train.retrain import SubnetTask
from tools.gpucheck.data import Resident, criteo_schema
from tools.gpucheck.lab import Lab, copy_bandwidth
from tools.gpucheck.peer import DeepFM, Training
from tools.gpucheck.steps import in_turns, step_times

WIDTH, CAP = 16, 1000  # CAP: rows of a table without a GPU


def deepfm(lab: Lab, *overrides: str, method: str = "ues") -> tuple[Schema, Config]:
    """Criteo's schema, and a config with an MLP 400-400-400 (16-8 without a GPU) and row-wise Adagrad."""
    hidden = lab.pick([16, 8], [400, 400, 400])
    base = ["model.backbone=deepfm", f"model.hidden={hidden}", "model.unify=mixed", f"model.unified_width={WIDTH}"]
    base += ["optim.embedding=rowwise_adagrad"]
    return criteo_schema(lab.pick(CAP, 0)), lab.config(*base, *overrides, method=method)


def uniform(schema: Schema, config: Config, context: Context) -> SubnetTask:
    """Width 16 everywhere."""
    return SubnetTask(config, Allocation.uniform(schema, WIDTH), context)


def table_bytes(batch: int, fields: int, optimizer: str) -> int:
    """Fewest bytes that the tables of one step move: rows read, pooled rows written, their gradient read, rows and
    optimizer state read and written. Rows that come twice in a batch count twice."""
    row = 4 * WIDTH
    state = {"rowwise_adagrad": 4, "adagrad": row, "adam": 2 * row, "sgd": 0}[optimizer]
    return batch * fields * (3 * row + 2 * (row + state))


def tables_alone(lab: Lab, task: Any, batch: Batch, repeats: int) -> float:
    """Median seconds of look-up and fused update by themselves."""
    sharded = task.model.sharded
    values = sharded(batch.sparse).values()
    gradient = torch.full_like(values, 1e-6)

    def work() -> None:
        sharded.zero_grad()
        sharded(batch.sparse).values().backward(gradient)
        sharded.step()

    return statistics.median(lab.timed(work, repeats, 2))


def roofline(lab: Lab) -> None:
    """Rows/s at three batch sizes; the tables' bytes/s as a share of what a copy moves in this process."""
    with lab.opened() as context:
        bandwidth = copy_bandwidth(lab)
        lab.note(copy_GB_per_s=bandwidth / 1e9)
        schema, config = deepfm(lab)
        begun = time.monotonic()
        task = uniform(schema, config, context)
        lab.note(million_table_rows=sum(schema.cardinalities) / 1e6, building_s=time.monotonic() - begun)
        for size in lab.pick([64, 128, 256], [4096, 16384, 65536]):
            measure(lab, task, config, Resident(schema, size, lab.pick(2, 8), lab.device), context, bandwidth)
        if lab.left() > lab.pick(2, 15):
            del task
            schema, config = deepfm(lab, "model.precision=bfloat16")
            stream = Resident(schema, lab.pick(64, 65536), 2, lab.device)
            task, steps = uniform(schema, config, context), lab.pick(3, 30)
            seconds = statistics.median(step_times(lab, task, config, stream, context, steps))
            lab.note(**{f"bf16_rows_per_s_at_{stream.global_batch}": stream.global_batch / seconds})


def measure(lab: Lab, task: SubnetTask, config: Config, stream: Resident, context: Context, bandwidth: float) -> None:
    """Figures of one batch size."""
    steps, size = lab.pick(4, 40), stream.global_batch
    begun = time.perf_counter()
    times = step_times(lab, task, config, stream, context, steps)
    host, device = time.perf_counter() - begun, sum(times)
    seconds = statistics.median(times)
    tables = tables_alone(lab, task, stream.batches[0], lab.pick(3, 30))
    moved = table_bytes(size, len(stream.schema.fields), config.optim.embedding)
    dense = 3 * task.model.flops_per_sample() * size
    lab.note(**{f"rows_per_s_at_{size}": size / seconds, f"step_ms_at_{size}": 1000 * seconds})
    lab.note(**{f"tables_ms_at_{size}": 1000 * tables, f"tables_of_copy_%_at_{size}": 100 * moved / tables / bandwidth})
    lab.note(**{f"dense_TFLOP_per_s_of_step_at_{size}": dense / seconds / 1e12})
    lab.expect(0 < device < host, f"batch {size}: the device's clock says {device:.3g} s of the host's {host:.3g} s")


def peer(lab: Lab) -> None:
    """Torch alone, after its logits have been seen to be ours when it has our weights."""
    with lab.opened() as context:
        size, steps = lab.pick(64, 16384), lab.pick(3, 15)
        schema, config = deepfm(lab)
        stream = Resident(schema, size, 2, lab.device)
        ours = uniform(schema, config, context)
        sides: dict[str, Callable[[], list[float]]] = {}
        for name, bags in (("bags", True), ("big_table", False)):
            # The pretend device has no sparse tensors.
            sizes, hidden, sparse = schema.cardinalities, config.model.hidden, lab.kind != "pretend"
            with torch.device(lab.device if lab.real else "cpu"):  # drawing the tables on a CPU takes seconds
                model = DeepFM(sizes, WIDTH, len(schema.dense), hidden, bags, sparse)
            model.to(lab.device)
            copy_weights(ours, model, schema)
            apart = logits_apart(ours, model, stream.batches[0], schema)
            lab.note(**{f"{name}_logits_apart": apart})
            lab.expect(apart <= 1e-4, f"{name}: with our weights its logits are {apart:.2g} from ours")
            sides[name] = peer_steps(lab, Training(model, config.optim.dense_lr), stream, steps)
        sides["ours_rowwise_adagrad"] = lambda: step_times(lab, ours, config, stream, context, steps)
        _, adam = deepfm(lab, "optim.embedding=adam")
        second = uniform(schema, adam, context)
        sides["ours_adam"] = lambda: step_times(lab, second, adam, stream, context, steps)
        found = in_turns(sides, lab.pick(1, 3))
        lab.note(**{f"{name}_rows_per_s": size / seconds for name, seconds in found.items()})
        lab.note(ours_to_bags=found["bags"] / found["ours_rowwise_adagrad"])
        lab.note(adam_to_big_table=found["big_table"] / found["ours_adam"])


def columns(batch: Batch, schema: Schema) -> torch.Tensor:
    """Ids ``[B, F]`` int64 of a batch whose rows have one id in each field."""
    return torch.stack([batch.sparse[n].values() for n in schema.names], 1).long()


@torch.no_grad()
def copy_weights(ours: SubnetTask, theirs: DeepFM, schema: Schema) -> None:
    """Give the peer our tables and our dense part."""
    live = {s.table.name: s.tensor for s in ours.model.sharded.local_shards()}
    start, tables = 0, cast(Any, theirs.tables)
    for k, name in enumerate(schema.names):
        if theirs.bags:
            tables[k].weight.copy_(live[name])
        else:
            tables[0].weight[start : start + len(live[name])].copy_(live[name])
            start += len(live[name])
    backbone: Any = ours.model.bare_head.backbone
    layers = [m for m in theirs.mlp if isinstance(m, torch.nn.Linear)]
    for own, other in zip([backbone.linear, backbone.first, *backbone.later_layers], [theirs.linear, *layers]):
        other.weight.copy_(own.weight)
        other.bias.copy_(own.bias)


@torch.no_grad()
def logits_apart(ours: SubnetTask, theirs: DeepFM, batch: Batch, schema: Schema) -> float:
    """Largest difference of the logits of a batch."""
    ours.model.eval()
    return float((ours.predict(batch) - theirs(columns(batch, schema), batch.dense)).abs().max())


def peer_steps(lab: Lab, training: Training, stream: Resident, steps: int) -> Callable[[], list[float]]:
    """The peer's side of :func:`in_turns`; like our trainer it looks at its loss in every step."""
    made = [(columns(b, stream.schema), b.dense, b.label) for b in stream.batches]

    def side() -> list[float]:
        marks = lab.marks()
        for k in range(3 + steps):
            if k >= 3:
                marks.mark()
            float(training.step(*made[k % len(made)]))
        marks.mark()
        return marks.seconds()

    return side


def supernet(lab: Lab) -> None:
    """A step of the supernet beside one of UES, both 16 wide at most, and the statistics that its sampler asks for."""
    with lab.opened() as context:
        size, steps = lab.pick(64, 16384), lab.pick(3, 15)
        schema, config = deepfm(lab)
        _, searching = deepfm(lab, "search.candidates=[0,4,8,16]", method="adass")
        plain, net = uniform(schema, config, context), SupernetTask(Run(searching, schema, context), 100_000)
        stream = Resident(schema, size, 2, lab.device)
        sides = {
            "ues": lambda: step_times(lab, plain, config, stream, context, steps),
            "supernet": lambda: step_times(lab, net, searching, stream, context, steps),
        }
        found = in_turns(sides, lab.pick(1, 3))
        lab.note(**{f"{name}_rows_per_s": size / seconds for name, seconds in found.items()})
        lab.note(supernet_to_ues=found["supernet"] / found["ues"])
        sums, rows = column_sums(net.model.sharded)
        shard = max(net.model.sharded.local_shards(), key=lambda s: s.tensor.numel())
        place = list(net.model.sharded.tables).index(shard.table.name)
        wanted = torch.stack([f(shard.tensor.double()).sum(0) for f in (torch.clone, torch.square, torch.abs)], 1)
        apart = float((sums[place, : wanted.shape[0]] - wanted).abs().max() / wanted.abs().max())
        lab.expect(apart <= 1e-9, f"column sums of {shard.table.name} are {apart:.2g} from torch's")
        lab.expect(float(rows.sum()) == sum(schema.cardinalities), "column sums count other rows than the tables have")
        seconds = statistics.median(lab.timed(lambda: column_sums(net.model.sharded), lab.pick(2, 3), 0))
        moved = sum(s.tensor.nbytes for s in net.model.sharded.local_shards())
        share = 100 * moved / seconds / copy_bandwidth(lab)
        lab.note(**{"column_sums_ms": 1000 * seconds, "column_sums_of_copy_%": share})


def plan(lab: Lab) -> None:
    """The prediction for this one device, told its bandwidth, beside what was built and timed."""
    with lab.opened() as context:
        size, bandwidth = lab.pick(64, 16384), copy_bandwidth(lab)
        memory = "ddr" if lab.kind == "cpu" else "hbm"
        schema, config = deepfm(lab, f"dist.planner.batch_size={size}", "dist.sharding=auto")
        config.dist.planner.hbm_bandwidth = config.dist.planner.ddr_bandwidth = bandwidth / 2**30
        before = torch.cuda.memory_allocated() if lab.real else 0
        task = uniform(schema, config, context)
        built = torch.cuda.memory_allocated() - before if lab.real else 0
        tables = list(task.model.sharded.tables.values())
        topology = Topology(1, 1, lab.where, config.dist.planner)
        predicted = make_plan(tables, topology, config.dist, config.optim.embedding)
        live = sum(s.tensor.nbytes for s in task.model.sharded.local_shards())
        lab.expect(predicted.weights == live, f"plan: {predicted.weights:,} bytes of weights, the tables have {live:,}")
        seconds = tables_alone(lab, task, Resident(schema, size, 1, lab.device).batches[0], lab.pick(3, 30))
        bytes_of = sum(predicted.per_rank(memory))
        lab.note(predicted_ms=predicted.step_ms, measured_ms=1000 * seconds, ratio=1000 * seconds / predicted.step_ms)
        lab.note(predicted_MB=bytes_of / 1e6, weights_MB=live / 1e6)
        if lab.real:
            lab.note(built_MB=built / 1e6)
            lab.expect(built <= 1.2 * bytes_of, f"{built:,} bytes were allocated, the plan says {bytes_of:,}")
