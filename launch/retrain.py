"""Train the model of an allocation from scratch, sharded by TorchRec, and evaluate it on the test split.

    python launch/retrain.py --run runs/my                              what the search found
    python launch/retrain.py --run runs/my --allocation ues-32        the uniform baseline
    python launch/retrain.py --run runs/my --allocation runs/my/allocations/small.json
    python launch/retrain.py --run runs/my --model.backbone fm --name other    another model behind what was found
    python launch/retrain.py --run runs/my --model.architecture runs/my/architectures/rank-2.json --name second
    python launch/retrain.py --config configs/movielens_1m/adass_deepfm.yaml --allocation ues-32
    python launch/retrain.py --run runs/my --best 5 --refit    the five best networks, and the winner of them
    torchx run dist.ddp -j 1x2 retrain.py --run runs/my       two processes

Options: --run DIR or --config FILE, --allocation FILE or ues-WIDTH (default: model.allocation, or the run's
allocation.json or groups.json), --name NAME of the result under RUN/retrain (default: from the allocation; -seedN
is added for a seed other than the run's), --best K to train the K best networks that a search kept and keep the one of
least validation logloss, --refit to train that one again on training and validation rows, --section.key VALUE (train,
optim and model keys may be new ones).
Leaves RUN/retrain/NAME/{allocation.json, evaluation.json, metrics.jsonl, checkpoints}; of a search that found
groups, one such training per group in RUN/retrain/NAME/group-K, and in RUN/retrain/NAME the evaluation of all as
one model. With --best the winner is in RUN/retrain/NAME with choice.json, the others in NAME-rank-K; NAME ends in
-best unless it is given. A killed training continues when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.dist.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.allocation import Allocation
from embsearch_dist.config import split_arguments
from embsearch_dist.dist.context import start
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GroupedAllocation
from embsearch_dist.methods.base import Run
from embsearch_dist.methods.ihas.retraining import retrain_groups
from embsearch_dist.methods.nasrec.choosing import candidate_files, train_best
from embsearch_dist.schema import write_json
from embsearch_dist.train.retrain import evaluate_model, retrain
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


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    known_options(plain, ["run", "config", "allocation", "name", "best", "refit"])
    best = best_of(plain, overrides)
    if "run" in plain and not (Path(plain["run"]) / "config.yaml").exists():
        raise UserError(f"--run {plain['run']}: no config.yaml there, so it is not a run directory of search.py")
    file = Path(plain["run"]) / "config.yaml" if "run" in plain else plain.get("config", DEFAULT_CONFIG)
    base = read_config(file, [o for o in overrides if o.startswith("run.dir=")])
    run_dir = Path(plain.get("run", base.run.dir))
    config = read_config(file, [*searched_network(run_dir, overrides), *overrides])
    with start(config.run, config.dist) as context:
        schema = open_data(config, context)
        with context.together("reading the allocation"):
            name, found = read_result(plain.get("allocation", config.model.allocation), run_dir, schema)
        if config.model.architecture and name.startswith("ues-"):
            name = f"nasrec-{name}"  # not the uniform baseline: a found network stands behind its tables
        name = plain.get("name", f"{name}-best" if best else name)
        if config.run.seed != base.run.seed:
            name += f"-seed{config.run.seed}"
        directory = run_dir / "retrain" / name
        config.run.dir = str(directory)
        if best:
            with context.together("looking for the candidates"):
                files = candidate_files(run_dir, best)
                if isinstance(found, GroupedAllocation):
                    raise UserError("--best: groups of rows have widths of their own, and no network. Leave it out")
            run = Run(config, schema, context)
            results = {name: train_best(run, found, files, directory, open_retraining, "refit" in plain)}
        elif isinstance(found, GroupedAllocation):
            search = open_search(run_dir, config, schema, context)
            by_router = retrain_groups(search, config, found, directory, open_retraining)
            results = {f"{name} (router: {kind})": result for kind, result in by_router.items()}
        else:
            results = {name: retrain_one(Run(config, schema, context), found, directory, name)}
        for label, result in results.items() if context.rank == 0 else ():
            size = result["embedding_parameters"]
            print(
                f"{label}: test auc {result['auc']:.5f}  logloss {result['logloss']:.5f}  embedding parameters "
                f"{size:,} ({size / Allocation.uniform(schema, 32).total('parameters'):.1%} of UES-32)  -> {directory}"
            )


def best_of(plain: dict[str, str], overrides: Sequence[str]) -> int:
    """K of ``--best K``, 0 without it.

    Raises:
        UserError: no number, ``--refit`` without it, or a network that is named beside it.
    """
    if "best" not in plain:
        if "refit" in plain:
            raise UserError("--refit trains the winner of --best K once more; give both")
        return 0
    if any(o.startswith(("model.architecture=", "model.backbone=")) for o in overrides):
        raise UserError("--best trains the networks that the search kept; leave out --model.architecture and backbone")
    if not plain["best"].isdigit() or plain["best"] == "0":
        raise UserError(f"--best {plain['best']}: give how many of the search's best networks to train, at least 1")
    return int(plain["best"])


def retrain_one(run: Run, allocation: Allocation, directory: Path, name: str) -> dict[str, Any]:
    config, context = run.config, run.context
    context.first("opening the run directory", lambda: open_retraining(config, run.schema, allocation, directory))
    training = run.stream("train", config.train.batch_size, shuffle=True)
    validation = run.stream("validation", config.train.eval_batch_size, shuffle=False)
    test = run.stream("test", config.train.eval_batch_size, shuffle=False)
    task = retrain(config, allocation, training, validation, context, directory)
    result = evaluate_model(task, test, "test", context, config, name, allocation)
    context.first("writing evaluation.json", lambda: write_json(directory / "evaluation.json", result))
    return result


if __name__ == "__main__":
    run_main(main, __doc__)
