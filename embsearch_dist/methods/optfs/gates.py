"""The model whose values have gates, held in a column of its tables, and how gates are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.optfs import rewinding
from embsearch_dist.models.head import make_head
from embsearch_dist.models.model import CTRModel, SubnetModel, seeded
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.models.rows import fill_rows
from embsearch_dist.models.tables import MixedTables
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.sharded_tables import LocalShard
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask

START = 0.5  # w0
EVERY = 8  # steps whose penalty is taken off in one go: a pass over a column of all tables


def gate(w: torch.Tensor, tau: float) -> torch.Tensor:
    """``sigmoid(tau * w) / sigmoid(w0)``: 1 at the start, where tau is 1."""
    return torch.sigmoid(tau * w) / torch.sigmoid(torch.tensor(START))


def tau_of(epoch: int, epochs: int, final: float) -> float:
    """``final ^ (epoch / (epochs - 1))``: 1 in the first epoch, ``final`` in the last; in a single one 1."""
    return float(final ** (min(epoch, epochs - 1) / (epochs - 1))) if epochs > 1 else 1.0


def pull(w: torch.Tensor, tau: float) -> torch.Tensor:
    """The gradient of ``sigmoid(tau * w)``, by which the penalty pulls each gate down."""
    s = torch.sigmoid(tau * w)
    return tau * s * (1 - s)


class ValueGateModel(SubnetModel):
    """The model of a uniform width, each value's embedding times its gate.

    The tables have a column more, behind the width: ``w = START + scale * column``, so that a step of their optimizer
    moves w at a rate of its own.

    Args:
        scale: rate of w over that of the tables.
    """

    def __init__(self, config: Config, schema: Schema, width: int, context: Context, scale: float) -> None:
        CTRModel.__init__(self)  # tables and head differ in width here
        m, seed, fields = config.model, config.run.seed, len(schema.fields)
        self.width, self.scale, self.tau = width, scale, 1.0
        self.summed = [f.name for f in schema.fields if f.is_list and f.pooling != "mean"]
        wide = Allocation.uniform(schema, width + 1)
        self.tables = MixedTables(wide, context, config.dist, config.optim, seed, m.init_std, extra=m.extra)
        with seeded(seed), context.together("reading the architecture"):
            head = make_head(m, [width] * fields, len(schema.dense), context.world_size > 1)
        self.head = self._wrap(head, context)
        with torch.no_grad():
            for column in self.columns():
                column.zero_()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Pooled]:
        """Logits ``[B]``, and the embeddings before their gates (for L2)."""
        pooled = self.tables(batch.sparse)
        gated, plain = self.gated(pooled, batch), replace(pooled, widths=(self.width,) * len(pooled.starts))
        if torch.is_grad_enabled():
            return self.head(batch.dense, gated), plain
        whole = replace(gated, values=fill_rows(gated.values))
        return self.head(fill_rows(batch.dense), whole)[: batch.size], plain

    def gated(self, pooled: Pooled, batch: Batch) -> Pooled:
        """What the head reads, without the column of the gates."""
        x = pooled.stack().transpose(0, 1)  # [B, F, width + 1]
        rows, fields, _ = x.shape
        gates = gate(START + self.scale * self._mean(x[..., -1], batch), self.tau)
        values = (x[..., : self.width] * gates[..., None]).reshape(rows, fields * self.width)
        starts, own = tuple(f * self.width for f in range(fields)), tuple[int, ...]()
        if pooled.weights:
            own = tuple(fields * self.width + f for f in range(fields))
            values = torch.cat([values, pooled.first_order() * gates], 1)
        return Pooled(values, starts, (self.width,) * fields, own)

    def _mean(self, column: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of the column ``[B, F]`` as the tables pool it, the mean over the ids of a list."""
        if not self.summed:
            return column
        counts = torch.ones_like(column)
        for name in self.summed:
            counts[:, self.tables.names.index(name)] = batch.sparse[name].lengths().clamp(min=1).to(column.dtype)
        return column / counts

    def parts(self) -> Iterator[tuple[LocalShard, torch.Tensor]]:
        """This rank's shards that have the column of the gates, and it ``[rows]``, live."""
        for shard in self.sharded.local_shards():
            place = self.width - shard.column_offset
            if 0 <= place < shard.tensor.shape[1]:
                yield shard, shard.tensor[:, place]

    def columns(self) -> Iterator[torch.Tensor]:
        """The columns of :meth:`parts`."""
        return (column for _, column in self.parts())

    @torch.no_grad()
    def weights_of_all(self) -> dict[str, torch.Tensor]:
        """w of every value of every field ``[cardinality]`` float32 on CPU, the same on all ranks; all call it."""
        found = {n: torch.zeros(t.rows) for n, t in self.sharded.tables.items()}
        context = self.sharded.context
        for shard, column in self.parts():
            if not shard.replicated or context.rank == 0:
                part = slice(shard.row_offset, shard.row_offset + len(column))
                found[shard.table.name][part] = START + self.scale * column.detach().float().cpu()
        return {n: context.sum(found[n].to(context.device)).cpu() for n in self.tables.names}


class ValueGateTask(SubnetTask):
    """Trains tables, gates and head together; tau follows the epoch.

    Args:
        own: the method's settings that the result depends on.
    """

    model: ValueGateModel

    def __init__(self, run: Run, own: dict[str, Any]) -> None:
        self.run, self.search, self.context, config = run, run.config.search, run.context, run.config
        scale = self.search.lr / config.optim.embedding_lr
        model = ValueGateModel(config, run.schema, self.search.width, run.context, scale)
        super().__init__(config, Allocation.uniform(run.schema, self.search.width), run.context, model)
        self.settings |= own
        self._enter(0)

    def _enter(self, epoch: int) -> None:
        self.epoch = epoch
        self.model.tau = tau_of(epoch, self.search.training.epochs, self.search.tau)

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        position = batch.position
        if self.search.rewind and (position.epoch, position.batch) == (self.search.rewind, 1):
            rewinding.keep(self.run, self)
        self._enter(position.epoch)
        return super().loss(batch, step)

    @torch.no_grad()
    def after_step(self, step: int, monitor: Monitor) -> None:
        if step % EVERY == 0:
            scale, tau = self.model.scale, self.model.tau
            taken = EVERY * self.search.lr * self.search.penalty / scale
            for column in self.model.columns():
                column.sub_(taken * pull(START + scale * column, tau))
        if step % self.search.training.log_every == 0:
            monitor.scalars(step, {"tau": self.model.tau, "open": self.share_open()})

    def share_open(self) -> float:
        """Of all values, the share with ``w > 0``."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for shard, column in self.model.parts():
            if not shard.replicated or self.context.rank == 0:
                w = START + self.model.scale * column
                sums += torch.stack([(w > 0).sum(), torch.ones_like(w).sum()]).double()
        shut = self.context.sum(sums)
        return float(shut[0] / shut[1])

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        self._enter(int(state["epoch"]))
