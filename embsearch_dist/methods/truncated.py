"""The widest model with some of its fields cut down to fewer directions, without training anything again.

A field's pooled embedding is written in a basis of its own, most important direction first. Width r keeps the first r
directions and holds the others at their mean: that is what a narrower table could still say, the mean being a bias that
any model learns. Width 0 is the mean alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.methods.directions import Bases
from embsearch_dist.methods.widest import Moments, Sample, head_gradients, logits_of, unified
from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.quantised import rounded
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.metrics import score

CALIBRATION_STEPS = 12  # of Newton's method for two numbers
UNKNOWN = 1e30  # nats: the standard error of one row; finite, so that no evidence (0) times it is 0
PIECE_VALUES = 1 << 24  # unified embeddings of all candidates that are in hand at a time: 64 MiB


def logit_gram(model: SubnetModel, sample: Sample, context: Context) -> torch.Tensor:
    """``E[g g^T]`` per field, ``[F, w, w]`` float64; g: gradient of a row's logit by its pooled embedding."""
    fields, _, width = sample.x.shape
    found = Moments(fields, width, context.device)
    for piece in sample.pieces(_rows_of_piece(fields * width)):
        found.add(head_gradients(model, piece, lambda logits, labels: logits.sum()))
    found.sum(context)
    return found.second / found.count[:, None, None]


@dataclass(frozen=True)
class Changes:
    """Losses around an allocation, on the rows of all ranks.

    Attributes:
        loss: mean logloss of the allocation itself after calibration, in nats.
        rows: how many rows.
        more: ``[F, T]`` float64: mean loss with field f at candidate j and all others as they are, minus ``loss``.
        second: ``[F, T, T]`` float64: mean products of the rows' differences to their loss under the allocation.
        counts: ``[F]``: of how many rows the means of a field are; None: of all.
    """

    loss: float
    rows: int
    more: torch.Tensor
    second: torch.Tensor
    counts: torch.Tensor | None = None

    def gain(self, field: int, narrow: int, wide: int) -> tuple[float, float]:
        """How much less loss candidate ``wide`` has than ``narrow``, and the standard error, paired by row.

        One row has no spread: its error is :data:`UNKNOWN`, which no gain exceeds, and not 0, which any would.
        """
        mean = float(self.more[field, narrow] - self.more[field, wide])
        m = self.second[field]
        variance = float(m[narrow, narrow] + m[wide, wide] - 2 * m[narrow, wide]) - mean**2
        rows = self.rows if self.counts is None else int(self.counts[field])
        return mean, (max(variance, 0.0) / (rows - 1)) ** 0.5 if rows > 1 else UNKNOWN

    def ordered(self, order: Sequence[int]) -> Changes:
        """The same with the candidates in another order: place k has candidate ``order[k]``."""
        places = list(order)
        return replace(self, more=self.more[:, places], second=self.second[:, places][:, :, places])


class ChangeSums:
    """Sums over this rank's rows, piece by piece, that make :class:`Changes`."""

    def __init__(self, fields: int, candidates: int, device: torch.device) -> None:
        self.loss = torch.zeros(1, dtype=torch.float64, device=device)
        self.more = torch.zeros(fields, candidates, dtype=torch.float64, device=device)
        self.second = torch.zeros(fields, candidates, candidates, dtype=torch.float64, device=device)
        self.counts = torch.zeros(fields, dtype=torch.float64, device=device)

    def add(self, field: int, own: int, losses: torch.Tensor, now: torch.Tensor, known: torch.Tensor | None) -> None:
        """Losses ``[T, n]`` of some rows with ``field`` at each candidate, beside those ``now [n]`` at its ``own`` one.

        ``known [n]`` bool: rows that compare this field's candidates; None: all.
        """
        difference = (losses - now).double()
        # Rounding would pass for a difference where there is none.
        difference[own] = 0
        if known is not None:
            difference[:, ~known] = 0
        self.counts[field] += len(now) if known is None else known.sum()
        self.more[field] += difference.sum(1)
        self.second[field] += difference @ difference.T

    def changes(self, rows: int, context: Context) -> Changes:
        """Of the rows of all ranks, ``rows`` together."""
        for part in (self.loss, self.more, self.second, self.counts):
            context.sum(part)
        of = self.counts.clamp(min=1)
        more, second = (self.more / of[:, None]).cpu(), (self.second / of[:, None, None]).cpu()
        return Changes(float(self.loss) / rows, rows, more, second, self.counts.cpu())


class Truncated(ABC):
    """What a search by measured losses asks of a model that can be cut down.

    Attributes:
        context: of this rank.
        fields: F, how many tables can be cut down.
        rows: that are measured, on all ranks; ``own_rows`` of them on this one.
    """

    context: Context
    fields: int
    rows: int
    own_rows: int

    @abstractmethod
    def calibrated(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> torch.Tensor:
        """Loss ``[n]`` of each of this rank's rows with field f at rank ``ranks[f]``, stored at ``precisions[f]``.

        It is that of ``scale * logit + shift``, with what fits best.
        """

    @abstractmethod
    def metrics(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> dict[str, float]:
        """AUC, logloss, accuracy and rows of the logits as they are, over the rows of all ranks."""

    @abstractmethod
    def knowing(self, fields: Sequence[int]) -> torch.Tensor:
        """``[n]`` bool: this rank's rows that hold a value with an id of its own of each of these fields."""

    @abstractmethod
    def known_shares(self) -> torch.Tensor:
        """``[F]`` float64: the share of the rows of all ranks that hold a value with an id of its own of each field."""

    @abstractmethod
    def again(self) -> torch.Tensor:
        """``[F]`` float64: how often an id comes again in the split (:meth:`Repeats.again`); NaN: not counted."""

    @abstractmethod
    def changes(
        self,
        choice: Sequence[int],
        candidates: Sequence[int],
        precisions: Sequence[str] = (),
        tick: Callable[[int], None] = lambda rows: None,
        known: bool = False,
    ) -> Changes:
        """What every change of one field does: ``choice [F]`` indices into ``candidates [T]``.

        ``precisions [T]``: what each candidate is stored at; none for the training's own. ``tick`` is called now and
        then with how many of this rank's rows were measured. ``known``: a field's candidates are compared on the rows
        that hold a value of it with an id of its own, and on no others.
        """

    def paired(self, one: torch.Tensor, other: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
        """By how much losses ``one [n]`` lie above ``other`` on average over the rows ``[n]`` bool of all ranks, and
        the standard error; :data:`UNKNOWN` where there is no more than one."""
        difference = (one - other)[rows]
        sums = torch.stack([difference.sum(), difference.square().sum(), rows.sum().double()])
        total, squares, count = self.context.sum(sums).tolist()
        mean = total / max(count, 1.0)
        variance = max(squares / max(count, 1.0) - mean**2, 0.0)
        return mean, (variance / (count - 1)) ** 0.5 if count > 1 else UNKNOWN


class TruncatedModel(Truncated):
    """Losses of truncations of one trained model on a fixed sample of rows.

    Every backbone of :class:`Backbone` is a sum over fields up to its first non-linearity, so changing one field costs
    that field's share and the later layers; any other head is computed whole.
    """

    def __init__(self, model: SubnetModel, sample: Sample, bases: Bases, context: Context) -> None:
        """On a sample of one class the AUC of :meth:`metrics` is NaN."""
        self.head, self.sample, self.bases, self.context = model.bare_head, sample, bases, context
        self.fields, self.own_rows = sample.x.shape[0], len(sample.label)
        self.rows = int(context.sum(torch.tensor([float(len(sample.label))], device=context.device).double()))
        # A dropped field takes its values' weights along, but for their mean, as for the embedding's.
        self.mean_values = context.sum(sample.values.double().sum(0)).div(self.rows).float()

    @torch.no_grad()
    def logits(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> torch.Tensor:
        """Logits ``[n]`` of this rank's rows with field f at rank ``ranks[f]``, stored at ``precisions[f]``."""
        kept = torch.tensor(list(ranks), device=self.context.device)
        parts = []
        for piece in self.sample.pieces(_rows_of_piece(self.sample.x.shape[0] * self.sample.x.shape[2])):
            coefficients = self.bases.coefficients(piece.x)
            for f, (rank, precision) in enumerate(zip(ranks, precisions, strict=False)):
                coefficients[f] = as_stored(coefficients[f], rank, precision)
            x = self.bases.embeddings(coefficients, kept)
            values = piece.values
            if values.shape[1]:
                values = torch.where(kept > 0, values, self.mean_values)
            parts.append(logits_of(self.head, unified(self.head, x), piece.dense, values).float())
        return torch.cat(parts)

    def metrics(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> dict[str, float]:
        logits, labels = self.context.gather(self.logits(ranks, precisions)), self.context.gather(self.sample.label)
        return score(logits.cpu(), labels.cpu())

    def calibrated(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> torch.Tensor:
        own = self.logits(ranks, precisions)
        scale, shift = calibration(own, self.sample.label, self.context)
        return losses_of(scale * own + shift, self.sample.label).double()

    def knowing(self, fields: Sequence[int]) -> torch.Tensor:
        if self.sample.known is None or not fields:
            return torch.ones_like(self.sample.label, dtype=torch.bool)
        return self.sample.known[list(fields)].all(0)

    def known_shares(self) -> torch.Tensor:
        own = torch.stack([self.knowing([f]).sum() for f in range(self.fields)]).double()
        return self.context.sum(own).cpu() / max(self.rows, 1)

    def again(self) -> torch.Tensor:
        counted = self.sample.again
        return torch.full((self.fields,), torch.nan, dtype=torch.float64) if counted is None else counted

    @torch.no_grad()
    def changes(
        self,
        choice: Sequence[int],
        candidates: Sequence[int],
        precisions: Sequence[str] = (),
        tick: Callable[[int], None] = lambda rows: None,
        known: bool = False,
    ) -> Changes:
        """As :meth:`Truncated.changes` says.

        Losses are those of ``scale * logit + shift``, which fit the allocation itself best. A model that has learned
        too much by heart is too sure of itself: without that, each direction less would look like a gain.
        """
        own = self.logits([candidates[j] for j in choice], [precisions[j] for j in choice] if precisions else ())
        scale, shift = calibration(own, self.sample.label, self.context)
        fields, count = len(choice), len(candidates)
        device = self.context.device
        picked, everywhere = torch.tensor(list(choice), device=device), torch.arange(fields, device=device)
        sums = ChangeSums(fields, count, device)
        depth = unified(self.head, self.sample.x[:, :1]).shape[2]
        numbers = fields * count * max(self.sample.x.shape[2], depth)
        for piece in self.sample.pieces(_rows_of_piece(numbers)):
            options = self._unified(piece, candidates, precisions)
            current = options[picked, :, everywhere].transpose(0, 1)
            none = torch.tensor([width == 0 for width in candidates], device=device)
            values = piece.values
            if values.shape[1]:
                values = torch.where(none[picked], self.mean_values, values)
            now = losses_of(scale * logits_of(self.head, current, piece.dense, values) + shift, piece.label)
            sums.loss += now.double().sum()
            for f, logits in enumerate(self._one_changed(current, options, piece.dense, values)):
                if values.shape[1]:
                    new = torch.where(none[:, None], self.mean_values[f], piece.values[:, f])
                    logits = logits + new - values[:, f]
                counted = piece.known[f] if known and piece.known is not None else None
                sums.add(f, choice[f], losses_of(scale * logits + shift, piece.label), now, counted)
            tick(len(piece.label))
        return sums.changes(self.rows, self.context)

    def _unified(self, piece: Sample, candidates: Sequence[int], precisions: Sequence[str]) -> torch.Tensor:
        """``[T, n, F, d]``: what the backbone gets of each field at each candidate."""
        coefficients, out = self.bases.coefficients(piece.x), []
        for width, precision in zip(candidates, precisions or [""] * len(candidates), strict=True):
            ranks = torch.full((len(piece.x),), width, device=piece.x.device)
            own = as_stored(coefficients, width, precision)
            out.append(unified(self.head, self.bases.embeddings(own, ranks)))
        return torch.stack(out)

    def _one_changed(
        self, current: torch.Tensor, options: torch.Tensor, dense: torch.Tensor, values: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Per field the logits ``[T, n]`` with that field at each candidate; ``current [n, F, d]`` otherwise.

        ``values [n, F]``: the values' own weights under the current allocation, and here in each changed one too.
        """
        backbone = self.head.backbone
        count, rows, fields, _ = options.shape
        if not isinstance(backbone, Backbone):
            for f in range(fields):
                changed = current.expand(count, -1, -1, -1).clone()
                changed[:, :, f] = options[:, :, f]
                yield torch.stack([logits_of(self.head, u, dense, values) for u in changed])
            return
        linear, first = backbone.dense_terms(dense)
        linear = linear + values.sum(1)
        for f in range(fields):
            own = backbone.field_terms(f, current[:, f])
            linear, first = linear + own[0], first + own[1]
        total, squares = current.sum(1), current.square().sum(2)
        for f in range(fields):
            new = options[:, :, f]
            delta = new - current[:, f]
            more, hidden = backbone.field_terms(f, delta.flatten(0, 1))
            logits = linear + more.view(count, rows)
            if backbone.fm:
                own_squares = squares.sum(1) - squares[:, f] + new.square().sum(2)
                logits = logits + 0.5 * ((total + delta).square().sum(2) - own_squares)
            if backbone.deep:
                into = (first + hidden.view(count, rows, -1)).flatten(0, 1)
                logits = logits + backbone.rest(into).view(count, rows)
            yield logits

    def saliency(self, model: SubnetModel) -> torch.Tensor:
        """``[F, w]`` float64: mean over rows of ``|dL/dc_k * c_k|``, c_k the coefficient of direction k.

        SSEDS (Qu et al. 2022) sums the signed products before it takes the magnitude; at the minimum of the loss that
        sum is zero for every column.
        """
        fields, _, width = self.sample.x.shape
        found = torch.zeros(fields, width, dtype=torch.float64, device=self.context.device)
        for piece in self.sample.pieces(_rows_of_piece(fields * width)):
            g = head_gradients(model, piece, lambda logits, labels: losses_of(logits, labels).sum())
            along = torch.bmm(g, self.bases.synthesis.transpose(1, 2))
            found += (along * self.bases.coefficients(piece.x)).abs().double().sum(1)
        return (self.context.sum(found) / self.rows).cpu()


def as_stored(coefficients: torch.Tensor, rank: int, precision: str) -> torch.Tensor:
    """Coefficients ``[..., w]`` whose first ``rank`` come back from a row of a table at ``precision``.

    A row is rounded in steps of its range. Coefficients are sorted by size, the columns of a trained table are not: so
    they are rounded behind a rotation, the same one for every row and field, that spreads them over all columns.
    """
    if not rank or precision in ("", "fp32"):
        return coefficients
    rotation = _rotation(rank).to(coefficients.device)
    rows = coefficients[..., :rank] @ rotation
    back = rounded(rows.flatten(0, -2), precision, "of the search").view_as(rows) @ rotation.T
    return torch.cat([back, coefficients[..., rank:]], -1)


@cache
def _rotation(width: int) -> torch.Tensor:
    """A random orthogonal matrix, always the same."""
    generator = torch.Generator().manual_seed(width)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q.float()


def calibration(logits: torch.Tensor, labels: torch.Tensor, context: Context) -> tuple[float, float]:
    """Scale (at least 0.01) and shift of this rank's logits ``[n]`` of the least logloss over the rows of all ranks."""
    x = torch.stack([logits.double(), torch.ones_like(logits, dtype=torch.float64)])
    y = labels.double()
    found = torch.tensor([1.0, 0.0], dtype=torch.float64, device=logits.device)
    for _ in range(CALIBRATION_STEPS):
        p = (found @ x).sigmoid()
        sums = torch.cat([(x @ (p - y))[:, None], (x * (p * (1 - p)).clamp(min=1e-9)) @ x.T], 1)
        context.sum(sums)
        step = torch.linalg.lstsq(sums[:, 1:], sums[:, :1]).solution[:, 0]
        found = found - step.clamp(-1, 1)
        found[0].clamp_(min=0.01)
    return float(found[0]), float(found[1])


def losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row, shaped as ``logits [..., n]``."""
    return binary_cross_entropy_with_logits(logits, labels.expand_as(logits), reduction="none")


def _rows_of_piece(values: int) -> int:
    """Rows that are taken at a time when each needs so many values."""
    return max(64, min(8192, PIECE_VALUES // max(values, 1)))
