"""What iHAS's gates cost: in a step of the search, in the deterministic masks, and in routed inference.

    python tools/bench/gates.py                                all three, about 4 minutes
    python tools/bench/gates.py search --precision bfloat16    samples/s of UES-16 and of the search, parts of a step
    python tools/bench/gates.py threshold                      deterministic masks beside the product W e
    python tools/bench/gates.py inference --rows 1000000       a test set through UES-16 and through routed groups

Rows like Criteo's (39 fields, made-up Zipf ids, held in memory), embeddings 16 wide, MLP backbone, one process, one
thread, on the CPU. The sides of a table take turns in one run, so that what else the machine does hits all alike;
figures are medians over the turns, with the quartiles; a ratio is taken turn by turn. Weights are random: speed only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation too

from embsearch_dist.ranks.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch: a training does so too

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.adafs.config import AdaFSConfig
from embsearch_dist.methods.adafs.method import AdaFSTask
from embsearch_dist.methods.ihas import gates_stage as gating
from embsearch_dist.methods.ihas import routed_model as routed
from embsearch_dist.methods.ihas.config import IHASConfig
from embsearch_dist.methods.ihas.gates import BernoulliGates, deterministic
from embsearch_dist.methods.ihas.gates_stage import GatesTask
from embsearch_dist.methods.ihas.kmeans import KMeans
from embsearch_dist.methods.ihas.routed_model import RoutedModel
from embsearch_dist.methods.ihas.router_by_centres import CentreRouter
from embsearch_dist.methods.ihas.router_by_fields import FieldRouter
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.run import Run
from embsearch_dist.schema import Field, Schema
from embsearch_dist.train.bilevel import frozen
from embsearch_dist.train.guard import Gate, agree
from embsearch_dist.train.retrain import SubnetTask
from tools.bench.clock import now
from tools.bench.steps import BATCHES, Clock, Made, cardinalities

WIDTH, AIM = 16, 0.6
PLAIN, GATED = f"UES-{WIDTH}", "iHAS search, gates on"
METHODS = {"ihas": IHASConfig, "adafs": AdaFSConfig}
Parts = dict[str, float]
Turns = Sequence[Parts]


def in_turns(sides: Mapping[str, Callable[[], Parts]], rounds: int, seconds: float) -> dict[str, list[Parts]]:
    """Each side's parts in seconds, turn by turn, after a round to warm up. Stops early, but not before three."""
    found: dict[str, list[Parts]] = {name: [] for name in sides}
    begun = time.perf_counter()
    for k in tqdm(range(max(rounds, 2) + 1), desc="rounds", leave=False):
        for name, turn in sides.items():
            found[name].append(turn())
        if k >= 3 and time.perf_counter() - begun > seconds:
            break
    return {name: turns[1:] for name, turns in found.items()}


def spread(values: Sequence[float], form: str) -> str:
    """``median (quartile-quartile)``."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def median_of(turns: Turns, part: str) -> float:
    return statistics.median(t.get(part, 0.0) for t in turns)


def ratio(first: Turns, other: Turns) -> str:
    """How many times as fast the other side is."""
    return spread([a["whole"] / b["whole"] for a, b in zip(first, other, strict=True)], ".2f")


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print("".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *lines]), flush=True)


class MadeRun(Run):
    """A run whose splits are :class:`Made`."""

    def stream(self, split: str, batch_size: int, shuffle: bool, seed: int | None = None) -> Any:
        return Made(self.schema, batch_size)


def make_config(args: argparse.Namespace, hidden: Sequence[int], method: str = "ihas") -> Config:
    """Tables learn in backward, as those of train.py do: an optimizer that writes whole tables would hide the gates."""
    base = ["model.backbone=mlp", f"model.hidden={list(hidden)}", "model.unify=mixed", f"model.unified_width={WIDTH}"]
    base += [f"model.precision={args.precision}", "optim.embedding=rowwise_adagrad", f"search.width={WIDTH}"]
    base += ["search.outer.pretrain_epochs=0", f"search.outer.every={args.every}"]
    base += [f"search.training.batch_size={args.batch}", "run.device=cpu", "run.threads=1", "run.dir=not-written"]
    return load_config(METHODS, None, base, method)


def make_run(args: argparse.Namespace, context: Context, hidden: Sequence[int], method: str = "ihas") -> Run:
    fields = tuple(Field(f"f{i}", c) for i, c in enumerate(cardinalities(args.table_rows)))
    rows = dict.fromkeys(("train", "validation"), args.batch * BATCHES)
    return MadeRun(make_config(args, hidden, method), Schema("benchmark", fields, (), rows), context)


def headline(what: str, args: argparse.Namespace, hidden: Sequence[int], batch: int) -> str:
    return f"\n{what}: MLP {'-'.join(map(str, hidden))}, {args.precision}, batch {batch}"


def noting(clock: Clock, part: str, function: Callable[..., Any], before: str) -> Callable[..., Any]:
    """The function; its seconds go to a part, those since the clock was last looked at to the part before."""

    def call(*args: Any, **named: Any) -> Any:
        clock.note(before)
        found = function(*args, **named)
        clock.note(part)
        return found

    return call


def watch(task: GatesTask, clock: Clock) -> None:
    """Let the clock note what the gates do in a step."""
    for part, name in (("noise", "_noise"), ("W e", "logits")):
        setattr(task, name, noting(clock, part, getattr(task, name), "forward"))
    patched = mock.patch.object(gating, "sampled", noting(clock, "mask", gating.sampled, "forward"))
    setattr(task, "select", noting(clock, "multiply", patched(task.select), "forward"))  # noqa: B010


class Learner:
    """Steps of :class:`embsearch_dist.train.trainer.Trainer`, part by part."""

    def __init__(self, task: Any, run: Run, args: argparse.Namespace) -> None:
        self.task, self.context, self.steps, self.every = task, run.context, args.steps, args.every
        self.stream, self.done, self.clock = Made(run.schema, args.batch), 0, Clock(run.context.device)
        if isinstance(task, GatesTask):
            watch(task, self.clock)
        model, lr = task.model, run.config.optim.dense_lr
        self.head, self.outer = list(model.bare_head.parameters()), list(model.outer_parameters)
        self.optimizer = torch.optim.Adam([*self.head, *self.outer], lr=lr, fused=True)
        self.gate = Gate(model.sharded)
        self.gate.__enter__()
        model.tables.register_forward_hook(lambda *_: self.clock.note("look-up"))

    def turn(self) -> Parts:
        """Medians over some steps; ``whole`` is a step with its share of an outer one."""
        taken = [self.step() for _ in range(self.steps)]
        parts = {name: statistics.median(t[name] for t in taken) for name in taken[0]}
        if self.outer:
            parts["outer step"] = self.outer_step() / self.every
            parts["whole"] += parts["outer step"]
        return parts

    def step(self) -> Parts:
        sharded = self.task.model.sharded
        self.clock.start()
        batch = self.stream.batch(self.done)
        self.done += 1
        self.clock.note("batch")
        self.optimizer.zero_grad()
        sharded.zero_grad()
        loss = self.task.loss(batch, self.done)
        self.clock.note("forward")
        loss.backward()
        self.clock.note("backward")
        agree(self.context, loss, self.gate.gradients(), self.head, False)
        self.clock.note("checks")
        self.gate.pass_on()
        sharded.step()
        self.clock.note("tables")
        self.optimizer.step()
        self.clock.note("dense update")
        return {**self.clock.parts, "whole": sum(self.clock.parts.values())}

    def outer_step(self) -> float:
        """Seconds of one, on a held-out batch."""
        begun = now(self.context.device)
        with frozen(self.head):
            loss = self.task.outer_loss(self.every * (1 + self.done // self.steps))
            self.optimizer.zero_grad()
            loss.backward()
        agree(self.context, loss, [], self.outer, False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now(self.context.device) - begun


def search(args: argparse.Namespace, context: Context) -> None:
    """Samples/s of search stages beside plain training, and the parts of a step."""
    for hidden in args.hidden:
        run, other = (make_run(args, context, hidden, method) for method in ("ihas", "adafs"))
        tasks = {
            PLAIN: SubnetTask(run.config, Allocation.uniform(run.schema, WIDTH), context),
            GATED: GatesTask(run, run.config.search, training=True),
            "AdaFS-soft search": AdaFSTask(other, other.config.search, training=True),
        }
        found = in_turns({n: Learner(t, run, args).turn for n, t in tasks.items()}, args.rounds, args.seconds)
        plain, gated = found[PLAIN], found[GATED]
        print(f"{headline('search', args, hidden, args.batch)}, {len(plain)} turns of {args.steps} steps")
        print(f"one outer step in {args.every} steps is in samples/s\n")
        names, lines = [n for n in gated[0] if n not in ("whole", "outer step")], []
        for name, turns in found.items():
            rate = spread([args.batch / t["whole"] for t in turns], ",.0f")
            parts = [f"{1000 * median_of(turns, n):.1f}" if n in turns[0] else "" for n in names]
            lines.append([name, rate, ratio(plain, turns), *parts])
        table(["side", "samples/s", f"ratio (aim for iHAS: >= {AIM})", *(f"{n} ms" for n in names)], lines)
        extra = {n: [t[n] for t in gated] for n in ("noise", "W e", "mask", "multiply")}
        extra["backward, more than plain"] = [g["backward"] - p["backward"] for g, p in zip(gated, plain, strict=True)]
        extra[f"outer step / {args.every}"] = [t["outer step"] for t in gated]
        ms = [spread([1000 * s for s in values], ".2f") for values in extra.values()]
        shares = [f"{statistics.median(v) / median_of(gated, 'whole'):.1%}" for v in extra.values()]
        table(["what the gates add to a step", "ms", "share of the step"], list(zip(extra, ms, shares)))


class Passes(TorchDispatchMode):
    """Seconds of the operations on rows of C columns; the others work on histograms, which are far smaller."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.part = columns, "sigmoid"
        self.seconds = {"sigmoid": 0.0, "histogram": 0.0, "mask": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        device = tensors[0].device if tensors else "cpu"
        begun, name = now(device), func.overloadpacket.__name__
        found = func(*args, **(kwargs or {}))
        seconds = now(device) - begun
        if name == "sigmoid":
            self.part = "sigmoid"
        wide = any(isinstance(x, torch.Tensor) and x.shape[-1:] == (self.columns,) for x in (*args, found))
        if wide or name == "bincount":
            self.seconds[self.part] += seconds
        self.part = {"sigmoid": "histogram", "bincount": "mask"}.get(name, self.part)
        return found


@torch.no_grad()
def threshold(args: argparse.Namespace, context: Context) -> None:
    """The parts of the deterministic masks, and the product that no implementation can do without."""
    run = make_run(args, context, args.hidden[0])
    gates, rows, columns = run.config.search.gates, args.eval_batch, len(run.schema.fields) * WIDTH
    torch.manual_seed(0)
    selector, e = BernoulliGates(columns, False, gates.bias), torch.randn(rows, columns)
    decide(selector)

    def turn() -> Parts:
        begun = now(e.device)
        logits = selector(e)
        product = now(e.device)
        deterministic(logits, gates.bins, gates.fallback, gates.smooth)
        whole = now(e.device) - product
        with Passes(columns) as passes:
            deterministic(logits, gates.bins, gates.fallback, gates.smooth)
        scan = whole - sum(passes.seconds.values())
        return {"W e (the floor)": product - begun, **passes.seconds, "scan": scan, "sigmoid to mask": whole}

    found = in_turns({"gates": turn}, 4 * args.rounds, args.seconds)["gates"]
    print(f"\nthreshold: batch {rows}, {columns} columns, {gates.bins} bins, {len(found)} turns\n")
    lines = []
    for name in found[0]:
        beside = [t[name] / t["W e (the floor)"] for t in found]
        rate = spread([rows / t[name] for t in found], ",.0f") if " " in name else ""
        lines.append([name, spread([1000 * t[name] for t in found], ".2f"), rate, spread(beside, ".2f")])
    table(["part", "ms", "rows/s", "of W e"], lines)


def decide(gates: BernoulliGates) -> None:
    """Make weights larger, so that probabilities of unit embeddings fall into all bins, as after a search."""
    with torch.no_grad():
        gates.linear.weight.mul_(4)


def group_model(run: Run, seed: int) -> SubnetModel:
    """Widths from 4 to 12, as iHAS finds them in the paper: half of the dimensions on average."""
    dice = torch.Generator().manual_seed(seed)
    widths = torch.randint(4, 13, (len(run.schema.fields),), generator=dice).tolist()
    return SubnetModel(
        run.config, Allocation(run.schema, dict(zip(run.schema.names, widths, strict=True))), run.context
    )


def centre_router(run: Run, stream: Made) -> CentreRouter:
    """Two groups of the masked embeddings, found in a few batches."""
    run.config.model.init_std = 1.0
    task = GatesTask(run, run.config.search, training=False)
    decide(task.model.bare_selector)  # type: ignore[arg-type]
    found = CentreRouter(task, "embeddings", KMeans(2, len(run.schema.fields) * WIDTH, run.context, 0))
    found.kmeans.start(found.look(stream.batch(0))[0])
    for k in range(3):
        found.kmeans.update(found.look(stream.batch(k))[0])
    return found


def field_router(run: Run) -> FieldRouter:
    """Three fields, the largest among them."""
    dice, fields = torch.Generator().manual_seed(0), sorted(run.schema.fields, key=lambda f: f.cardinality)
    tables = {f.name: torch.randn(f.cardinality, 2, generator=dice) for f in (fields[-1], fields[20], fields[10])}
    return FieldRouter(run.schema, torch.zeros(2), tables)


class Predictor:
    """Goes through a test set, some batches a turn."""

    def __init__(self, predict: Callable[[Batch], torch.Tensor], stream: Made, batches: int, router: Any) -> None:
        self.predict, self.stream, self.batches, self.done, self.clock = predict, stream, batches, 0, Clock()
        if router is not None:
            router.assign = noting(self.clock, "router", router.assign, "models")

    @torch.no_grad()
    def turn(self) -> Parts:
        """Seconds; ``models`` is all but the router and selecting rows."""
        self.clock.start()
        with mock.patch.object(routed, "select", noting(self.clock, "selecting rows", routed.select, "models")):
            for _ in range(self.batches):
                self.predict(self.stream.batch(self.done))
                self.done += 1
        self.clock.note("models")
        return {**self.clock.parts, "whole": sum(self.clock.parts.values())}


def inference(args: argparse.Namespace, context: Context) -> None:
    """A test set in memory through one model and through routers and group models."""
    for hidden in args.hidden:
        run = make_run(args, context, hidden)
        stream, batches = Made(run.schema, args.eval_batch), -(-args.rows // (args.eval_batch * args.rounds))
        plain = SubnetTask(run.config, Allocation.uniform(run.schema, WIDTH), context)
        plain.model.eval()
        groups = [group_model(run, seed) for seed in (1, 2)]
        sides, shares = {PLAIN: Predictor(plain.predict, stream, batches, None)}, []
        routers: dict[str, Any] = {"centre": centre_router(run, stream), "field": field_router(run)}
        for name, router in routers.items():
            shares.append(f"{float(router.assign(stream.batch(0)).double().mean()):.0%}")
            model = RoutedModel(router, groups, run.schema, context).eval()
            sides[f"iHAS, {name} router"] = Predictor(model, stream, batches, router)
        found = in_turns({name: side.turn for name, side in sides.items()}, args.rounds, args.seconds)
        first, rows = found[PLAIN], batches * args.eval_batch
        print(f"{headline('inference', args, hidden, args.eval_batch)}, {len(first)} turns of {rows:,} rows")
        print(f"group 1 of 2 has {' and '.join(shares)} of the rows; without reading rows and computing AUC\n")
        names, lines = ("router", "selecting rows", "models"), []
        for name, turns in found.items():
            seconds = spread([t["whole"] / rows * args.rows for t in turns], ".2f")
            parts = [f"{median_of(turns, n) / rows * args.rows:.2f}" if n in turns[0] else "" for n in names]
            rate = spread([rows / t["whole"] for t in turns], ",.0f")
            lines.append([name, seconds, rate, ratio(first, turns), *parts])
        table(["side", f"s for {args.rows:,} rows", "rows/s", "ratio", *(f"{n} s" for n in names)], lines)


PARTS = {"search": search, "threshold": threshold, "inference": inference}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=PARTS, help="all by default")
    parser.add_argument("--table-rows", type=int, default=1_100_000, help="rows of all tables of a model together")
    parser.add_argument("--batch", type=int, default=4096, help="rows of a training step")
    parser.add_argument("--eval-batch", type=int, default=8192, help="rows of a batch of threshold and inference")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the test set")
    parser.add_argument("--hidden", nargs="+", default=["16-8", "400-400-400"], help="MLPs, hidden layers by dashes")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of the MLP's products")
    parser.add_argument("--every", type=int, default=100, help="steps to one outer step")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each side at most; 2 or more")
    parser.add_argument("--steps", type=int, default=5, help="training steps of a turn")
    parser.add_argument("--seconds", type=float, default=60, help="after which a table begins no further round")
    args = parser.parse_args(argv)
    args.hidden = [[int(n) for n in layers.split("-")] for layers in args.hidden]
    config = make_config(args, args.hidden[0])
    with start(config.run, config.dist) as context:
        for name in [args.what] if args.what else PARTS:
            PARTS[name](args, context)


if __name__ == "__main__":
    main()
