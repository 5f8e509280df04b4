"""A trained model out of its run directory, as its method takes it apart, and batches as served models take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from embsearch_dist.config.read import load_config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.methods import CONFIGS, METHODS
from embsearch_dist.methods.collected import Collected as Collected
from embsearch_dist.methods.ihas.routed_model import ROUTERS as ROUTERS
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.serving.tables import Bag, Ids


def kind_of(directory: Path, overrides: Sequence[str] = ()) -> str:
    """What a directory under ``RUN/retrain`` holds: ``single``, ``routed`` or ``gated``.

    Args:
        overrides: ``section.key=value`` on top of its config, such as a module that has moved.

    Raises:
        UserError: none of them.
    """
    if not (directory / "config.yaml").exists():
        raise UserError(
            f"--run {directory}: not a directory of retrain.py (config.yaml is missing). Give RUN/retrain/NAME"
        )
    return METHODS[load_config(CONFIGS, directory / "config.yaml", overrides).method]().kind(directory)


def collect(run: Run, directory: Path, router: str) -> Collected:
    """The trained model of a directory under ``RUN/retrain``.

    Args:
        router: of models of groups, one of :data:`ROUTERS`.

    Raises:
        UserError: nothing is trained there, or a file is damaged.
    """
    return METHODS[run.config.method]().collect(run, directory, router)


def ids_of_batch(batch: Batch, schema: Schema) -> Ids:
    """A batch of training or evaluation as served models take it."""
    sparse, single, lists = batch.sparse, {}, {}
    counts, flat = sparse.offset_per_key(), sparse.values().long()
    lengths = sparse.lengths().view(len(schema.fields), -1).long()
    weights = sparse.weights_or_none()
    for k, f in enumerate(schema.fields):
        inside = slice(counts[k], counts[k + 1])
        if f.is_list:
            offsets = torch.nn.functional.pad(lengths[k].cumsum(0), (1, 0))
            own = weights[inside] if f.weighted and weights is not None else None
            lists[f.name] = Bag(flat[inside], offsets, own)
        else:
            single[f.name] = flat[inside]
    return Ids(single, lists, batch.dense)
