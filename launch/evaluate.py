"""Evaluate a retrained model: exact AUC and logloss over all ranks, parameters, bytes, FLOPs.

    python launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass
    python launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass --split validation
    python launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass --precision int8     tables as served
    python launch/evaluate.py --run runs/my/retrain/ihas --router fields       models of groups, the cheap router
    torchrun --standalone --nproc-per-node 2 -- launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass

Options: --run DIR (a directory that retrain.py wrote), --split test|validation|train, --section.key VALUE; --precision
fp32|fp16|int8|int4|mixed adds figures with tables rounded as an export at it serves them (default: search.precision);
for models of groups --router centres|fields: the search's own (default) or one that looks at a few raw fields.
Prints the figures as JSON and leaves them in DIR/evaluation.json, -SPLIT and -fields in its name where they are not
of the test split or the default router.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.dist.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.allocation import Allocation
from embsearch_dist.config import one_of, split_arguments
from embsearch_dist.dist.context import start
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods.base import Run
from embsearch_dist.methods.ihas.retraining import evaluate_groups, evaluation_file, load_groups
from embsearch_dist.methods.ihas.routed import ROUTERS
from embsearch_dist.methods.nasrec.searching import RESULT
from embsearch_dist.precision import MIXED, PRECISIONS
from embsearch_dist.rundir import hold
from embsearch_dist.schema import SPLITS, write_sealed
from embsearch_dist.stores.mirroring import mirroring
from embsearch_dist.train.retrain import evaluate_model, load_best
from launch.common import known_options, open_data, open_search, read_run_config, run_main
from launch.retraining import as_served


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    known_options(plain, ["run", "split", "router", "precision"])
    directory, split, router = Path(plain.get("run", "")), plain.get("split", "test"), plain.get("router", ROUTERS[0])
    one_of("--split", split, SPLITS)
    one_of("--router", router, ROUTERS)
    precision = plain.get("precision", "")
    one_of("--precision", precision, ("", *PRECISIONS, MIXED))
    grouped = (directory / GROUPS).exists() and (directory / "group-0").exists()
    if not (grouped or (directory / "allocation.json").exists()) or not (directory / "config.yaml").exists():
        raise UserError(f"--run {directory}: not a directory of retrain.py (allocation.json or config.yaml is missing)")
    if "router" in plain and not grouped:
        raise UserError(f"--router {router}: {directory} holds one model, not models of groups. Leave it out")
    if precision and grouped:
        raise UserError(
            f"--precision {precision}: {directory} holds models of groups: export them, the card has figures"
        )
    # The file of an architecture may be gone from where it was; the training has kept a copy.
    kept = [f"model.architecture={directory / RESULT}"] if (directory / RESULT).exists() else []
    config = read_run_config(directory, [*kept, *overrides])
    config.run.dir = str(directory)
    with start(config.run, config.dist) as context, mirroring(config, context):
        run = Run(config, open_data(config, context), context)
        context.first("opening the directory", lambda: hold(directory, "evaluate.py"))
        result = routed(run, directory, split, router) if grouped else single(run, directory, split, precision)
        if context.rank == 0:
            print(json.dumps(result, indent=2))


def single(run: Run, directory: Path, split: str, precision: str) -> dict[str, Any]:
    config, context = run.config, run.context
    with context.together("reading the allocation"):
        allocation = Allocation.load(directory / "allocation.json", run.schema)
    stream = run.stream(split, config.train.eval_batch_size, shuffle=False)
    task = load_best(config, allocation, context, directory)
    result = evaluate_model(task, stream, split, context, config, directory.name, allocation)
    result |= as_served(task, allocation, stream, split, run, precision)
    target = evaluation_file(directory, split)
    context.first("writing the evaluation", lambda: write_sealed(target, result))
    return result


def routed(run: Run, directory: Path, split: str, router: str) -> dict[str, Any]:
    config, context = run.config, run.context
    with context.together("reading the groups"):
        grouped = GroupedAllocation.load(directory / GROUPS, run.schema)
    search = open_search(directory, config, run.schema, context)
    models = load_groups(config, grouped, context, directory)
    return evaluate_groups(search, config, grouped, directory, models, split, router)


if __name__ == "__main__":
    run_main(main, __doc__, searching=False)
