"""Adaptive Sampling (AdaS&S Eq. 4-6) and the sampling modes it is compared with (Table 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import layer_norm

from embsearch_dist.errors import UserError
from embsearch_dist.methods.adass.config import SamplingConfig
from embsearch_dist.schema import Schema

RANDOM_KEEP = 0.6  # "selects a feature with the probability p = 0.6" (section 4.4.3)


class Sampler:
    """Draws subnets: a candidate per field from P_E, then which fields take part from P_F.

    Both are held as logits. ``P_E`` becomes a softmax with a floor under every candidate, ``P_F`` a sigmoid
    between ``floor_f`` and 1. A candidate without columns (width 0) has nothing to train, and ``P_F`` already says
    how often a field is dropped: such a candidate takes no part in Eq. 5 and is drawn with the floor, no more.
    A candidate that is not ``distinct`` is never drawn.

    A draw depends on (seed, step, rank) alone, so a continued run draws what the unbroken one would have drawn.

    Attributes:
        widest, narrowest: ``[F]`` int64, the last and the first distinct candidate with columns of each field.
        initial: ``[F, T]`` what :meth:`start` was given; None until then.
    """

    def __init__(
        self,
        config: SamplingConfig,
        schema: Schema,
        candidates: Sequence[int],
        seed: int,
        warmup_steps: int = 0,
        distinct: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            warmup_steps: until then a step trains the widest subnet with a probability that falls from 1 to 0.
                Fields that matter only together are slow to start while one of them is often cut short.
            distinct: ``[F, T]`` bool of :func:`embsearch_dist.methods.adass.distinct.distinct_candidates`; None: all.
        """
        self.config, self.seed, self.warmup_steps = config, seed, warmup_steps
        fields, count = len(schema.fields), len(candidates)
        self.distinct = torch.ones(fields, count, dtype=torch.bool) if distinct is None else distinct
        self.trained = self.distinct & torch.tensor([d > 0 for d in candidates])
        places = torch.arange(count).expand(fields, count)
        self.widest = places.masked_fill(~self.trained, -1).amax(1)
        self.narrowest = places.masked_fill(~self.trained, count).amin(1)
        self.logits_e = torch.zeros(fields, count)  # those of candidates that are not ``trained`` mean nothing
        low = config.floor_f
        self.logits_f = torch.full((fields,), _logit((config.keep_start - low) / (1 - low)))
        self.initial: torch.Tensor | None = None
        self.fixed = _fixed(config.mode, schema, candidates, self.distinct)

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P_E ``[F, T]`` (rows sum to 1) and the keep probabilities P_F ``[F]``."""
        if self.fixed is not None:
            return self.fixed
        floor_e, floor_f = self.config.floor_e, self.config.floor_f
        shared = (1 - self.distinct.sum(1, keepdim=True).double() * floor_e).float()
        logits = self.logits_e.masked_fill(~self.trained, -math.inf)
        p_e = (floor_e + shared * logits.softmax(1)) * self.distinct
        return p_e, floor_f + (1 - floor_f) * self.logits_f.sigmoid()

    def draw(self, step: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """One subnet: candidate index ``[F]`` int64 and kept fields ``[F]`` bool, at least one kept."""
        generator = self._generator(step, rank)
        return self._whole() if self._warms_up(step, generator) else self._sample(generator)

    def draw_all(self, step: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The subnets of one step, ``[K, F]`` each: what :meth:`draw` gives, or with ``subnets`` above 1 the sandwich:
        the widest, the narrowest and K - 2 sampled ones; in a step of the warm-up the widest alone."""
        if self.config.subnets == 1:
            drawn = [self.draw(step, rank)]
        else:
            generator = self._generator(step, rank)
            drawn = [self._whole()]
            if not self._warms_up(step, generator):
                drawn.append((self.narrowest, torch.ones_like(drawn[0][1])))
                drawn += [self._sample(generator) for _ in range(self.config.subnets - 2)]
        choices, keeps = zip(*drawn, strict=True)
        return torch.stack(choices), torch.stack(keeps)

    def _generator(self, step: int, rank: int) -> torch.Generator:
        stream = 0 if self.config.same_subnet else rank
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1021 + stream)

    def _warms_up(self, step: int, generator: torch.Generator) -> bool:
        if step >= self.warmup_steps:
            return False
        return float(torch.rand((), generator=generator)) >= step / self.warmup_steps

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.widest, torch.ones(len(self.widest), dtype=torch.bool)

    def _sample(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        p_e, p_f = self.probabilities()
        choice = torch.multinomial(p_e, 1, generator=generator).squeeze(1)
        keep = torch.rand(len(p_f), generator=generator) < p_f
        if not keep.any():
            keep[int(torch.randint(len(p_f), (1,), generator=generator))] = True
        return choice, keep

    @property
    def adaptive(self) -> bool:
        return self.fixed is None

    def due(self, step: int) -> bool:
        """Whether the step that follows ``step`` done ones updates P_E and P_F."""
        return self.adaptive and (step + 1) % self.config.update_every == 0

    @property
    def by_growth(self) -> bool:
        """Whether :meth:`update` compares growth, and so needs :meth:`start`."""
        return self.adaptive and self.config.eq5 == "growth"

    def start(self, variance: torch.Tensor) -> None:
        """Note ``[F, T]`` the variance that each candidate's columns have before the first step."""
        self.initial = variance.double()

    def update(self, variance: torch.Tensor, gradient: torch.Tensor, size: torch.Tensor) -> None:
        """One step of Eq. 5 and Eq. 6.

        Args:
            variance: ``[F, T]`` variance of each candidate's values. The printed Eq. 5 averages the candidate
                index away; read per candidate, lower variance = less trained = drawn more often. That of a
                candidate without columns is not looked at: it is 0 for ever, the least of all. By growth it is that
                of :func:`own_columns`, compared with :meth:`start`'s.
            gradient: ``[F]`` mean magnitude of dL/dE over batch and columns.
            size: ``[F]`` mean magnitude of E. Gradients are orders of magnitude smaller than values, so each
                is divided by its mean over the fields before lambda weighs them.

        Raises:
            UserError: by growth, in a training that an older version began without :meth:`start`.
        """
        c = self.config
        if c.eq5 == "growth":
            self._follow_growth(variance.double())
        else:
            self._follow_layernorm(variance)
        importance = c.lambda_fs * _relative(gradient) + (1 - c.lambda_fs) * _relative(size)
        self.logits_f = (self.logits_f + c.eta_f * _normalise(importance)).clamp(-4.0, 4.0)

    def _follow_growth(self, variance: torch.Tensor) -> None:
        """Each logit goes the share ``eta_e`` of the way to its target: how much less (in logs) than the field's mean
        the candidate has grown, cut off at ``clip_e``. So a logit says what is, not how long it has been so, and no
        candidate is drawn more than exp(2 clip_e) times as often as another of its field."""
        if self.initial is None:
            raise UserError(
                "this supernet was begun by a version that has not noted its first variances. Start anew with "
                "--run.overwrite true, or go on with --search.sampling.eq5 layernorm in a run directory of that version"
            )
        known = self.trained & (self.initial > 0) & (variance > 0)
        growth = torch.where(known, variance / self.initial, 1.0).log()
        mean = growth.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        target = (mean - growth).clamp(-self.config.clip_e, self.config.clip_e) * known
        self.logits_e = self.logits_e + self.config.eta_e * (target.float() - self.logits_e)

    def _follow_layernorm(self, variance: torch.Tensor) -> None:
        """The printed step, with LayerNorm over the candidates that are trained; fields with the same ones together."""
        c = self.config
        for own in self.trained.unique(dim=0):
            fields = (self.trained == own).all(1)
            places = torch.meshgrid(fields.nonzero()[:, 0], own.nonzero()[:, 0], indexing="ij")
            logits = self.logits_e[places] - c.eta_e * _normalise(variance[places])
            # A floor of eps leaves 1 - T eps to the softmax; past this spread the rest is not noticeable
            # any more, and a candidate would need long to come back.
            count = int(self.distinct[fields][0].sum())
            spread = math.log((1 - count * c.floor_e) / c.floor_e)
            self.logits_e[places] = (logits - logits.amax(1, keepdim=True)).clamp(min=-spread)

    def state(self) -> dict[str, Any]:
        initial = None if self.initial is None else self.initial.tolist()
        return {"logits_e": self.logits_e.tolist(), "logits_f": self.logits_f.tolist(), "initial": initial}

    def load_state(self, state: dict[str, Any]) -> None:
        self.logits_e, self.logits_f = torch.tensor(state["logits_e"]), torch.tensor(state["logits_f"])
        initial = state.get("initial")
        self.initial = None if initial is None else torch.tensor(initial, dtype=torch.float64)


def own_columns(columns: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The columns that no narrower candidate reads: all of an independent one's, of a shared one's the added ones.

    Growth compares these: the leading columns of a max-table are trained by every candidate that reads them.
    """
    found, read = [], 0
    for start, stop in columns:
        found.append((max(start, read), stop))
        read = max(read, stop)
    return found


def candidate_variance(sums: torch.Tensor, rows: torch.Tensor, columns: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Variance of every candidate's values from column sums of the whole table.

    Args:
        sums: ``[F, width, 3]`` from :func:`embsearch_dist.sharding.statistics.column_sums`.
        rows: ``[F]`` rows of each table.
        columns: column range of each candidate.

    Returns:
        ``[F, T]``; 0 for a candidate without columns.
    """
    out = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for j, (start, stop) in enumerate(columns):
        if stop > start:
            count = rows * (stop - start)
            part = sums[:, start:stop].sum(1)
            out[:, j] = (part[:, 1] / count - (part[:, 0] / count).square()).clamp(min=0)
    return out


def column_variance(sums: torch.Tensor, rows: torch.Tensor, columns: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Mean over a candidate's columns of the variance of each, the arguments as in :func:`candidate_variance`.

    A column's mean is left out: behind a linear map it is a bias of the field.

    Returns:
        ``[F, T]``; 0 for a candidate without columns.
    """
    each = (sums[..., 1] / rows[:, None] - (sums[..., 0] / rows[:, None]).square()).clamp(min=0)
    means = [each[:, a:b].mean(1) if b > a else torch.zeros_like(rows) for a, b in columns]
    return torch.stack(means, 1)


def _fixed(
    mode: str, schema: Schema, candidates: Sequence[int], distinct: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Constant P_E and P_F of the modes of Table 4; None for adaptive."""
    fields = len(schema.fields)
    even = distinct.float()
    by_width = torch.tensor(candidates, dtype=torch.float32).clamp(min=1) * even
    proportional = by_width / by_width.sum(1, keepdim=True)
    if mode == "random":
        return even / even.sum(1, keepdim=True), torch.full((fields,), RANDOM_KEEP)
    if mode == "vanilla_uniform":
        return proportional, torch.ones(fields)
    if mode == "weighted_uniform":
        # "features with larger cardinality will have larger weight": from the random mode's rate up to 1.
        weight = torch.tensor(schema.cardinalities, dtype=torch.float32).log1p()
        return proportional, RANDOM_KEEP + (1 - RANDOM_KEEP) * weight / weight.max()
    return None


def _normalise(x: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis, without scale and shift; values may be tiny, so eps is relative."""
    x = x.double()
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    return layer_norm(x, x.shape[-1:], eps=1e-8).float()


def _relative(x: torch.Tensor) -> torch.Tensor:
    return x.double() / x.double().mean().clamp(min=1e-300)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
