"""The benchmark of the gates: its steps are those of a search, and it prints a comparison for each part."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.ihas.gates import deterministic
from embsearch_dist.methods.ihas.gates_stage import GatesTask
from embsearch_dist.train.retrain import SubnetTask
from tests.factories import one_rank
from tools.bench.gates import Learner, Passes, make_run

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench" / "gates.py"
SIZES = ["--table-rows", "3000", "--batch", "64", "--eval-batch", "64", "--rows", "400", "--hidden", "8-4"]
SMALL = Namespace(precision="float32", batch=64, every=3, steps=2, table_rows=3000)
STEP = {"batch", "look-up", "forward", "backward", "checks", "tables", "dense update", "whole"}
GATES = {"noise", "W e", "mask", "multiply", "outer step"}


def run(*words: str) -> list[list[list[str]]]:
    """Tables -> lines -> cells."""
    command = [sys.executable, "-W", "ignore", str(TOOL), *words, *SIZES, "--rounds", "2", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    blocks = [b.splitlines() for b in done.stdout.split("\n\n") if b.lstrip().startswith("|")]
    return [[line.strip("| ").split(" | ") for line in b if line.startswith("|")] for b in blocks]


def column(lines: list[list[str]], name: str) -> list[float]:
    """The medians of a column."""
    place = next(i for i, head in enumerate(lines[0]) if head.startswith(name))
    return [float(line[place].split(" ")[0].replace(",", "")) for line in lines[2:]]


@pytest.mark.slow  # a process that loads torch and builds eleven models
def test_three_parts_with_rates_and_ratios() -> None:
    search, gates, threshold, inference = run()
    assert [line[0] for line in search[2:]] == ["UES-16", "iHAS search, gates on", "AdaFS-soft search"]
    assert "aim for iHAS: >= 0.6" in search[0][2]
    assert column(search, "ratio")[0] == 1 and all(r > 0 for r in column(search, "samples/s"))
    assert [line[0].split(",")[0] for line in gates[2:]][:5] == ["noise", "W e", "mask", "multiply", "backward"]
    assert gates[-1][0] == "outer step / 100" and all(ms > 0 for ms in column(gates, "ms")[:4])
    assert [line[0] for line in threshold[2:]][1:5] == ["sigmoid", "histogram", "mask", "scan"]
    assert all(ms > 0 for ms in column(threshold, "ms"))
    assert [line[0] for line in inference[2:]] == ["UES-16", "iHAS, centre router", "iHAS, field router"]
    assert all(r > 0 for r in column(inference, "rows/s") + column(inference, "ratio"))
    whole, router, picking, models = (
        column([inference[0], [], *inference[3:]], name) for name in ("s for", "router", "selecting", "models")
    )
    assert len(whole) == 2 and all(min(p) >= 0 for p in (router, picking, models))


def test_a_turn_has_all_parts_and_trains_what_a_search_trains() -> None:
    made = make_run(SMALL, one_rank(), [8, 4])
    plain = SubnetTask(made.config, Allocation.uniform(made.schema, 16), made.context)
    gated = GatesTask(made, made.config.search, training=True)
    for task, parts in ((plain, STEP), (gated, STEP | GATES)):
        learner = Learner(task, made, SMALL)
        model = task.model
        before = [p.detach().clone() for p in model.replicated.parameters() if p.requires_grad]
        tables = [s.tensor.clone() for s in model.sharded.local_shards()]
        found = learner.turn()
        assert set(found) == parts and all(seconds > 0 for seconds in found.values())
        after = [p for p in model.replicated.parameters() if p.requires_grad]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        now = [s.tensor for s in model.sharded.local_shards()]
        assert not any(torch.equal(a, b) for a, b in zip(tables, now, strict=True))


def test_the_selector_learns_in_outer_steps_alone() -> None:
    made = make_run(SMALL, one_rank(), [8, 4])
    task = GatesTask(made, made.config.search, training=True)
    learner = Learner(task, made, SMALL)
    before = [p.detach().clone() for p in task.model.outer_parameters]
    learner.step()
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.outer_parameters, strict=True))
    learner.outer_step()
    assert not any(torch.equal(a, b) for a, b in zip(before, task.model.outer_parameters, strict=True))


def test_passes_over_all_probabilities_fall_to_their_part() -> None:
    logits = torch.randn(4000, 48)
    with Passes(48) as passes:
        watched = deterministic(logits, 20, 0.5)
    assert torch.equal(watched, deterministic(logits, 20, 0.5))
    assert all(seconds > 0 for seconds in passes.seconds.values())
