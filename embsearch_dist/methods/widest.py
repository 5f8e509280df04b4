"""The widest model: one uniform width, trained with the recipe of every retrained model. Searches without a supernet
read the widths off it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import SAFETY_KEYS
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.load.making import BatchMaker
from embsearch_dist.methods.stages import Stage
from embsearch_dist.models.model import Head, SubnetModel
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.models.tables import MixedTables
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.retrain import SubnetTask, load_best, retrain

FOLDER = "widest"
BLOCK_ROWS = 8192  # rows of a table that are looked up at a time, and rows of a sample that are summed up, at most
BLOCK_VALUES = 1 << 26  # numbers in hand then: 512 MiB in float64
SAMPLE_BYTES = 4 << 30  # embeddings that a sample holds on all ranks together


class WidestStage(Stage):
    """Trains the model of uniform width ``search.width`` to its early stop; leaves it under ``widest/``."""

    name = "widest"

    def inputs(self, run: Run) -> dict[str, Any]:
        c = run.config
        return {
            "schema": run.schema.fingerprint,
            "run.seed": c.run.seed,
            "model": {k: v for k, v in c.model.settings().items() if k != "allocation"},
            "optim": c.optim,
            "train": {k: v for k, v in vars(c.train).items() if k not in SAFETY_KEYS},
            "search.width": c.search.width,
        }

    def run(self, run: Run) -> None:
        train = run.config.train
        training = run.stream("train", train.batch_size, shuffle=True)
        validation = run.stream("validation", train.eval_batch_size, shuffle=False)
        retrain(run.config, widest_of(run), training, validation, run.context, folder_of(run))


def widest_of(run: Run) -> Allocation:
    """The uniform allocation of ``search.width``."""
    return Allocation.uniform(run.schema, run.config.search.width)


def folder_of(run: Run) -> Path:
    return run.dir / FOLDER


def load_widest(run: Run) -> SubnetTask:
    """The finished widest model with its best weights, in evaluation mode.

    Raises:
        UserError: it is missing or damaged.
    """
    task = load_best(run.config, widest_of(run), run.context, folder_of(run))
    task.model.eval()
    return task


def random_rows(run: Run, split: str, rows: int, seed: int, batch_size: int = 0) -> BatchStream:
    """A stream whose first epoch is in random order, whatever the order of storage; see :func:`first_rows`.

    ``batch_size``: rows of a batch at most; 0: ``train.eval_batch_size``.
    """
    total = min(rows, run.schema.rows.get(split, rows))
    # Batches of one size, as a rest would be left out.
    batch = total // -(-total // (batch_size or run.config.train.eval_batch_size))
    return run.stream(split, max(batch, run.context.world_size), shuffle=True, seed=seed)


def first_rows(stream: BatchStream, rows: int) -> Iterator[Batch]:
    """This rank's share of about ``rows`` rows of a stream, in whole batches; the same rows on any number of ranks."""
    for batch, _ in zip(stream.epoch(0), range(batches_of(stream, rows)), strict=False):
        yield batch


def batches_of(stream: BatchStream, rows: int) -> int:
    """How many batches of a stream have about ``rows`` rows."""
    return min(stream.batches_per_epoch, -(-rows // stream.global_batch))


@dataclass(frozen=True)
class Sample:
    """Pooled embeddings of some rows of this rank, with what else the head reads.

    Attributes:
        x: ``[F, n, w]``.
        dense: ``[n, n_dense]``.
        label: ``[n]``.
        values: ``[n, F]``: the values' own weights; no columns where the model has none.
        known: ``[F, n]`` bool: whether the row has a value of the field that has an id of its own; None: all count.
        again: ``[F]``: see :meth:`Repeats.again`; None where it was not counted.
    """

    x: torch.Tensor
    dense: torch.Tensor
    label: torch.Tensor
    values: torch.Tensor
    known: torch.Tensor | None = None
    again: torch.Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: SubnetModel, batches: Iterator[Batch], device: torch.device, count: int = 1) -> Sample:
        """Look the rows up. Every rank must bring equally many batches.

        ``count``: how many there are, of the first one's size: room for so many is made at once, so that memory never
        holds the embeddings twice. There may be fewer, or more.
        """
        x, start = torch.empty(0), 0
        parts: list[tuple[torch.Tensor, ...]] = []
        for batch in batches:
            here = batch.to(device)
            pooled = model.tables(here.sparse)
            values = pooled.first_order() if pooled.weights else pooled.values[:, :0]
            seen = known_in(here.sparse, model.tables.names)
            stacked = pooled.stack()
            fields, rows, width = stacked.shape
            if not parts:
                x = stacked.new_empty(fields, count * rows, width)
            if start + rows > x.shape[1]:
                x = torch.cat([x[:, :start], x.new_empty(fields, rows, width)], 1)
            x[:, start : start + rows] = stacked
            start += rows
            parts.append((here.dense, here.label, values.clone(), seen))
        dense, label, values, known = zip(*parts, strict=True)
        return cls(x[:, :start], torch.cat(dense), torch.cat(label), torch.cat(values), torch.cat(known, 1))

    def pieces(self, rows: int) -> Iterator[Sample]:
        """The same rows, at most ``rows`` at a time."""
        for start in range(0, len(self.label), rows):
            part = slice(start, start + rows)
            known = None if self.known is None else self.known[:, part]
            yield Sample(self.x[:, part], self.dense[part], self.label[part], self.values[part], known)


class Repeats:
    """Counts how often the values of some rows come again among them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.ids: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self.rows = 0

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, counted as they pass."""
        for batch in batches:
            self.rows += batch.size
            for name, ids in self.ids.items():
                own = batch.sparse[name].values()
                ids.append(own[own > 0])
            yield batch

    def again(self, rows: int, context: Context) -> torch.Tensor:
        """``[F]`` float64: how many other ids of the split equal an id above 0, on average over such ids: that of a
        user with ten rows comes again nine times, the number of an order never. NaN where nothing tells.

        Two of the split are equal as often as two of the sample are, however small a part of the split that is. Pairs
        are counted among the rows of all ranks, so that it does not matter how many ranks these lie on: every rank gets
        the ids of all, one field at a time. All ranks call this.

        Args:
            rows: of the split, of which all ranks' rows are a sample; 0 where nobody knows.
        """
        told = []
        for ids in self.ids.values():
            of_all = context.gather(torch.cat(ids).to(context.device))
            counts = of_all.unique(return_counts=True)[1].double()
            met = counts.sum()
            told.append(torch.stack([(counts * (counts - 1)).sum(), met * (met - 1), met]))
        equal, possible, met = torch.stack(told, 1).cpu()
        sampled = context.sum(torch.tensor([float(self.rows)], dtype=torch.float64, device=context.device)).cpu()
        return equal / possible * (met / sampled * (rows or torch.nan) - 1)


def known_in(sparse: KeyedJaggedTensor, names: Sequence[str]) -> torch.Tensor:
    """``[F, n]`` bool: whether a row holds any id above 0, which rare, unseen and missing values share."""
    rows = sparse.stride()
    owner = torch.repeat_interleave(sparse.lengths().long())
    hits = sparse.values().new_zeros(len(sparse.keys()) * rows, dtype=torch.int64)
    hits.index_add_(0, owner, (sparse.values() > 0).long())
    return (hits.view(-1, rows) > 0)[[sparse.keys().index(name) for name in names]]


def unified(head: Head, x: torch.Tensor) -> torch.Tensor:
    """What the backbone gets ``[n, F, d]`` of fields of one width ``[F, n, w]``."""
    fields, rows, width = x.shape
    values = x.transpose(0, 1).reshape(rows, fields * width)
    u = head.unify(Pooled(values, tuple(f * width for f in range(fields)), (width,) * fields))
    return u.view(rows, fields, -1)


def logits_of(head: Head, u: torch.Tensor, dense: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Logits ``[n]`` from what the backbone gets ``[n, F, d]`` and the values' own weights ``[n, F]``, if any."""
    if values.shape[1]:
        return head.backbone(u, dense, values.sum(1))
    return head.backbone(u, dense)


class Moments:
    """Sums over rows of all ranks, in float64: count ``[F]``, first ``[F, w]`` and second moments ``[F, w, w]``."""

    def __init__(self, fields: int, width: int, device: torch.device) -> None:
        self.count = torch.zeros(fields, dtype=torch.float64, device=device)
        self.first = torch.zeros(fields, width, dtype=torch.float64, device=device)
        self.second = torch.zeros(fields, width, width, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        """Rows ``x [F, n, w]``; ``counted [F, n]``: 0 for a row that is none."""
        wide = x.double()
        weighted = wide if counted is None else wide * counted[..., None]
        self.count += x.shape[1] if counted is None else counted.sum(1)
        self.first += weighted.sum(1)
        self.second += weighted.transpose(1, 2) @ wide

    def sum(self, context: Context) -> Moments:
        for part in (self.count, self.first, self.second):
            context.sum(part)
        return self

    @property
    def mean(self) -> torch.Tensor:
        """``[F, w]``."""
        return self.first / self.count[:, None]

    @property
    def covariance(self) -> torch.Tensor:
        """``[F, w, w]``, about the mean."""
        mean = self.mean
        return self.second / self.count[:, None, None] - mean[:, :, None] * mean[:, None, :]


def rows_at_once(fields: int, width: int) -> int:
    """Rows of all fields that are taken at a time where each number of them is needed in float64."""
    return max(1, min(BLOCK_ROWS, BLOCK_VALUES // (fields * width)))


def rows_in_memory(fields: int, width: int) -> int:
    """Rows that a sample may have: :data:`SAMPLE_BYTES` of pooled embeddings."""
    return max(1, SAMPLE_BYTES // (4 * fields * width))


@torch.no_grad()
def table_moments(
    model: SubnetModel, schema: Schema, context: Context, tick: Callable[[int], None] = lambda rows: None
) -> Moments:
    """Moments of the tables' rows, each counted once however often it is looked up.

    ``tick`` is called with how many rows of the longest table have been passed.
    """
    width = model.tables.widths[0]
    found = Moments(len(schema.fields), width, context.device)
    for x, inside, _, passed in blocks_of(model.tables, schema, context):
        found.add(x, inside)
        tick(passed)
    return found.sum(context)


@torch.no_grad()
def blocks_of(
    tables: MixedTables, schema: Schema, context: Context
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """All rows of all tables, on some rank each: ``x [F, n, w]``, ``inside [F, n]`` (0 for what is no row of a table),
    the rows' ids ``[n]``, and how many rows of the longest table the block has passed.

    The rows are looked up, not read from the shards: a table that is split by columns lies on no rank whole.
    """
    cardinalities = torch.tensor(schema.cardinalities, device=context.device)
    longest, own = max(schema.cardinalities), rows_at_once(len(schema.fields), max(tables.widths))
    step = own * context.world_size
    for start in range(0, longest, step):
        first = start + context.rank * own
        # A rank whose part lies beyond the end looks one row up for nothing: all must look up together.
        ids = torch.arange(own, device=context.device)[: max(1, longest - first)] + first
        inside = ids < cardinalities[:, None]
        x = tables(single_ids(schema, torch.minimum(ids, cardinalities[:, None] - 1).int())).stack()
        yield x, inside.double(), ids, min(step, longest - start)


def single_ids(schema: Schema, ids: torch.Tensor) -> KeyedJaggedTensor:
    """``[F, B]`` ids, one for each field and sample, as the tables take them; of weighted lists with weight 1."""
    sparse = BatchMaker(schema).sparse(ids)
    if not any(f.weighted for f in schema.fields):
        return sparse
    values = sparse.values()
    return KeyedJaggedTensor(sparse.keys(), values, torch.ones(len(values), device=ids.device), sparse.lengths())


def sample_of(run: Run, model: SubnetModel, split: str, rows: int, seed: int = 0, repeats: bool = False) -> Sample:
    """About ``rows`` random rows of a split, looked up: this rank's share. ``seed`` is beside ``run.seed``; with
    ``repeats`` it is counted how often values come again.

    Of many wide fields they are fewer: see :func:`rows_in_memory`.
    """
    rows = min(rows, rows_in_memory(len(model.tables.widths), max(model.tables.widths)))
    stream = random_rows(run, split, rows, run.config.run.seed * 7919 + seed)
    drawn, counts = first_rows(stream, rows), Repeats(model.tables.names)
    found = Sample.of(model, counts.watch(drawn) if repeats else drawn, run.context.device, batches_of(stream, rows))
    return replace(found, again=counts.again(run.schema.rows.get(split, 0), run.context)) if repeats else found


def head_gradients(
    model: SubnetModel, piece: Sample, of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Gradients ``[F, n, w]`` of ``of(logits [n], labels [n])`` (a sum over rows) by the pooled embeddings."""
    x = piece.x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(model.bare_head, unified(model.bare_head, x), piece.dense, piece.values)
        return torch.autograd.grad(of(logits, piece.label), x)[0]
