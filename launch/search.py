"""Search embedding widths: train a supernet, search it, write allocation.json into the run directory.

    python launch/search.py                                             one process, synthetic data
    python launch/search.py --config configs/movielens_1m/adass_deepfm.yaml --data.path PREPARED
    torchx run dist.ddp -j 1x8 search.py                                eight processes, GPUs or CPU
    torchrun --standalone --nproc-per-node 2 launch/search.py           two, without torchx
    python launch/search.py --run.device cpu                            CPU even where a GPU is

Options: --config FILE (default: configs/synthetic/adass_deepfm.yaml), --print-config, --section.key VALUE.
A killed search continues when the same command is given again. With a finished supernet in the run
directory, other --search.policy.*, --search.budget or --search.pareto settings only search again:

    python launch/search.py --run.dir runs/synthetic_adass_deepfm --search.budget 1.5MB --search.name small
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.ranks.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.config.read import split_arguments
from embsearch_dist.config.sections import Config
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.results import restore_allocation
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.ranks.context import start
from embsearch_dist.ranks.shared import open_shared
from embsearch_dist.run import Run, check_classes, open_data
from embsearch_dist.stores.mirroring import mirroring
from embsearch_dist.stores.states import restore
from embsearch_dist.train.directories import open_run_directory
from launch.common import DEFAULT_CONFIG, known_options, override, read_config, read_run_config, run_main


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    known_options(plain, ["config", "print-config"])
    given = plain.get("config")
    config = resolve(given, overrides)
    if "print-config" in plain:
        print(config.to_yaml(), end="")
        return
    with start(config.run, config.dist) as context, mirroring(config, context):
        schema = open_data(config, context)
        directory, method, run = Path(config.run.dir), METHODS[config.method](), Run(config, schema, context)
        check_stages(method, run)
        check_classes(run, method.needs_classes(config))
        make = partial(open_run_directory, config, schema, directory, "search.py", given)
        open_shared(context, directory, "opening the run directory", make)
        if context.rank == 0:
            print(f"run directory {directory}, {context.world_size} rank(s) on {context.device.type}", flush=True)
        run_stages(method, run)
        context.first("restoring the allocation", lambda: restore_allocation(directory))


def resolve(file: str | None, overrides: Sequence[str]) -> Config:
    """The config of this run. A run directory that exists brings its own when no file is named; one that does not is
    fetched from the mirror that is named."""
    named, mirror = override(overrides, "run.dir"), override(overrides, "run.mirror")
    if file is None and named is not None and mirror:
        restore(Path(named), mirror)
    if file is None and named is not None and (Path(named) / "config.yaml").exists():
        return read_run_config(Path(named), overrides)
    return read_config(file or DEFAULT_CONFIG, overrides)


if __name__ == "__main__":
    run_main(main, __doc__)
