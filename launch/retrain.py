"""Train the model of an allocation from scratch, sharded by TorchRec, and evaluate it on the test split.

    python launch/retrain.py --run runs/my                              what the search found
    python launch/retrain.py --run runs/my --allocation ues-32        the uniform baseline
    python launch/retrain.py --run runs/my --allocation runs/my/allocations/small.json
    python launch/retrain.py --run runs/my --allocation bracket       uniform widths just below and above what was found
    python launch/retrain.py --run runs/my --or-uniform               keep it or the uniform width that its budget holds
    python launch/retrain.py --run runs/my --model.backbone fm --name other    another model behind what was found
    python launch/retrain.py --run runs/my --model.architecture runs/my/architectures/rank-2.json --name second
    python launch/retrain.py --config configs/movielens_1m/adass_deepfm.yaml --allocation ues-32
    torchx run dist.ddp -j 1x2 retrain.py --run runs/my       two processes

Options: --run DIR or --config FILE, --allocation FILE, ues-WIDTH or bracket (default: model.allocation, or the run's
allocation.json or groups.json), --or-uniform, --name NAME of the result under RUN/retrain (default: from the
allocation; -seedN is added for a seed other than the run's), --section.key VALUE (train, optim and model keys may be
new ones).
Leaves RUN/retrain/NAME/{allocation.json, evaluation.json, metrics.jsonl, checkpoints}; of a search that found
groups, one such training per group in RUN/retrain/NAME/group-K, and in RUN/retrain/NAME the evaluation of all as
one model. With --or-uniform the widest uniform width that fits the allocation's budget is trained too; the better one
on the validation split is named, with the reason, in RUN/final.json.
A killed training continues when the same command is given again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.dist.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.allocation import Allocation
from embsearch_dist.config import Config, split_arguments
from embsearch_dist.dist.context import Context, start
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GroupedAllocation
from embsearch_dist.methods.base import Run
from embsearch_dist.methods.fallback import Trained, bracket, choose, predictions, uniform_like, widest_within
from embsearch_dist.methods.ihas.retraining import retrain_groups
from embsearch_dist.schema import Schema, write_json
from embsearch_dist.train.retrain import SubnetTask, evaluate_model, retrain
from launch.common import (
    DEFAULT_CONFIG,
    known_options,
    open_data,
    open_retraining,
    open_search,
    read_config,
    read_result,
    run_main,
    searched_network,
)

BRACKET = "bracket"


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    known_options(plain, ["run", "config", "allocation", "name", "or-uniform"])
    if "run" in plain and not (Path(plain["run"]) / "config.yaml").exists():
        raise UserError(f"--run {plain['run']}: no config.yaml there, so it is not a run directory of search.py")
    file = Path(plain["run"]) / "config.yaml" if "run" in plain else plain.get("config", DEFAULT_CONFIG)
    base = read_config(file, [o for o in overrides if o.startswith("run.dir=")])
    run_dir = Path(plain.get("run", base.run.dir))
    config = read_config(file, [*searched_network(run_dir, overrides), *overrides])
    with start(config.run, config.dist) as context:
        schema = open_data(config, context)
        with context.together("reading the allocation"):
            text = plain.get("allocation", config.model.allocation)
            name, found = read_result("" if text == BRACKET else text, run_dir, schema)
            _check_wish(plain, found)
            found = found.counted(config.model.extra)
        if config.model.architecture and name.startswith("ues-"):
            name = f"nasrec-{name}"  # not the uniform baseline: a found network stands behind its tables
        name = plain.get("name", name)
        suffix = f"-seed{config.run.seed}" if config.run.seed != base.run.seed else ""
        directory = run_dir / "retrain" / (name + suffix)
        if text == BRACKET or "or-uniform" in plain:
            assert isinstance(found, Allocation)
            models = uniforms_of(found) if text == BRACKET else beside_uniform(name, found)
            results = retrain_many(config, schema, context, run_dir, suffix, models, "or-uniform" in plain)
        elif isinstance(found, GroupedAllocation):
            name, config.run.dir = name + suffix, str(directory)
            search = open_search(run_dir, config, schema, context)
            by_router = retrain_groups(search, config, found, directory, open_retraining)
            results = {f"{name} (router: {kind})": result for kind, result in by_router.items()}
        else:
            results = retrain_many(config, schema, context, run_dir, suffix, {name: found}, False)
        for label, result in results.items() if context.rank == 0 else ():
            size, whole = result["embedding_parameters"], Allocation.uniform(schema, 32).counted(config.model.extra)
            place = run_dir / "retrain" / label.split(" (router")[0]
            print(
                f"{label}: test auc {result['auc']:.5f}  logloss {result['logloss']:.5f}  embedding parameters "
                f"{size:,} ({size / whole.total('parameters'):.1%} of UES-32)  -> {place}"
            )


def _check_wish(plain: dict[str, str], found: Allocation | GroupedAllocation) -> None:
    """Options that only widths of one model can have."""
    wish = "--or-uniform" if "or-uniform" in plain else f"--allocation {BRACKET}"
    if "or-uniform" not in plain and plain.get("allocation") != BRACKET:
        return
    if "or-uniform" in plain and plain.get("allocation") == BRACKET:
        raise UserError(f"--or-uniform compares what was found with a uniform width; leave --allocation {BRACKET} out")
    if isinstance(found, GroupedAllocation):
        raise UserError(f"{wish} compares the widths of one model; this run has found groups. Leave it out")
    if "name" in plain and wish != "--or-uniform":
        raise UserError(f"{wish} names its results ues-WIDTH; leave --name out")


def uniforms_of(found: Allocation) -> dict[str, Allocation]:
    return {f"ues-{w}": uniform_like(found, w) for w in bracket(found)}


def beside_uniform(name: str, found: Allocation) -> dict[str, Allocation]:
    """What was found and the widest uniform allocation of its budget; alone where that is the same or none fits."""
    width = widest_within(found)
    if not width or set(found.widths.values()) == {width}:
        return {name: found}
    return {name: found, f"ues-{width}": uniform_like(found, width)}


def retrain_many(
    config: Config,
    schema: Schema,
    context: Context,
    run_dir: Path,
    suffix: str,
    models: dict[str, Allocation],
    choosing: bool,
) -> dict[str, dict[str, Any]]:
    """Train and evaluate one after another; ``choosing`` between two writes ``final.json``."""
    results, trained = {}, []
    for name, allocation in models.items():
        directory, one = run_dir / "retrain" / (name + suffix), copy.deepcopy(config)
        one.run.dir = str(directory)
        run = Run(one, schema, context)
        task, results[name + suffix] = retrain_one(run, allocation, directory, name + suffix)
        if choosing:
            validation = run.stream("validation", one.train.eval_batch_size, shuffle=False)
            logits, labels = predictions(task, validation, context)
            trained.append(Trained(name + suffix, allocation.total("parameters"), logits))
    if choosing:
        if len(trained) == 2:
            final = choose(trained[0], trained[1], labels, config.train.metric)
        else:
            final = {"name": trained[0].name, "fallback": False, "reason": "no other uniform width fits its budget"}
        final["model"] = f"retrain/{final['name']}"
        context.first("writing final.json", lambda: write_json(run_dir / f"final{suffix}.json", final))
        if context.rank == 0:
            print(f"final model: {final['reason']}")
    return results


def retrain_one(run: Run, allocation: Allocation, directory: Path, name: str) -> tuple[SubnetTask, dict[str, Any]]:
    config, context = run.config, run.context
    context.first("opening the run directory", lambda: open_retraining(config, run.schema, allocation, directory))
    training = run.stream("train", config.train.batch_size, shuffle=True)
    validation = run.stream("validation", config.train.eval_batch_size, shuffle=False)
    test = run.stream("test", config.train.eval_batch_size, shuffle=False)
    task = retrain(config, allocation, training, validation, context, directory)
    result = evaluate_model(task, test, "test", context, config, name, allocation)
    context.first("writing evaluation.json", lambda: write_json(directory / "evaluation.json", result))
    return task, result


if __name__ == "__main__":
    run_main(main, __doc__)
