"""Checks 7 and 11: how often a training step waits for the device, and how many kernels it starts.

On a GPU torch itself warns of every wait (``set_sync_debug_mode``) and its profiler counts kernels. The pretend device
counts both, copies from memory that is not pinned among the waits, as they are on a card.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.methods.ihas.gates_stage import GatesTask
from embsearch_dist.methods.nasrec.supernet_stage import SupernetTask as NetworkTask
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.retrain import SubnetTask
from tools.gpucheck.facts import ROOT
from tools.gpucheck.lab import Lab
from tools.gpucheck.steps import Enough, train
from tools.gpucheck.worker import Skip

WARM, COUNTED = 3, 4
MOST_SYNCS = {"retrain": 2, "adass": 2, "ihas": 2, "nasrec": 3}
"""Waits of a step; more than these are a regression."""
MOST_KERNELS = {"pretend": {"drawn": 145, "whole": 340}, "cuda": {"drawn": 1200, "whole": 2400}}
"""Of a step: in the tiny space of the pretend device, and in NASRec's full one."""
MODEL = ["model.hidden=[32,16]", "model.unified_width=16", "optim.embedding=rowwise_adagrad"]


class Traffic:
    """What a piece of work did to the device: waits by file and line, and kernels."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        self.kernels = 0


@contextmanager
def counted_syncs(lab: Lab) -> Iterator[Traffic]:
    """Count the waits inside, on the GPU or on the pretend device."""
    found = Traffic()
    if lab.kind == "pretend":
        from tools.pretend import watching

        with watching() as seen:
            yield found
        found.syncs.update({f"{what} {place}": n for (what, place), n in seen.syncs.items()})
        found.kernels = seen.kernels
        return
    before = warnings.showwarning

    def note(message: Any, *rest: Any, **more: Any) -> None:
        if "synchroniz" in str(message):
            found.syncs[calling_line()] += 1
        else:
            before(message, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def calling_line() -> str:
    """``file:line`` of the innermost call of the project on the stack; of whoever warned, where there is none."""
    own, others = ROOT / "embsearch_dist", (__file__, warnings.__file__)
    stack = [f for f in traceback.extract_stack() if f.filename not in others]
    inside = [f for f in stack if Path(f.filename).is_relative_to(own)]
    frame = (inside or stack)[-1]
    name = Path(frame.filename)
    return f"{name.relative_to(ROOT) if inside else name.name}:{frame.lineno}"


@contextmanager
def counted_kernels(lab: Lab) -> Iterator[Traffic]:
    """Count the kernels started inside; without a device the operators that autograd and the models call."""
    if lab.kind == "pretend":
        with counted_syncs(lab) as found:
            yield found
        return
    found = Traffic()
    kinds = [torch.profiler.ProfilerActivity.CUDA if lab.real else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        yield found
        if lab.real:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if lab.real else torch.autograd.DeviceType.CPU
    events = [e for e in profile.events() if e.device_type == wanted]
    copies = ("Memcpy", "Memset")
    found.kernels = sum(not e.name.startswith(copies) for e in events if lab.real or e.name.startswith("aten::"))


def tasks(lab: Lab, context: Context) -> Iterator[tuple[str, Any, Any]]:
    """Name, task and run of every kind of training step. iHAS selects from the first step on; no outer step is due."""
    run = lab.run(context, *MODEL)
    yield "retrain", SubnetTask(run.config, Allocation.uniform(run.schema, 16), context), run
    run = lab.run(context, *MODEL, "search.candidates=[0,2,4,16]", method="adass")
    yield "adass", SupernetTask(run, 100_000), run
    outer = ["search.outer.pretrain_epochs=0", "search.outer.every=1000", "search.width=16"]
    run = lab.run(context, *MODEL, *outer, "search.training.batch_size=128", method="ihas")
    yield "ihas", GatesTask(run, run.config.search, training=True), run
    yield "nasrec", *network(lab, context, warmup=0.0)


def network(lab: Lab, context: Context, warmup: float) -> tuple[Any, Any]:
    """NASRec's supernet; with ``warmup`` 1 its first step trains all of it, with 0 none does."""
    own = [
        *lab.network_space("full"),
        f"search.sampling.warmup={warmup}",
        "optim.dense=adagrad",
        "optim.dense_lr=0.001",
    ]
    run = lab.run(context, *MODEL, *own, method="nasrec")
    return NetworkTask(run, 1_000_000), run


def syncs(lab: Lab) -> None:
    """Waits of a step in a training from files, the loader's copies included."""
    if lab.kind == "cpu":
        raise Skip("a CPU waits for nothing")
    with lab.opened() as context:
        over = []
        for name, task, run in tasks(lab, context):
            found = watched_steps(lab, task, run, context, name)
            each = sum(found.syncs.values()) / COUNTED
            lines = {place: n / COUNTED for place, n in found.syncs.most_common()}
            lab.note(**{name: each, f"{name}_lines": lines})
            if each > MOST_SYNCS[name]:
                over.append(
                    f"{name} waits {each:g} times a step (at most {MOST_SYNCS[name]}), first at {next(iter(lines))}"
                )
        lab.expect(not over, "; ".join(over))


def watched_steps(
    lab: Lab, task: Any, run: Any, context: Context, name: str, counted: Callable[[Lab], Any] = counted_syncs
) -> Traffic:
    """The traffic of some steps in the middle of a training."""
    found: list[Any] = []

    def done(step: int) -> None:
        if step == WARM:
            found.append(counted(lab))
            found.append(found[0].__enter__())
        if step == WARM + COUNTED:
            found[0].__exit__(None, None, None)
            raise Enough

    train(task, run.config, run.stream("train", 128, shuffle=True), context, lab.folder / name, done)
    return found[1]  # type: ignore[no-any-return]


def launches(lab: Lab) -> None:
    """Kernels of a step, the optimizers' included: of networks as they are drawn, and of the whole supernet."""
    with lab.opened() as context:
        over = []
        for name, warmup in (("drawn", 0.0), ("whole", 1.0)):
            task, run = network(lab, context, warmup)
            each = watched_steps(lab, task, run, context, name, counted_kernels).kernels / COUNTED
            lab.note(**{f"{name}_{'operators' if lab.kind == 'cpu' else 'kernels'}": each})
            lab.expect(each > 10, f"{name}: {each} kernels in a step, so nothing was counted")
            most = MOST_KERNELS.get(lab.kind, {}).get(name)
            if most is not None and each > most:
                over.append(f"{name}: {each:.0f} kernels in a step, at most {most}")
        lab.expect(not over, "; ".join(over))
