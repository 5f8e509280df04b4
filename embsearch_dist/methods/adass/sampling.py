"""Adaptive Sampling (AdaS&S Eq. 4-6) and the sampling modes it is compared with (Table 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import layer_norm

from embsearch_dist.methods.adass.config import SamplingConfig
from embsearch_dist.schema import Schema

RANDOM_KEEP = 0.6  # "selects a feature with the probability p = 0.6" (section 4.4.3)


class Sampler:
    """Draws subnets: a candidate per field from P_E, then which fields take part from P_F.

    Both are held as logits. ``P_E`` becomes a softmax with a floor under every candidate, ``P_F`` a sigmoid
    between ``floor_f`` and 1. A candidate without columns (width 0) has nothing to train, and ``P_F`` already says
    how often a field is dropped: such a candidate takes no part in Eq. 5 and is drawn with the floor, no more.

    A draw depends on (seed, step, rank) alone, so a continued run draws what the unbroken one would have drawn.
    """

    def __init__(
        self,
        config: SamplingConfig,
        schema: Schema,
        candidates: Sequence[int],
        seed: int,
        warmup_steps: int = 0,
    ) -> None:
        """``warmup_steps``: until then a step trains the widest subnet with a probability that falls from 1
        to 0. Fields that matter only together are slow to start while one of them is often cut short."""
        self.config, self.seed, self.warmup_steps = config, seed, warmup_steps
        fields, count = len(schema.fields), len(candidates)
        self.has_columns = torch.tensor([d > 0 for d in candidates])
        self.logits_e = torch.zeros(fields, count)  # those of a candidate without columns mean nothing
        low = config.floor_f
        self.logits_f = torch.full((fields,), _logit((config.keep_start - low) / (1 - low)))
        # A floor of eps leaves 1 - T eps to the softmax; past this spread the rest is not noticeable
        # any more, and a candidate would need long to come back.
        self.spread = math.log((1 - count * config.floor_e) / config.floor_e)
        self.fixed = _fixed(config.mode, schema, candidates)

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P_E ``[F, T]`` (rows sum to 1) and the keep probabilities P_F ``[F]``."""
        if self.fixed is not None:
            return self.fixed
        floor_e, floor_f = self.config.floor_e, self.config.floor_f
        count = self.logits_e.shape[1]
        logits = self.logits_e.masked_fill(~self.has_columns, -math.inf)
        p_e = floor_e + (1 - count * floor_e) * logits.softmax(1)
        return p_e, floor_f + (1 - floor_f) * self.logits_f.sigmoid()

    def draw(self, step: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """One subnet: candidate index ``[F]`` int64 and kept fields ``[F]`` bool, at least one kept."""
        stream = 0 if self.config.same_subnet else rank
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1021 + stream)
        p_e, p_f = self.probabilities()
        if step < self.warmup_steps and float(torch.rand((), generator=generator)) >= step / self.warmup_steps:
            return torch.full((len(p_f),), p_e.shape[1] - 1), torch.ones(len(p_f), dtype=torch.bool)
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

    def update(self, variance: torch.Tensor, gradient: torch.Tensor, size: torch.Tensor) -> None:
        """One step of Eq. 5 and Eq. 6.

        Args:
            variance: ``[F, T]`` variance of each candidate's values. The printed Eq. 5 averages the candidate
                index away; read per candidate, lower variance = less trained = drawn more often. That of a
                candidate without columns is not looked at: it is 0 for ever, the least of all.
            gradient: ``[F]`` mean magnitude of dL/dE over batch and columns.
            size: ``[F]`` mean magnitude of E. Gradients are orders of magnitude smaller than values, so each
                is divided by its mean over the fields before lambda weighs them.
        """
        c = self.config
        logits = self.logits_e[:, self.has_columns] - c.eta_e * _normalise(variance[:, self.has_columns])
        self.logits_e[:, self.has_columns] = (logits - logits.amax(1, keepdim=True)).clamp(min=-self.spread)
        importance = c.lambda_fs * _relative(gradient) + (1 - c.lambda_fs) * _relative(size)
        self.logits_f = (self.logits_f + c.eta_f * _normalise(importance)).clamp(-4.0, 4.0)

    def state(self) -> dict[str, Any]:
        return {"logits_e": self.logits_e.tolist(), "logits_f": self.logits_f.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.logits_e, self.logits_f = torch.tensor(state["logits_e"]), torch.tensor(state["logits_f"])


def candidate_variance(sums: torch.Tensor, rows: torch.Tensor, columns: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Variance of every candidate's values from column sums of the whole table.

    Args:
        sums: ``[F, width, 3]`` from :func:`embsearch_dist.dist.statistics.column_sums`.
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


def _fixed(mode: str, schema: Schema, candidates: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Constant P_E and P_F of the modes of Table 4; None for adaptive."""
    fields, count = len(schema.fields), len(candidates)
    proportional = torch.tensor(candidates, dtype=torch.float32).clamp(min=1).expand(fields, count)
    proportional = proportional / proportional.sum(1, keepdim=True)
    if mode == "random":
        return torch.full((fields, count), 1 / count), torch.full((fields,), RANDOM_KEEP)
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
