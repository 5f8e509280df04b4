"""Checks 13 and 14: what checkpoints and files cost a training."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from embsearch_dist.allocation import Allocation
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.retrain import SubnetTask
from tools.gpucheck.data import Resident, criteo_schema, make_prepared
from tools.gpucheck.lab import Lab
from tools.gpucheck.speed import CAP, deepfm, uniform
from tools.gpucheck.steps import Enough, step_times, train


def stall(lab: Lab) -> None:
    """Seconds that the step with a checkpoint takes longer than the others; the checkpoint must be whole."""
    with lab.opened() as context:
        _, config = deepfm(lab)
        schema = criteo_schema(lab.pick(CAP, 1_000_000))
        stream = Resident(schema, lab.pick(64, 16384), 2, lab.device)
        # A second save at twice this step: the first one also takes the memory that later ones use again. On a GPU the
        # first must be on the disk by then.
        every = lab.pick(8, 250)
        for name, behind in (("at_once", False), ("behind", True)):
            task, marks, folder = uniform(schema, config, context), lab.marks(), lab.folder / name

            def done(step: int, marks: Any = marks) -> None:
                marks.mark()
                if step == 2 * every + 6:
                    raise Enough

            train(task, config, stream, context, folder, done, save_every=every, async_save=behind)
            times = marks.seconds()  # the first is that of step 2; the save comes after the mark of its step
            plain, first, second = statistics.median(times), times[every - 1], times[2 * every - 1]
            root = folder / "checkpoints" / f"step-{every}"
            lab.expect((root / "manifest.json").exists(), f"{name}: no whole checkpoint of step {every}")
            lab.note(**{f"first_stall_{name}_ms": 1000 * (first - plain), f"stall_{name}_ms": 1000 * (second - plain)})
            lab.note(**{f"step_{name}_ms": 1000 * plain})
            lab.note(checkpoint_MB=size_of(root) / 1e6)
            bytes_of = sum(s.tensor.nbytes for s in task.model.sharded.local_shards())
            lab.expect(size_of(root) >= bytes_of, f"{name}: the checkpoint is smaller than the tables")


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def loader(lab: Lab) -> None:
    """Rows/s from files beside rows/s from batches on the device, the same model and batch size, in one process."""
    with lab.opened() as context:
        size, steps = lab.pick(64, 16384), lab.pick(6, 25)
        _, config = deepfm(lab)
        if lab.given:
            data = lab.prepared()
        else:
            cap = lab.pick(CAP, 100_000)
            rows = {"train": size * (steps + 4), "validation": size, "test": size}
            data = make_prepared(lab.folder / "criteo", criteo_schema(cap), rows)
        config.data.path = str(data)
        run = Run(config, Schema.load(data), context)
        task = SubnetTask(config, Allocation.uniform(run.schema, 16), context)
        files = run.stream("train", size, shuffle=True)
        # Behind the last batch of an epoch comes a checkpoint, which is not to be timed here.
        steps = min(steps, files.batches_per_epoch - 4)
        lab.expect(steps >= 2, f"{data}: an epoch has {files.batches_per_epoch} batches of {size} rows, too few")
        fed = step_times(lab, task, config, files, context, steps)
        lying = step_times(lab, task, config, Resident(run.schema, size, 2, lab.device), context, steps)
        rates = {n: size * len(t) / sum(t) for n, t in (("files", fed), ("resident", lying))}
        lab.note(
            **{f"{n}_rows_per_s": rate for n, rate in rates.items()},
            files_to_resident=rates["files"] / rates["resident"],
        )
