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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.ranks.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.config.read import split_arguments
from embsearch_dist.config.sections import Config
from embsearch_dist.stores.states import restore
from launch.common import DEFAULT_CONFIG, known_options, override, read_config, read_run_config, run_main


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    known_options(plain, ["config", "print-config"])
    given = plain.get("config")
    config = resolve(given, overrides)
    if "print-config" in plain:
        print(config.to_yaml(), end="")
        return
    from embsearch_dist.ranks.context import start  # torch: not needed to refuse a config
    from embsearch_dist.running import search
    from embsearch_dist.stores.mirroring import mirroring

    with start(config.run, config.dist) as context, mirroring(config, context):
        search(config, context, given=given)


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
