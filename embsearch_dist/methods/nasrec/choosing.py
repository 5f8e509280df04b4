"""The best candidates of a search, each trained alone, and the one that validation chooses (section 4.3).

A score orders candidates; it is not what they reach. So the published recipe trains the 15 best, compares them on
validation rows and trains the winner again on training and validation rows. The test split is
read once, by the winner.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import Diverged, UserError
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.networks.architecture import read_architecture
from embsearch_dist.ranks.shared import open_shared
from embsearch_dist.run import Run
from embsearch_dist.stores.mirror import below
from embsearch_dist.stores.mirroring import mirroring
from embsearch_dist.train.directories import open_retraining
from embsearch_dist.train.retrain import evaluate_model, load_best, retrain

CHOICE = "choice.json"
VALIDATION = "evaluation-validation.json"


def candidate_files(run_dir: Path, count: int) -> list[Path]:
    """The architectures of ranks 1 to ``count`` that a search has kept.

    Raises:
        UserError: it has kept fewer, or the run directory is of no such search.
    """
    if count < 1:
        raise UserError(f"--best {count}: give the number of candidates to train, at least 1")
    files = [run_dir / "architectures" / f"rank-{k}.json" for k in range(1, count + 1)]
    there = sum(f.exists() for f in files)
    if there < count:
        raise UserError(
            f"--best {count}: {run_dir} holds {there} of the architectures rank-1.json to rank-{count}.json. "
            f"Give fewer, or search for networks with --search.evolution.keep {count}"
        )
    return files


def train_best(
    run: Run,
    allocation: Allocation,
    files: Sequence[Path],
    directory: Path,
    refit: bool,
) -> dict[str, Any]:
    """Train every candidate in a directory of its own, choose, and leave the winner in ``directory``; its evaluation
    on the test split.

    A candidate is trained in ``directory`` with ``-rank-K`` behind its name, as ``retrain.py`` would, and continues if
    it was stopped. One that diverges has lost, and ``choice.json`` says how.

    ``directory`` becomes the winner's: a copy of its training, or with ``refit`` a training of its own
    on training and validation rows, for the steps after which validation was best. ``choice.json`` there says why.

    Args:
        run: its config is that of the candidates but for ``model.architecture`` and ``run.dir``; its mirror is that of
            the search's run directory, below which each training has its own.
        files: their architectures, best first.

    Raises:
        UserError: a directory holds another training, all candidates have diverged, or what training raises.
    """
    context, found = run.context, []
    for rank, file in enumerate(files, 1):
        own = directory.with_name(_name(directory.name, rank))
        if context.rank == 0:
            print(f"candidate {rank} of {len(files)} -> {own}", flush=True)
        one = _run_of(run, file, own)
        with mirroring(one.config, context):
            found.append(_candidate(one, allocation, rank))
        gc.collect()  # what DDP and TorchRec build refers to itself, and would stay beside the next one
    if all(math.isnan(c["logloss"]) for c in found):
        how = found[0].get("diverged", "its loss is NaN")
        raise UserError(f"all {len(found)} candidates have diverged, the first one so: {how}", everywhere=True)
    best = found[chosen([c["logloss"] for c in found])]
    winner = directory.with_name(best["name"])
    final = _run_of(run, files[best["rank"] - 1], directory)
    steps = int(best["best_step"])
    if refit:
        final.config.train = dataclasses.replace(final.config.train, steps=steps, patience=0, evals_per_epoch=1)
    choice = {
        "by": "logloss on the validation split",
        "chosen": best["name"],
        "why": reason(found, best),
        "refit": {"rows": "training and validation", "steps": steps} if refit else None,
        "candidates": found,
    }
    if context.rank == 0:
        print(choice["why"], flush=True)
    with mirroring(final.config, context):
        if refit:
            task = _refit(final, allocation)
        else:
            make = partial(open_retraining, final.config, run.schema, allocation, directory)
            open_shared(context, directory, "opening the winner's directory", make)
            context.first("copying the winner", lambda: _copy(winner, directory))
            task = load_best(final.config, allocation, context, directory)
        context.first("writing the choice", lambda: write_sealed(directory / CHOICE, choice))
        test = final.stream("test", final.config.train.eval_batch_size, shuffle=False)
        result = evaluate_model(task, test, context, final.config, directory.name, allocation)
        context.first("writing evaluation.json", lambda: write_sealed(directory / "evaluation.json", result))
    return result


def refitted(directory: Path) -> bool:
    """Whether a directory's model was trained on validation rows, too."""
    return (directory / CHOICE).exists() and bool(read_sealed(directory / CHOICE).get("refit"))


def chosen(loglosses: Sequence[float]) -> int:
    """The place of the least; the first one of equal ones, which the search held for better."""
    return min(range(len(loglosses)), key=lambda k: (math.inf if math.isnan(loglosses[k]) else loglosses[k], k))


def reason(found: Sequence[dict[str, Any]], best: dict[str, Any]) -> str:
    """One sentence that says what speaks for the winner."""
    text = f"{best['name']} has the least validation logloss, {best['logloss']:.5f} after {best['best_step']:,} steps"
    if len(found) == 1:
        return f"{text}; it was the only candidate"
    lost = [c["name"] for c in found if math.isnan(c["logloss"])]
    others = sorted((c["logloss"], c["rank"], c["name"]) for c in found if c is not best and c["name"] not in lost)
    after = f"next comes {others[0][2]} with {others[0][0]:.5f}" if others else "no other candidate has a loss"
    diverged = f"; {', '.join(lost)} diverged" if lost else ""
    return f"{text}; {after} (of {len(found)} candidates{diverged})"


def _name(name: str, rank: int) -> str:
    """Of a candidate's directory: a seed stays last, where the report looks for it."""
    base, seed, number = name.rpartition("-seed")
    return f"{base}-rank-{rank}-seed{number}" if seed and number.isdigit() else f"{name}-rank-{rank}"


def _run_of(run: Run, file: Path, directory: Path) -> Run:
    config = copy.deepcopy(run.config)
    config.model.architecture, config.run.dir = str(file), str(directory)
    config.run.mirror = below(config.run.mirror, directory.parents[1], directory)
    return Run(config, run.schema, run.context)


def _candidate(run: Run, allocation: Allocation, rank: int) -> dict[str, Any]:
    """Train one and measure it on the validation split; its logloss is NaN if it has diverged."""
    config, context, own = run.config, run.context, run.dir
    make = partial(open_retraining, config, run.schema, allocation, own)
    open_shared(context, own, "opening a candidate's directory", make)
    training = run.stream("train", config.train.batch_size, shuffle=True)
    validation = run.stream("validation", config.train.eval_batch_size, shuffle=False)
    with context.together("reading the score"):
        score = read_architecture(config.model.architecture).get("provenance", {}).get("logloss")
    told = {"name": own.name, "rank": rank, "score": score}
    try:
        task = retrain(config, allocation, training, validation, context, own)
    except Diverged as e:
        if context.rank == 0:
            print(f"{own.name} has diverged and is out: {e}", flush=True)
        return {**told, "logloss": math.nan, "diverged": str(e)}
    result = evaluate_model(task, validation, context, config, own.name, allocation)
    context.first("writing the evaluation", lambda: write_sealed(own / VALIDATION, result))
    with context.together("reading what training left"):
        trained = read_sealed(own / "training.json")
    figures = {k: result[k] for k in ("logloss", "auc", "dense_parameters", "flops_per_sample")}
    steps = {"steps": trained["steps"], "best_step": trained["best_step"] or trained["steps"]}
    return {**told, **figures, **steps}


def _refit(run: Run, allocation: Allocation) -> Any:
    """A training on both splits, without anything to stop it before its last step."""
    config, context, own = run.config, run.context, run.dir
    training = run.stream("train", config.train.batch_size, shuffle=True)
    training.extend(run.stream("validation", config.train.batch_size, shuffle=True))
    config.train.epochs = math.ceil(config.train.steps / training.batches_per_epoch)
    make = partial(open_retraining, config, run.schema, allocation, own)
    open_shared(context, own, "opening the winner's directory", make)
    return retrain(config, allocation, training, None, context, own)


def _copy(winner: Path, directory: Path) -> None:
    """The winner's training as ``directory``'s own: files of checkpoints are the same ones on the disk if it allows."""
    for name in ("training.json", "metrics.jsonl"):
        shutil.copy(winner / name, directory / name)
    target, partial = directory / "checkpoints", directory / "checkpoints.partial"
    if target.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(winner / "checkpoints", partial, copy_function=_link)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
