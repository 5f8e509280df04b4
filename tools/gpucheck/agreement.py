"""Check 6: a training step on the device and the same one on the CPU, from equal weights, give the same numbers.

Loss, gradients of the dense part and, after the step, the tables. Every method's task, the norms of the supernet, DLRM
and bfloat16; iHAS's gates by themselves, since a GPU draws other random numbers for them than the CPU does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.dataset import BatchMaker
from embsearch_dist.methods.adafs.method import AdaFSTask
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.methods.ihas.gates import BernoulliGates, deterministic, regulariser, straight_through
from embsearch_dist.methods.nasrec.supernet_stage import SupernetTask as NetworkTask
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.train.retrain import SubnetTask
from tools.gpucheck.data import random_rows
from tools.gpucheck.lab import Lab

FLOAT32, BFLOAT16 = 2e-4, 3e-2  # of the largest number of its kind
SIZES = ["model.hidden=[32,16]", "model.unified_width=16", "optim.embedding=sgd", "optim.embedding_lr=1.0"]
SIZES += ["model.init_std=0.3"]
Make = Callable[[Run], Any]


def uniform(run: Run) -> SubnetTask:
    """Width 16 everywhere."""
    return SubnetTask(run.config, Allocation.uniform(run.schema, 16), run.context)


def mixed(run: Run) -> SubnetTask:
    """Widths that differ from field to field."""
    widths = {n: (4, 8, 6, 16)[k % 4] for k, n in enumerate(run.schema.names)}
    return SubnetTask(run.config, Allocation(run.schema, widths), run.context)


def cases(lab: Lab) -> dict[str, tuple[str, list[str], Make, float]]:
    """Name -> method, settings, task, tolerance."""
    candidates = ["search.candidates=[0,2,4,16]"]
    found: dict[str, tuple[str, list[str], Make, float]] = {
        "deepfm": ("ues", [], uniform, FLOAT32),
        "deepfm_bf16": ("ues", ["model.precision=bfloat16"], uniform, BFLOAT16),
        "mixed": ("ues", ["model.norm=field"], mixed, FLOAT32),
        "dlrm": ("ues", ["model.backbone=dlrm", "model.bottom=[16]"], uniform, FLOAT32),
    }
    for norm in ("none", "field", "width"):
        own = [f"model.norm={norm}", *candidates]
        found[f"supernet_{norm}"] = ("adass", own, SupernetTask, FLOAT32)
    adafs = ["search.width=16", "search.dropout=0.0", "search.outer.pretrain_epochs=0"]
    found["adafs"] = ("adafs", adafs, lambda run: AdaFSTask(run, run.config.search, training=True), FLOAT32)
    found["nasrec"] = ("nasrec", [*lab.network_space(), "optim.dense=adagrad"], NetworkTask, FLOAT32)
    return found


def devices(lab: Lab) -> None:
    """All cases, each on both devices."""
    with lab.opened() as context:
        cpu = Context(0, 1, torch.device("cpu"))
        worst: dict[str, tuple[float, float]] = {}
        for name, (method, own, make, tolerance) in cases(lab).items():
            run = lab.run(context, *SIZES, *own, method=method)
            batch = batch_of(run)
            here = step(make(run), batch, context)
            there = step(make(Run(run.config, run.schema, cpu)), batch, cpu)
            worst[name] = (max(apart(a, b) for a, b in zip(here, there, strict=True)), tolerance)
            lab.note(**{name: worst[name][0]})
        worst["gates"] = (gates(lab), FLOAT32)
        lab.note(gates=worst["gates"][0])
        bad = [f"{name} {found:.2g}" for name, (found, tolerance) in worst.items() if not found <= tolerance]
        lab.expect(not bad, f"device and CPU disagree: {', '.join(bad)}")


def batch_of(run: Run, rows: int = 256) -> Batch:
    """Random rows of the run's schema, on the CPU."""
    return BatchMaker(run.schema)(random_rows(run.schema, rows, 3), Position(0, 1))


def step(task: Any, batch: Batch, context: Context) -> list[torch.Tensor]:
    """Loss, gradients that the dense optimizer would use, and the tables after their own step; on the CPU."""
    model = task.model
    model.train()
    model.sharded.zero_grad()
    loss = task.loss(batch.to(context.device), 7)
    loss.backward()
    gradients = [w.grad.flatten() for w in model.after_backward() if w.grad is not None]
    model.sharded.step()
    tables = [s.tensor for s in model.sharded.local_shards()]
    found = [loss.reshape(1), torch.cat(gradients), *tables]
    return [x.detach().float().cpu() for x in found]


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number; infinite if shapes differ or nothing is there."""
    if found.shape != wanted.shape or not found.numel():
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def gates(lab: Lab) -> float:
    """Gates of 40 columns with given random numbers: sampled masks, regulariser, gradients, thresholds."""
    generator = torch.Generator().manual_seed(5)
    e, uniform = (torch.rand(512, 40, generator=generator) for _ in range(2))
    weight = torch.randn(40, 40, generator=generator)
    found = []
    for device in (lab.device, torch.device("cpu")):
        selector = BernoulliGates(40, False, 0.5).to(device)
        with torch.no_grad():
            selector.linear.weight.copy_(weight)
        logits = selector(e.to(device))
        mask = straight_through(logits, uniform.to(device), 0.5)
        loss = (mask * e.to(device)).square().mean() + regulariser(torch.sigmoid(logits), 0.1, 0.1)
        loss.backward()
        fixed = deterministic(logits, 20, 0.5).float()
        gradients = [p.grad.flatten() for p in selector.parameters() if p.grad is not None]
        # A number on the edge of a bin may fall to either side.
        found.append([x.detach().cpu() for x in (loss.reshape(1), torch.cat(gradients), mask.mean(0), fixed.mean(0))])
    return max(apart(a, b) / (100 if k > 1 else 1) for k, (a, b) in enumerate(zip(*found, strict=True)))
