"""Before evolution: many random networks ranked by zero-cost proxies, the best of which are its first population.

No supernet is involved, and its training is the same with and without. What is scored are networks of their own at
their first values, on one batch of training rows. Embeddings are random vectors of variance 1, one for each value of a
field: tables as they begin (``model.init_std``) are so small that products of them vanish.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from embsearch_dist.data.hashing import GOLDEN, mix
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_sealed
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.evolution import LIMITED_TRIES, TRIES, Limits
from embsearch_dist.methods.nasrec.proxies import PROXIES, Inputs
from embsearch_dist.methods.nasrec.scoring import all_rows
from embsearch_dist.models.model import seeded
from embsearch_dist.networks.architecture import Architecture
from embsearch_dist.networks.canonical import key
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import Space
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor

FILE = "prefilter.json"
_STREAM = 0x505245


def prefilter(
    run: Run[NASRecConfig], space: Space, monitor: Monitor, limits: Limits | None = None
) -> list[tuple[Architecture, str]]:
    """The kept networks with their keys, best mean rank first, on all ranks; leaves ``prefilter.json``.

    Args:
        limits: of what a network may cost.

    Raises:
        UserError: a proxy is not finite, or no network is within the limits.
    """
    search = run.config.search
    c, started = search.prefilter, time.monotonic()
    drawn = draw_distinct(space, c.sample, run.config.run.seed, limits)
    if not drawn and limits is not None:
        raise UserError(limits.refusal())
    batch = batch_of(run, space.width)
    values = _score(run, [a for a, _ in drawn], space, batch)
    means = mean_ranks(values)
    order = sorted(range(len(drawn)), key=lambda i: (means[i], drawn[i][1]))
    kept = order[: max(1, math.ceil(c.keep * len(drawn)))]

    def save() -> None:
        found = [{"key": drawn[i][1], "mean_rank": float(means[i]), **dict(zip(c.proxies, values[i]))} for i in kept]
        write_sealed(run.dir / FILE, {"proxies": c.proxies, "drawn": len(drawn), "rows": c.rows, "kept": found})

    run.context.first("writing what the proxies say", save)
    monitor.say(
        f"prefilter: {len(kept)} of {len(drawn)} random networks kept by {', '.join(c.proxies)}, in "
        f"{time.monotonic() - started:.1f} s"
    )
    return [drawn[i] for i in kept]


def draw_distinct(space: Space, count: int, seed: int, limits: Limits | None = None) -> list[tuple[Architecture, str]]:
    """So many random networks of a space within ``limits``, or as many as it has, none twice, with their keys."""
    generator = np.random.default_rng([_STREAM, seed])
    found: dict[str, Architecture] = {}
    tries = 0
    while len(found) < count and tries < (TRIES if limits is None else LIMITED_TRIES):
        architecture = draw(space, SCHEMES[0], generator, "uniform")
        tries += 1
        if limits is not None and not limits.hold(architecture):
            continue
        name = key(architecture)
        tries = tries if name in found else 0
        found.setdefault(name, architecture)
    return [(a, name) for name, a in found.items()]


def mean_ranks(values: Sequence[Sequence[float]]) -> np.ndarray:
    """``[N]``: the mean over proxies of each network's rank, 0 for the best; equal values share the mean of theirs."""
    table = np.asarray(values)
    above = (table[None] > table[:, None]).sum(1)
    equal = (table[None] == table[:, None]).sum(1)
    return (above + (equal - 1) / 2).mean(1)


def batch_of(run: Run, width: int) -> Inputs:
    """``search.prefilter.rows`` training rows, the same on any number of ranks: dense, embeddings, labels."""
    context, names = run.context, run.schema.names
    batch = next(run.stream("train", run.config.search.prefilter.rows, shuffle=True).epoch(0))
    u = torch.stack([vectors(batch, name, k, width) for k, name in enumerate(names)], 1).to(context.device)
    u, label = all_rows(u, context), all_rows(batch.label.to(context.device), context)
    dense = all_rows(batch.dense.to(context.device), context) if batch.dense.shape[1] else u.new_zeros(len(label), 0)
    return dense, u, label


def vectors(batch: Batch, name: str, number: int, width: int) -> torch.Tensor:
    """``[B, width]`` of variance 1: for each id of a field a vector that is a hash of it; of a list the scaled sum."""
    column = batch.sparse[name]
    ids, lengths = column.values().cpu().numpy().astype(np.uint64), column.lengths().cpu()
    places = ids[:, None] * np.uint64(width) + np.arange(width, dtype=np.uint64)
    uniform = (mix((places + np.uint64((number + 1) << 48)) * GOLDEN) >> np.uint64(40)).astype(np.float32) / 2**24
    found = torch.from_numpy((uniform * 2 - 1) * math.sqrt(3))
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    total = torch.zeros(len(lengths), width).index_add_(0, row, found)
    return total / lengths.clamp(min=1).sqrt()[:, None]


def _score(run: Run, architectures: Sequence[Architecture], space: Space, batch: Inputs) -> list[list[float]]:
    """The proxies of every network, spread over the ranks; all get all."""
    context, config = run.context, run.config
    columns, fields = len(run.schema.dense), len(run.schema.fields)
    own: dict[int, list[float]] = {}
    with context.together("scoring networks by proxies"):
        for place in range(context.rank, len(architectures), context.world_size):
            with seeded(config.run.seed):
                network = ArchitectureNetwork(architectures[place], space, fields, columns, config.model.layer_norm)
            network = network.to(context.device)
            own[place] = [PROXIES[name](network, batch) for name in config.search.prefilter.proxies]
            if not all(map(math.isfinite, own[place])):
                raise UserError(
                    f"network {key(architectures[place])}: proxies {', '.join(config.search.prefilter.proxies)} are "
                    f"{own[place]}. Leave the one out that is no number, or look at the dense columns of the data"
                )
    found: dict[int, Any] = {place: values for part in context.every(own) for place, values in part.items()}
    return [found[place] for place in range(len(architectures))]
