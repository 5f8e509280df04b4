"""Train the model of an allocation from scratch, sharded by TorchRec, and evaluate it on the test split.

    python launch/retrain.py --run runs/my                              what the search found
    python launch/retrain.py --run runs/my --allocation ues-32        the uniform baseline
    python launch/retrain.py --run runs/my --allocation runs/my/allocations/small.json
    python launch/retrain.py --config configs/movielens_1m/adass_deepfm.yaml --allocation ues-32
    torchx run dist.ddp -j 1x2 retrain.py --run runs/my       two processes

Options: --run DIR or --config FILE, --allocation FILE or ues-WIDTH (default: the run's allocation.json),
--name NAME of the result under RUN/retrain (default: from the allocation; -seedN is added to it for a
seed other than the run's), --section.key VALUE (train, optim and model keys may differ from the search's).
Leaves RUN/retrain/NAME/{allocation.json, evaluation.json, metrics.jsonl, checkpoints}. A killed
training continues when the same command is given again.
"""

from __future__ import annotations

import re

from embsearch_dist.dist.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from collections.abc import Sequence
from pathlib import Path

from embsearch_dist.allocation import Allocation
from embsearch_dist.config import Config, split_arguments
from embsearch_dist.dist.context import start
from embsearch_dist.errors import UserError
from embsearch_dist.methods.base import Run
from embsearch_dist.schema import Schema, write_json
from embsearch_dist.train.retrain import evaluate_model, retrain
from launch.common import DEFAULT_CONFIG, known_options, lasting, open_data, open_run_directory, read_config, run_main


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    known_options(plain, ["run", "config", "allocation", "name"])
    if "run" in plain and not (Path(plain["run"]) / "config.yaml").exists():
        raise UserError(f"--run {plain['run']}: no config.yaml there, so it is not a run directory of search.py")
    file = Path(plain["run"]) / "config.yaml" if "run" in plain else plain.get("config", DEFAULT_CONFIG)
    base = read_config(file, [o for o in overrides if o.startswith("run.dir=")])
    config = read_config(file, overrides)
    run_dir = Path(plain.get("run", config.run.dir))
    with start(config.run, config.dist) as context:
        schema = open_data(config, context)
        with context.together("reading the allocation"):
            name, allocation = read_allocation(plain.get("allocation", ""), run_dir, schema)
        name = plain.get("name", name)
        if config.run.seed != base.run.seed:
            name += f"-seed{config.run.seed}"
        directory = run_dir / "retrain" / name
        config.run.dir = str(directory)
        context.first("opening the run directory", lambda: open_own(config, schema, allocation, directory))
        run = Run(config, schema, context)
        training = run.stream("train", config.train.batch_size, shuffle=True)
        validation = run.stream("validation", config.train.eval_batch_size, shuffle=False)
        test = run.stream("test", config.train.eval_batch_size, shuffle=False)
        task = retrain(config, allocation, training, validation, context, directory)
        result = evaluate_model(task, test, "test", context, config, name, allocation)
        context.first("writing evaluation.json", lambda: write_json(directory / "evaluation.json", result))
        if context.rank == 0:
            print(
                f"{name}: test auc {result['auc']:.5f}  logloss {result['logloss']:.5f}  embedding parameters "
                f"{result['embedding_parameters']:,} ({1 - allocation.reduction():.1%} of UES-32)  -> {directory}"
            )


def open_own(config: Config, schema: Schema, allocation: Allocation, directory: Path) -> None:
    """The sub-run's directory; a training of another allocation or config under that name is an error."""
    old = directory / "allocation.json"
    if old.exists() and not config.run.overwrite:
        same = Allocation.load(old, schema).widths == allocation.widths
        # Read as a config: one of an older version lacks keys that have been added since.
        if not same or lasting(read_config(directory / "config.yaml", [])) != lasting(config):
            raise UserError(f"{directory} holds another training; give --name, or --run.overwrite true to replace it")
    open_run_directory(config, schema, directory)
    allocation.save(old)


def read_allocation(text: str, run_dir: Path, schema: Schema) -> tuple[str, Allocation]:
    """(default name, allocation) from ``ues-WIDTH``, a file, or the run's own result."""
    uniform = re.fullmatch(r"ues-(\d+)", text)
    if uniform:
        return text, Allocation.uniform(schema, int(uniform.group(1)))
    path = Path(text) if text else run_dir / "allocation.json"
    if not path.exists():
        raise UserError(f"no allocation at {path}; search first, or give --allocation FILE or --allocation ues-32")
    allocation = Allocation.load(path, schema)
    return str(allocation.provenance.get("name", path.stem if text else "found")), allocation


if __name__ == "__main__":
    run_main(main, __doc__)
