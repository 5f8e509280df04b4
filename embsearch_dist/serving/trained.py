"""A trained model in its run directory, opened for what makes something else of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from embsearch_dist.config.read import load_config
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.methods import CONFIGS
from embsearch_dist.methods.gated.collected import search_of
from embsearch_dist.methods.results import kept_network
from embsearch_dist.ranks.context import start
from embsearch_dist.run import Run, open_data
from embsearch_dist.rundir import check_text
from embsearch_dist.serving.collect import ROUTERS, Collected, collect
from embsearch_dist.serving.export import described_by


@contextmanager
def trained(
    directory: Path, kind: str, router: str = ROUTERS[0], overrides: Sequence[str] = (), source: str = ""
) -> Iterator[tuple[Run, Collected, BatchStream]]:
    """The run of a directory under RUN/retrain, its trained model, and the test split in batches of an evaluation.

    Args:
        kind: what :func:`embsearch_dist.serving.collect.kind_of` says of it.
        router: of models of groups.
        overrides: ``section.key=value`` on top of the run's own config.
        source: what ``--source`` names.

    Raises:
        UserError: several processes, a directory that was changed, or data that do not fit.
    """
    run_dir = search_of(directory) if kind == "gated" else directory
    check_text(run_dir / "config.yaml")
    config = load_config(CONFIGS, run_dir / "config.yaml", [*kept_network(directory), *overrides])
    with start(config.run, config.dist) as context:
        if context.world_size > 1:
            raise UserError("export.py is for one process. Start it without torchrun", everywhere=True)
        config.run.dir = str(run_dir)
        run = Run(config, open_data(config, context), context)
        if source:
            provenance = {**run.schema.provenance, "source": described_by(source, run.schema)}
            run = Run(config, replace(run.schema, provenance=provenance), context)
        found = collect(run, directory, router)
        size = config.train.eval_batch_size if kind != "gated" else config.search.training.eval_batch_size
        yield run, found, run.stream("test", size, shuffle=False)
