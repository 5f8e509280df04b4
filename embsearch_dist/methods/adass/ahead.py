"""Subnets of the steps to come, drawn together: on a GPU they travel there in one copy, not in two a step."""

from __future__ import annotations

import torch

from embsearch_dist.dist.context import Context
from embsearch_dist.methods.adass.sampling import Sampler

AHEAD = 128  # steps at most; some 50 microseconds of drawing each


class Subnets:
    """What ``sampler.draw`` gives this rank for each step, on the rank's device.

    A draw depends on (seed, step, rank), P_E and P_F, and the last two stay as they are up to the next update. So
    subnets are drawn up to there, and again when the sampler's logits were replaced or written (an update, a loaded
    state).
    """

    def __init__(self, sampler: Sampler, context: Context) -> None:
        self.sampler, self.context = sampler, context
        self._first = 0
        self._drawn: list[tuple[torch.Tensor, torch.Tensor]] = []  # as drawn, on the CPU
        self._choices = self._keeps = torch.empty(0)
        self._of: list[tuple[torch.Tensor, int]] = []

    def of(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidate index ``[F]`` int64 and kept fields ``[F]`` bool of the step after ``step`` done ones."""
        place = self._place(step)
        return self._choices[place], self._keeps[place]

    def kept(self, step: int) -> torch.Tensor:
        """The kept fields' numbers ``[K]`` int64, ascending; found on the CPU, where nothing waits for them."""
        return self._drawn[self._place(step)][1].nonzero().squeeze(1).to(self.context.device)

    def _place(self, step: int) -> int:
        same = bool(self._of) and all(
            a is b and seen == now for (a, seen), (b, now) in zip(self._of, self._logits, strict=True)
        )
        if not same or not self._first <= step < self._first + len(self._drawn):
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
        self._drawn = [self.sampler.draw(step, self.context.rank) for step in range(first, last + 1)]
        choices, keeps = (torch.stack(t) for t in zip(*self._drawn, strict=True))
        both = torch.stack([choices, keeps.to(choices.dtype)]).to(self.context.device)
        self._choices, self._keeps = both[0], both[1].bool()
