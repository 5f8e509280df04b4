"""Evaluate a retrained model: exact AUC and logloss over all ranks, parameters, bytes, FLOPs.

    python launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass
    python launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass --split validation
    torchrun --standalone --nproc-per-node 2 -- launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass

Options: --run DIR (a directory that retrain.py wrote), --split test|validation|train, --section.key VALUE.
Prints the figures as JSON and leaves them in DIR/evaluation.json (test) or DIR/evaluation-SPLIT.json.
"""

from __future__ import annotations

import json

from embsearch_dist.dist.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from collections.abc import Sequence
from pathlib import Path

from embsearch_dist.allocation import Allocation
from embsearch_dist.config import one_of, split_arguments
from embsearch_dist.dist.context import start
from embsearch_dist.errors import UserError
from embsearch_dist.methods.base import Run
from embsearch_dist.schema import SPLITS, write_json
from embsearch_dist.train.retrain import evaluate_model, load_best
from launch.common import known_options, open_data, read_config, run_main


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    known_options(plain, ["run", "split"])
    directory, split = Path(plain.get("run", "")), plain.get("split", "test")
    one_of("--split", split, SPLITS)
    if not (directory / "allocation.json").exists() or not (directory / "config.yaml").exists():
        raise UserError(f"--run {directory}: not a directory of retrain.py (allocation.json or config.yaml is missing)")
    config = read_config(directory / "config.yaml", overrides)
    with start(config.run, config.dist) as context:
        schema = open_data(config, context)
        with context.together("reading the allocation"):
            allocation = Allocation.load(directory / "allocation.json", schema)
        stream = Run(config, schema, context).stream(split, config.train.eval_batch_size, shuffle=False)
        task = load_best(config, allocation, context, directory)
        result = evaluate_model(task, stream, split, context, config, directory.name, allocation)
        target = directory / ("evaluation.json" if split == "test" else f"evaluation-{split}.json")
        context.first("writing the evaluation", lambda: write_json(target, result))
        if context.rank == 0:
            print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_main(main, __doc__)
