"""Checks 3, 4 and 5: whole trainings and the entry scripts, on a small prepared data set."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from embsearch_dist.allocation import Allocation
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer
from tools.gpucheck.facts import ROOT
from tools.gpucheck.lab import Lab, script
from tools.gpucheck.worker import Wrong

MODEL = ["model.hidden=[16,8]", "model.unified_width=8", "optim.embedding_lr=0.05", "optim.dense_lr=0.01"]
SEARCH = ["search.candidates=[2,4,8]", "search.sampling.update_every=3", "search.policy.steps=6"]
SEARCH += [f"search.policy.{k}" for k in ("batch=4", "model_width=8", "heads=2", "layers=1")]
RESUMED = 1e-5  # of a loss and of a table; what is continued does the same operations in the same order
STEPS, STOP = 12, 6


def schedule(prefix: str, *more: str) -> list[str]:
    """Settings of a short training whose every step is recorded."""
    own = ["batch_size=128", "eval_batch_size=200", "epochs=1", "log_every=1", "patience=0", *more]
    return [f"{prefix}.{word}" for word in own]


def options(overrides: Sequence[str]) -> list[str]:
    """Overrides as the words of a command line."""
    return [f"--{word}" for word in overrides]


def recorded(folder: Path, stage: str) -> list[float]:
    """The losses of a stage, step by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] if r["loss"] is not None else math.nan for r in lines if r["stage"] == stage and "loss" in r]


def resume(lab: Lab) -> None:
    """Stopped after half of the steps and continued by a new process's objects; evaluated in between, which must not
    count. Losses of the second half and all tables are compared with a training that was never stopped."""
    bad = []
    with lab.opened() as context:
        for optimizer in ("adam", "adagrad"):
            unbroken = fit(lab, context, optimizer, "unbroken", STEPS)
            fit(lab, context, optimizer, "stopped", STOP)
            continued = fit(lab, context, optimizer, "stopped", STEPS)
            losses = [recorded(lab.folder / f"{optimizer}-{name}", "check") for name in ("unbroken", "stopped")]
            lab.expect(all(len(x) == STEPS for x in losses), f"{optimizer}: {[len(x) for x in losses]} steps recorded")
            worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
            tables = max(abs(unbroken[n] - continued[n]) / max(1.0, abs(unbroken[n])) for n in unbroken)
            lab.note(**{f"{optimizer}_losses_apart": worst, f"{optimizer}_tables_apart": tables})
            if not (worst <= RESUMED and tables <= RESUMED):
                bad.append(f"{optimizer}: losses {worst:.2g} and tables {tables:.2g} apart after the resume")
    lab.expect(not bad, "; ".join(bad))


def fit(lab: Lab, context: Context, optimizer: str, name: str, steps: int) -> dict[str, float]:
    """Train up to ``steps``, from where the checkpoint under this name stands; sum of squares of each table."""
    run = lab.run(context, *MODEL, *schedule("train", f"steps={steps}", "epochs=9"), f"optim.embedding={optimizer}")
    task = SubnetTask(run.config, Allocation.uniform(run.schema, 8), context)
    train, folder = run.config.train, lab.folder / f"{optimizer}-{name}"
    streams = run.stream("train", train.batch_size, True), run.stream("validation", train.eval_batch_size, False)
    with Monitor(folder, "check", 0, quiet=True) as monitor:
        Trainer(task, train, run.config.optim, *streams, context, monitor, folder / "checkpoints").fit()
    return {s.table.name: float(s.tensor.double().square().sum()) for s in task.model.sharded.local_shards()}


def evaluate(lab: Lab) -> None:
    """The entry scripts in a row, then the project's own tests for a GPU."""
    from launch import evaluate as measuring
    from launch import retrain, search

    data, run = lab.prepared(), lab.folder / "run"
    overrides = [f"data.path={data}", f"run.dir={run}", f"run.device={lab.where}", *MODEL, *SEARCH]
    overrides += [*schedule("search.supernet", "steps=16"), *schedule("train", "steps=12")]
    config = lab.folder / "config.yaml"
    config.write_text(lab.config(*overrides, method="adass").to_yaml())
    printed = script(search.main, "--config", config)
    lab.expect(f"on {lab.where}" in printed or lab.kind != "cuda", "search.py does not say that it ran on cuda")
    losses = recorded(run, "supernet")
    lab.expect(len(losses) == 16 and all(map(math.isfinite, losses)), f"losses of the supernet: {losses}")
    script(retrain.main, "--run", run, "--name", "short")
    own = run / "retrain" / "short"
    trained = json.loads((own / "evaluation.json").read_text())["auc"]
    again = json.loads(script(measuring.main, "--run", own))["auc"]
    on_cpu = json.loads(script(measuring.main, "--run", own, "--run.device", "cpu"))["auc"]
    lab.note(auc=trained, again_apart=abs(again - trained), cpu_apart=abs(on_cpu - trained))
    lab.close("AUC of evaluate.py", again, trained, 1e-6)
    lab.close("AUC of evaluate.py on the CPU", on_cpu, trained, 1e-4)
    lab.expect(
        "continuing" in script(retrain.main, "--run", run, "--name", "short"), "a second start does not continue"
    )
    if lab.real:
        run_tests(lab)


def run_tests(lab: Lab) -> None:
    """``pytest tests/gpu`` in the time that is left."""
    missing = [m for m in ("pytest", "pytest_timeout") if importlib.util.find_spec(m) is None]
    if missing:
        lab.note(tests_gpu=f"not run, {missing[0]} is not installed; the scripts above do the same")
        return
    left = lab.left() - 2
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, left))
    except subprocess.TimeoutExpired as e:
        raise Wrong(f"tests/gpu: not done in {left:.0f} s") from e
    print(done.stdout, done.stderr)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "printed nothing"
    lab.note(tests_gpu=last)
    lab.expect(done.returncode == 0, f"tests/gpu: {last}")


def methods(lab: Lab) -> None:
    """20 training steps of each search that is not AdaS&S, to the files that its last stage leaves."""
    from launch import search

    data, gated = lab.prepared(), ["search.outer.pretrain_epochs=0.2", "search.outer.every=4", "search.width=8"]
    gated += schedule("search.training", "steps=20", "epochs=2")
    nasrec = [*lab.network_space(), *schedule("search.supernet", "steps=20")]
    nasrec += ["optim.dense=adagrad", "optim.dense_lr=0.001"]
    nasrec += [f"search.scoring.{k}" for k in ("rows=400", "tune_rows=256", "tune_steps=5", "tune_batch=64")]
    nasrec += [f"search.evolution.{k}" for k in ("population=4", "generations=2", "parents=2", "children=2", "keep=2")]
    sides: dict[str, tuple[str, list[str], str]] = {
        "ihas": ("gates", gated, "groups.json"),
        "nasrec": ("supernet", nasrec, "architecture.json"),
        "adafs": ("controller", gated, "retrain/adafs-soft/evaluation.json"),
    }
    for method, (stage, own, result) in sides.items():
        run = lab.folder / method
        overrides = [f"data.path={data}", f"run.dir={run}", f"run.device={lab.where}", *MODEL, *own]
        config = lab.folder / f"{method}.yaml"
        config.write_text(lab.config(*overrides, method=method).to_yaml())
        script(search.main, "--config", config)
        losses = recorded(run, stage)
        lab.note(**{f"{method}_first_loss": losses[0], f"{method}_last_loss": losses[-1]})
        lab.expect(len(losses) >= 20, f"{method}: {len(losses)} of 20 steps recorded")
        # A network that is drawn for the first time may be far off; most of them are not.
        fine = all(map(math.isfinite, losses)) and statistics.median(losses) < 1.5
        lab.expect(fine, f"{method}: losses {losses}")
        lab.expect((run / result).exists(), f"{method}: the search left no {result}")
