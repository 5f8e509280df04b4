"""Subnets of the steps to come, drawn together: on a GPU they travel there in one copy, not in two a step."""

from __future__ import annotations

import itertools

import torch

from embsearch_dist.methods.adass.sampling import Sampler
from embsearch_dist.ranks.context import Context

AHEAD = 128  # steps at most; some 50 microseconds of drawing each


class Subnets:
    """What ``sampler.draw_all`` gives this rank for each step, on the rank's device.

    A draw depends on (seed, step, rank), P_E and P_F, and the last two stay as they are up to the next update. So
    subnets are drawn up to there, and again when the sampler's logits were replaced or written (an update, a loaded
    state).
    """

    def __init__(self, sampler: Sampler, context: Context) -> None:
        self.sampler, self.context = sampler, context
        self._first = 0
        self._starts = [0]  # of each step's subnets among those drawn, and the end of the last
        self._kept: list[torch.Tensor] = []  # fields that some subnet of a step keeps, on the CPU
        self._choices = self._keeps = torch.empty(0)
        self._of: list[tuple[torch.Tensor, int]] = []

    def of(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidate indices ``[K, F]`` int64 and kept fields ``[K, F]`` bool of the step after ``step`` done ones."""
        place = self._place(step)
        own = slice(self._starts[place], self._starts[place + 1])
        return self._choices[own], self._keeps[own]

    def kept(self, step: int) -> torch.Tensor:
        """Numbers ``[k]`` int64, ascending, of the fields that some subnet keeps; found on the CPU, where nothing
        waits for them."""
        return self._kept[self._place(step)].nonzero().squeeze(1).to(self.context.device)

    def _place(self, step: int) -> int:
        same = bool(self._of) and all(
            a is b and seen == now for (a, seen), (b, now) in zip(self._of, self._logits, strict=True)
        )
        if not same or not self._first <= step < self._first + len(self._kept):
            self._draw(step)
        return step - self._first

    @property
    def _logits(self) -> list[tuple[torch.Tensor, int]]:
        """The tensors and how often each was written."""
        return [(t, t._version) for t in (self.sampler.logits_e, self.sampler.logits_f)]

    def _draw(self, first: int) -> None:
        last = first
        while last - first < AHEAD - 1 and not self.sampler.due(last):
            last += 1
        self._first, self._of = first, self._logits
        drawn = [self.sampler.draw_all(step, self.context.rank) for step in range(first, last + 1)]
        self._starts = [0, *itertools.accumulate(len(choices) for choices, _ in drawn)]
        self._kept = [keeps.any(0) for _, keeps in drawn]
        choices, keeps = (torch.cat(t) for t in zip(*drawn, strict=True))
        both = torch.stack([choices, keeps.to(choices.dtype)]).to(self.context.device)
        self._choices, self._keeps = both[0], both[1].bool()
