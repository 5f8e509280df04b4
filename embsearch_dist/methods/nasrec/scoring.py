"""What a candidate is worth: its logloss with the supernet's weights, once its head has been fine-tuned (section 4.3).

Both happen on rows that the supernet has not been trained on, drawn at random over the whole validation split: some to
tune heads, others to judge. Rows that it has seen would be fitted better by whatever they have been fitted with.

Tables and blocks are frozen, so the embeddings of the rows in question are looked up once for all candidates, and a
candidate's features once for all steps of its fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.errors import UserError
from embsearch_dist.methods.nasrec.config import NASRecConfig, ScoringConfig
from embsearch_dist.methods.nasrec.latency import LatencyTable
from embsearch_dist.methods.nasrec.model import Blocks
from embsearch_dist.methods.nasrec.supernet_stage import load_supernet
from embsearch_dist.networks.architecture import Architecture
from embsearch_dist.networks.canonical import key, prune
from embsearch_dist.networks.cost import network_cost
from embsearch_dist.networks.network import Weights, features
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run

CHUNK = 4096  # rows whose features are made at once: on a CPU, where they should stay in its cache
DEVICE_CHUNK = 16384  # and on a GPU, which waits for its host with fewer
_STREAM = 0x524F5753  # keeps the draw of rows apart from others that start from the seed
EPS = 1e-2  # of the fine-tuning's Adagrad, as in the published scripts


@dataclass(frozen=True)
class Rows:
    """Rows with their embeddings looked up: dense ``[n, I]``, u ``[n, F, width]``, label ``[n]``; on every rank all."""

    dense: torch.Tensor
    u: torch.Tensor
    label: torch.Tensor

    def part(self, which: slice) -> Rows:
        """Some of the rows, views of these."""
        return Rows(self.dense[which], self.u[which], self.label[which])


@dataclass(frozen=True)
class Score:
    """Of one candidate.

    Attributes:
        logloss: on the validation rows.
        flops: of the dense part, for one row.
        parameters: of the dense part.
        latency: predicted ms of a forward pass of 512 rows (:class:`LatencyTable`); 0 when it was not asked for.
    """

    logloss: float
    flops: int
    parameters: int
    latency: float = 0.0


def held_out_sizes(rows: int, config: ScoringConfig) -> tuple[int, int]:
    """How many of the validation split's ``rows`` heads are tuned on, and how many others are scored.

    Raises:
        UserError: the split has too few.
    """
    tune = min(config.tune_rows, rows // 2) if config.tune_steps else 0
    score = min(config.rows or rows, rows - tune)
    if not score or (config.tune_steps and not tune):
        raise UserError(
            f"the validation split has {rows} row(s), too few to tune heads on some and score others. Give it more, or "
            "set --search.scoring.tune_steps 0"
        )
    return tune, score


class Scorer:
    """Scores any number of candidates on the same rows; each rank may score others.

    Args:
        latency: what predicts their times; None: they have none.

    Raises:
        UserError: the supernet is missing or damaged, or a split has no rows.
    """

    def __init__(self, run: Run[NASRecConfig], latency: LatencyTable | None = None) -> None:
        search = run.config.search
        self.config, self.context = search.scoring, run.context
        self.latency = latency
        self.task = load_supernet(run)
        self.network, self.space = self.task.model.head, self.task.space
        self.columns, self.fields = len(run.schema.dense), len(run.schema.fields)
        batch = search.supernet.eval_batch_size
        self.tuning: Rows | None = None
        if self.config.held_out:
            self.tuning, self.validation = self._held_out(run, batch)
            return
        if self.config.tune_steps:
            self.tuning = self._look_up(run, "train", batch, self.config.tune_rows)
        self.validation = self._look_up(run, "validation", batch, self.config.rows)

    @torch.no_grad()
    def _held_out(self, run: Run, batch_size: int) -> tuple[Rows | None, Rows]:
        """Rows of the validation split to tune on and others to score, in the order in which they were drawn."""
        stream = run.stream("validation", batch_size, shuffle=False)
        tune, score = held_out_sizes(stream.rows, self.config)
        drawn = np.random.default_rng([_STREAM, run.config.run.seed]).permutation(stream.rows)[: tune + score]
        places = np.full(stream.rows, -1)
        places[drawn] = np.arange(len(drawn))
        parts: list[tuple[torch.Tensor, ...]] = []
        for number, batch in enumerate(stream.epoch(0)):
            b = batch.to(self.context.device)
            here, u = places[slice(*stream.share(number))], self.task.model.embed(b)
            own = torch.from_numpy(np.flatnonzero(here >= 0)).to(b.label.device)  # found here: no device waits for it
            picked = torch.from_numpy(here[here >= 0]).to(b.label.device)
            parts.append((b.dense[own], u[own], b.label[own], picked))
        columns = parts[0][0].shape[1]
        dense, *others = (torch.cat(p) for p in zip(*parts, strict=True))
        u, label, place = (all_rows(x, self.context) for x in others)
        dense = all_rows(dense, self.context) if columns else u.new_zeros(len(label), 0)
        order = torch.argsort(place)  # ranks have read other rows; every number of them has drawn the same
        rows = Rows(dense[order], u[order], label[order])
        return rows.part(slice(tune)) if tune else None, rows.part(slice(tune, None))

    @torch.no_grad()
    def _look_up(self, run: Run, split: str, batch_size: int, rows: int) -> Rows:
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        found = 0
        for batch in run.stream(split, batch_size, shuffle=split == "train").epoch(0):
            b = batch.to(self.context.device)
            u = self.task.model.embed(b)
            u, label = all_rows(u, self.context), all_rows(b.label, self.context)
            dense = all_rows(b.dense, self.context) if b.dense.shape[1] else u.new_zeros(len(label), 0)
            parts.append((dense, u, label))
            found += len(label)
            if rows and found >= rows:
                break
        if not parts:
            raise UserError(f"the {split} split has no rows to score candidates on")
        dense, u, label = (torch.cat(p)[: rows or None] for p in zip(*parts, strict=True))
        return Rows(dense, u.contiguous(), label)

    def rows_in_words(self) -> str:
        """Which rows candidates are tuned on and judged by, for the log."""
        score, tune = len(self.validation.label), 0 if self.tuning is None else len(self.tuning.label)
        drawn = ", drawn at random" if self.config.held_out else ", the first ones"
        where = "others of that split" if self.config.held_out else "rows of the training split"
        heads = f"heads are tuned on {tune:,} {where}" if tune else "heads stay as the supernet left them"
        return f"candidates are scored on {score:,} rows of the validation split{drawn}; {heads}"

    @torch.no_grad()
    def __call__(self, architecture: Architecture) -> Score:
        """Fine-tune the candidate's head and measure it. No collective: ranks need not score alike."""
        blocks = prune(architecture)
        weights = self.network.copies(blocks)
        weight = torch.cat([weights[n].reshape(-1) for n in ("head_dense", "head_sparse", "head_bias")])
        if self.tuning is not None:
            self._tune(blocks, weights, weight)
        losses = []
        for x, label in self._features(blocks, weights, self.validation):
            losses.append(binary_cross_entropy_with_logits(x @ weight, label, reduction="sum"))
        total = float(torch.stack(losses).double().sum())  # the one look at the device
        if not math.isfinite(total):
            raise UserError(
                f"candidate {key(architecture)}: its logloss is {total}, so the supernet's weights are of no use. "
                "Train it again with a lower --optim.dense_lr or a --optim.clip_norm, in another --run.dir"
            )
        cost = network_cost(architecture, self.space, self.columns, self.fields).total
        table, data = self.latency, (self.columns, self.fields)
        latency = table.predict(architecture, self.space, *data) if table is not None else 0.0
        return Score(total / len(self.validation.label), cost.flops, cost.parameters, latency)

    def _features(self, blocks: Blocks, weights: Weights, rows: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the head reads and a column of ones for its bias, ``[n, C + 1]``, and labels, chunk by chunk."""
        chunk = CHUNK if rows.u.device.type == "cpu" else DEVICE_CHUNK
        for start in range(0, len(rows.label), chunk):
            part = slice(start, start + chunk)
            d, s = features(blocks, weights, rows.dense[part], rows.u[part].transpose(1, 2))
            yield torch.cat([d, s.reshape(len(s), -1), d.new_ones(len(d), 1)], 1), rows.label[part]

    def _tune(self, blocks: Blocks, weights: Weights, weight: torch.Tensor) -> None:
        """Logistic regression on the frozen features, by Adagrad from the supernet's head on, which is changed.

        Steps take the rows in turn; where they do not fill the last step, it goes on with the first ones.
        """
        assert self.tuning is not None
        c = self.config
        parts = [x for x, _ in self._features(blocks, weights, self.tuning)]
        x, label = torch.cat(parts), self.tuning.label
        del parts
        sums = torch.zeros_like(weight)
        size = min(c.tune_batch, len(label))
        for step in range(c.tune_steps):
            start = step * size % len(label)
            rows, clicked = x[start : start + size], label[start : start + size]
            if over := size - len(clicked):
                rows, clicked = torch.cat([rows, x[:over]]), torch.cat([clicked, label[:over]])
            g = (torch.sigmoid(rows @ weight) - clicked).div_(size) @ rows
            lr = c.tune_lr * 0.5 * (1 + math.cos(math.pi * step / c.tune_steps))
            sums.addcmul_(g, g)
            weight.addcdiv_(g, sums.sqrt().add_(EPS), value=-lr)


def all_rows(tensor: torch.Tensor, context: Context) -> torch.Tensor:
    """The rows of all ranks, in rank order; of tensors with something in a row."""
    if context.world_size == 1:
        return tensor
    return context.gather(tensor.reshape(-1)).view(-1, *tensor.shape[1:])
