"""A choice among candidates per field, relaxed so that held-out rows can train it (DARTS; Gumbel-softmax).

A field has a logit for each of T candidates. With ``log p = log_softmax(logits)`` a step uses the weights ::

    w_t = exp((log p_t + g_t) / tau) / sum_s exp((log p_s + g_s) / tau),     g = -log(-log(uniform)) or 0

of the candidates (Jang et al. 2017, Eq. 2). As the temperature tau falls, w comes near to one candidate, drawn with
probability p where g is the Gumbel noise.
"""

from __future__ import annotations

import torch
from torch import nn

from embsearch_dist.methods.gated.config import RelaxConfig
from embsearch_dist.methods.noise import uniform_noise


class Choice(nn.Module):
    """Logits ``[F, T]``, all candidates alike at the start."""

    def __init__(self, fields: int, candidates: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(fields, candidates))

    def forward(self, temperature: float, uniform: torch.Tensor | None = None) -> torch.Tensor:
        """Weights ``[F, T]``, each row adds up to 1.

        Args:
            uniform: ``[F, T]`` in (0, 1), for Gumbel noise; None for none.
        """
        scores = torch.log_softmax(self.logits, 1)
        if uniform is not None:
            scores = scores - (-uniform.log()).log()
        return torch.softmax(scores / temperature, 1)


def step_noise(config: RelaxConfig, logits: torch.Tensor, seed: int, step: int, stream: int) -> torch.Tensor | None:
    """Uniform numbers ``[F, T]`` of a step, the same on every rank; None where the mode takes none.

    ``stream``: 0 for ordinary steps, 1 for outer ones.
    """
    if config.mode != "gumbel":
        return None
    fields, candidates = logits.shape
    even = candidates + candidates % 2
    noise = uniform_noise(seed * 4 + stream, step, 0, (fields, even), torch.device("cpu"))
    return noise[:, :candidates].to(logits.device)
