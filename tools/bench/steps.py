"""One side of a training benchmark: builds a model, then runs as many steps as it is told. See train.py.

    echo 20 | python tools/bench/steps.py '{"kind": "ues", "width": 16, "rows": 230000}'

Reads a number of steps per line, answers each with one line of JSON: seconds of every step, of each of its parts
(look-up, forward, backward, update, feeding) and this process's peak memory. Ranks of one benchmark are started
with torchrun's environment variables and get the same lines.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation too

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.dataset import BatchMaker
from embsearch_dist.data.planted.criteo_like import CATEGORIES, NUMBERS
from embsearch_dist.kernels import linear as dense
from embsearch_dist.methods import METHODS
from embsearch_dist.models.model import SubnetModel, SupernetModel
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.schema import Field, Schema
from embsearch_dist.train.guard import Gate, agree
from tools.bench.clock import now

# Criteo's 13 bucketed integers, about 50 values each, and 26 categories.
CRITEO = [50] * len(NUMBERS) + [c.published for c in CATEGORIES]
BATCHES = 24
Step = Callable[[int], dict[str, float]]


def cardinalities(rows: int) -> list[int]:
    """Criteo's, the largest cut to one size such that they add up to about ``rows``."""
    low, high = 1, max(CRITEO)
    while low < high:
        cut = (low + high + 1) // 2
        low, high = (cut, high) if sum(min(c, cut) for c in CRITEO) <= rows else (low, cut - 1)
    return [min(c, low) for c in CRITEO]


def make_rows(sizes: list[int], batch: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of ids ``[F, batch]`` int32 with log-uniform ranks (Zipf's law), and labels."""
    dice = np.random.default_rng(seed)
    made = []
    for _ in range(BATCHES):
        ids = np.stack(
            [(np.exp(dice.random(batch) * np.log(c + 1)) - 1).astype(np.int32).clip(0, c - 1) for c in sizes]
        )
        made.append((ids, (dice.random(batch) < 0.25).astype(np.float32)))
    return made


class Made:
    """Batches of one size as a :class:`embsearch_dist.data.load.dataset.BatchStream` gives them, without a disk."""

    def __init__(self, schema: Schema, rows: int) -> None:
        self.made, self.maker = make_rows(schema.cardinalities, rows, 0), BatchMaker(schema)
        self.batches_per_epoch = BATCHES

    def batch(self, number: int) -> Batch:
        ids, label = self.made[number % BATCHES]
        sparse = self.maker.sparse(torch.from_numpy(ids))
        return Batch(torch.zeros(len(label), 0), sparse, torch.from_numpy(label), Position(0, number % BATCHES + 1))

    def epoch(self, epoch: int, start_batch: int | None = None) -> Iterator[Batch]:
        yield from map(self.batch, range(start_batch or 0, BATCHES))

    def weight(self, batch: Batch) -> float:
        """All ranks have as many rows."""
        return 1.0


class Clock:
    """Seconds since the last look, added up under a name; each look waits until ``device`` has done its work."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Forget what was added up."""
        self.parts: dict[str, float] = {}
        self.last = now(self.device)

    def note(self, part: str) -> None:
        moment = now(self.device)
        self.parts[part] = self.parts.get(part, 0.0) + moment - self.last
        self.last = moment


def ours(spec: dict[str, Any], context: Context, config: Config) -> Step:
    """A step of :class:`embsearch_dist.train.trainer.Trainer` on a uniform model or on a supernet."""
    sizes = cardinalities(spec["rows"])
    schema = Schema("benchmark", tuple(Field(f"f{i}", c) for i, c in enumerate(sizes)))
    local = spec["batch"] // context.world_size
    rows, maker = make_rows(sizes, local, context.rank), BatchMaker(schema)
    supernet, candidates = spec["kind"] == "supernet", spec.get("candidates", [2, 8, 16, 32, 64])
    model: Any
    if supernet:
        model = SupernetModel(config, schema, candidates, "shared", context, True)
    else:
        widths = Allocation(schema, dict.fromkeys(schema.names, spec["width"]))
        model = SubnetModel(config, widths, context)
    head = list(model.bare_head.parameters())
    optimizer = torch.optim.Adam(head, lr=1e-3, fused=True)
    gate = Gate(model.sharded)
    gate.__enter__()
    clock = Clock(context.device)
    model.tables.register_forward_hook(lambda *_: clock.note("look-up"))
    everywhere = torch.ones(len(sizes), dtype=torch.bool, device=context.device)
    generator = torch.Generator().manual_seed(0)

    def step(number: int) -> dict[str, float]:
        clock.start()
        ids, label = rows[number % BATCHES]
        batch = Batch(
            torch.zeros(local, 0), maker.sparse(torch.from_numpy(ids)), torch.from_numpy(label), Position(0, 0)
        ).to(context.device)
        clock.note("feeding")
        optimizer.zero_grad()
        model.sharded.zero_grad()
        if supernet:
            choice = torch.randint(len(candidates), (len(sizes),), generator=generator)
            logits, _ = model(batch, choice.to(context.device), everywhere)
        else:
            logits, _ = model(batch)
        loss = binary_cross_entropy_with_logits(logits, batch.label)
        clock.note("forward")
        loss.backward()
        clock.note("backward")
        agree(context, loss, gate.gradients(), head, False)
        clock.note("checks")
        gate.pass_on()
        model.sharded.step()
        clock.note("tables")
        optimizer.step()
        clock.note("dense update")
        return clock.parts

    return step


def torchfm(spec: dict[str, Any]) -> Step:
    """The same step as pytorch-fm's examples/main.py does it: DeepFM, Adam with weight decay on all tables."""
    deepfm = importlib.import_module("torchfm.model.dfm").DeepFactorizationMachineModel
    sizes = cardinalities(spec["rows"])
    rows = make_rows(sizes, spec["batch"], 0)
    made = [(torch.from_numpy(ids.T.astype(np.int64)), torch.from_numpy(label)) for ids, label in rows]
    model = deepfm(np.array(sizes), spec["width"], spec["hidden"], 0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)
    criterion = torch.nn.BCELoss()

    def step(number: int) -> dict[str, float]:
        clock = Clock()
        x, y = made[number % BATCHES]
        loss = criterion(model(x), y)
        clock.note("forward")
        model.zero_grad()
        loss.backward()
        clock.note("backward")
        optimizer.step()
        clock.note("tables")
        return clock.parts

    return step


def main() -> None:
    spec: dict[str, Any] = {"width": 16, "batch": 4096, "hidden": [400, 400, 400], "overrides": [], "onednn": True}
    spec |= json.loads(sys.argv[1])
    for path in spec.get("path", []):
        sys.path.insert(0, path)
    dense.ONEDNN = dense.ONEDNN and spec["onednn"]
    overrides = [f"model.hidden={spec['hidden']}", *spec["overrides"]]
    config = load_config({n: m.config for n, m in METHODS.items()}, None, overrides, "ues")
    with start(config.run, config.dist) as context:
        torch.manual_seed(0)
        step = torchfm(spec) if spec["kind"] == "torchfm" else ours(spec, context, config)
        done = 0
        for line in sys.stdin:
            seconds, parts = [], []
            for _ in range(int(line)):
                begun = now(context.device)
                parts.append(dict(step(done)))
                seconds.append(now(context.device) - begun)
                done += 1
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(json.dumps({"seconds": seconds, "parts": parts, "memory_gib": peak}), flush=True)


if __name__ == "__main__":
    main()
