"""What a training step asks of the device, method by method: kernels, operators, host waits and copies.

    python -m tools.pretend.count                              all sides, averages over 6 steps after 3 to warm up
    python -m tools.pretend.count retrain nasrec --steps 20    some sides
    python -m tools.pretend.count adass --norm field --set optim.embedding=rowwise_adagrad

The steps are those of the project's own Trainer, over random rows (14 fields of one id, two dense columns), one rank,
on the pretend device; a step reaches from the end of one to the end of the next, so what is fetched ahead is counted
once. No evaluation, checkpoint or update of sampling probabilities falls into them. Prints each place by file and line.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.methods import CONFIGS
from embsearch_dist.methods.adafs.method import AdaFSTask
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.methods.ihas.gates_stage import GatesTask
from embsearch_dist.methods.nasrec import supernet_stage as nasrec
from embsearch_dist.networks.space import full
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer
from tools.pretend import Counts, install, watching

SMALL = ["model.hidden=[16,8]", "model.unified_width=8", "run.device=cuda", "run.threads=1", "run.dir=not-written"]
NASREC_SPACE = ["search.space.blocks=4", "search.space.dense_widths=[16,32,64]", "search.space.sparse_widths=[8,16]"]
WARM_UP, FIELDS, DENSE = 3, 14, 2


@dataclass(frozen=True)
class Side:
    """One kind of step: a method, what its config has beside :data:`SMALL`, and where its training settings lie."""

    method: str
    overrides: tuple[str, ...] = ()
    section: str = "search.training"
    whole: bool = False


GATED = ("search.outer.pretrain_epochs=0",)
ADASS = ("search.candidates=[0,4,8]", "search.sampling.update_every=100000")
NASREC = (*NASREC_SPACE, "search.sampling.warmup=0", "optim.dense=adagrad")
SIDES = {
    "retrain": Side("ues", section="train"),
    "adass": Side("adass", ADASS, "search.supernet"),
    "adass-field": Side("adass", (*ADASS, "model.norm=field"), "search.supernet"),
    "adass-width": Side("adass", (*ADASS, "model.norm=width"), "search.supernet"),
    "ihas": Side("ihas", (*GATED, "search.outer.every=100000")),
    "ihas-outer": Side("ihas", (*GATED, "search.outer.every=1")),
    "adafs": Side("adafs", (*GATED, "search.outer.every=100000")),
    "adafs-outer": Side("adafs", (*GATED, "search.outer.every=1")),
    "nasrec": Side("nasrec", NASREC, "search.supernet"),
    "nasrec-whole": Side("nasrec", NASREC, "search.supernet", whole=True),
}


def count(name: str, data: Path, context: Context, steps: int, overrides: Sequence[str] = ()) -> Counts:
    """The counts of ``steps`` steps of a side, after :data:`WARM_UP` that nobody counts; the device is installed."""
    side = SIDES[name]
    total, given = WARM_UP + steps, [*SMALL, f"data.path={data}", *side.overrides]
    given += [f"{side.section}.{key}" for key in (f"steps={total + 1}", "epochs=1", "batch_size=64", "log_every=1")]
    config = load_config(CONFIGS, None, [*given, *overrides], side.method)
    run = Run(config, Schema.load(data), context)
    training: TrainConfig = config.train if side.section == "train" else getattr(config.search, side.section[7:])
    task = make_task(side, run, total)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:  # the monitor writes as it closes
        if side.whole:
            whole = full(config.search.space.make())
            stack.enter_context(mock.patch.object(nasrec, "training_architecture", lambda *_: whole))
        monitor = stack.enter_context(Monitor(folder, "count", 0, quiet=True))
        stream = run.stream("train", training.batch_size, shuffle=True)
        trainer = Trainer(task, training, config.optim, stream, None, context, monitor, Path(folder, "checkpoints"))
        found = stack.enter_context(_steps(task, total))
        trainer.fit()
        if hasattr(task, "close"):
            task.close()
    return found


@contextlib.contextmanager
def _steps(task: Any, total: int) -> Iterator[Counts]:
    """Watch from the end of step :data:`WARM_UP` to that of step ``total``."""
    counts, after, watch = Counts(), task.after_step, contextlib.ExitStack()

    def after_step(step: int, monitor: Monitor) -> None:
        after(step, monitor)
        if step == WARM_UP:
            found = watch.enter_context(watching())
            counts.__dict__.update(found.__dict__)
            watch.callback(lambda: counts.__dict__.update(found.__dict__))
        elif step == total:
            watch.close()

    task.after_step = after_step
    yield counts


def make_task(side: Side, run: Run, total: int) -> Any:
    if side.method == "ues":
        return SubnetTask(run.config, Allocation.uniform(run.schema, 8), run.context)
    if side.method == "adass":
        return SupernetTask(run, total)
    if side.method == "nasrec":
        return nasrec.SupernetTask(run, total)
    kinds: dict[str, Any] = {"ihas": GatesTask, "adafs": AdaFSTask}
    return kinds[side.method](run, run.config.search, training=True)


def make_data(folder: Path, rows: int = 2000) -> Path:
    """A prepared data set of random rows."""
    dice = np.random.default_rng(0)
    columns = {"click": dice.integers(0, 2, rows)}
    columns |= {f"f{i}": dice.integers(0, 20 * (i + 1), rows) for i in range(FIELDS)}
    columns |= {f"x{i}": dice.standard_normal(rows) for i in range(DENSE)}
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(columns).write_csv(folder / "rows.csv")
    kinds = [f"{name}: {'dense' if name[0] == 'x' else 'categorical'}" for name in columns if name != "click"]
    text = f"name: counted\nfiles: rows.csv\nlabel: click\nfields: {{{', '.join(kinds)}}}\n"
    (folder / "rows.yaml").write_text(text)
    prepare("table", folder / "rows.yaml", folder / "out", quiet=True)
    return folder / "out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", help=f"of {', '.join(SIDES)}; none = all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--norm", help="the same as --set model.norm=NORM")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config keys")
    parser.add_argument("--data", type=Path, help="a prepared data set; default: random rows, made anew")
    args = parser.parse_args()
    unknown = sorted(set(args.sides) - set(SIDES))
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SIDES)}")
    overrides = [*args.set, *([f"model.norm={args.norm}"] if args.norm else [])]
    config = load_config(CONFIGS, None, SMALL, "ues")
    install()
    with tempfile.TemporaryDirectory() as folder, start(config.run, config.dist) as context:
        data = args.data or make_data(Path(folder))
        lines = ["| side | operators | kernels | syncs | copies | syncs + copies |", "| --- " * 6 + "|"]
        for name in args.sides or SIDES:
            torch.manual_seed(0)
            counts = count(name, data, context, args.steps, overrides)
            print(f"{name}: per step, over {args.steps} steps\n{counts.per(args.steps)}\n", flush=True)
            totals = (counts.operators, counts.kernels, counts.syncs.total(), counts.copies.total())
            cells = [f"{n / args.steps:.4g}" for n in (*totals, counts.syncs_and_copies)]
            lines.append(f"| {' | '.join([name, *cells])} |")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
