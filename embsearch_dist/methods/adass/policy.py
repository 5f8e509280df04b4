"""The search policy and its training (AdaS&S section 3.2, Eq. 8 and 9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from embsearch_dist.methods.adass.config import PolicyConfig


class Policy(nn.Module):
    """Transformer over the fields: state (chosen candidate per field) -> logits of the next choice.

    A token is the sum of a field's embedding and its current candidate's embedding.
    """

    def __init__(self, fields: int, candidates: int, config: PolicyConfig) -> None:
        super().__init__()
        width = config.model_width
        self.field = nn.Parameter(torch.randn(fields, width))
        self.candidate = nn.Embedding(candidates, width)
        # What field a token is must stand out from what it holds now, or all fields move as one.
        nn.init.normal_(self.candidate.weight, std=0.1)
        layer = nn.TransformerEncoderLayer(width, config.heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, candidates)
        # Starts at the uniform distribution: nothing is preferred before a reward was seen.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """``state [B, F]`` int64 -> logits ``[B, F, T]``."""
        return self.out(self.encoder(self.field + self.candidate(state)))


def penalty(p: torch.Tensor, costs: torch.Tensor, lambda_r: float, lambda_c: float) -> torch.Tensor:
    """Resource competition penalty (Eq. 9), averaged over the batch.

    Args:
        p: probabilities ``[B, F, T]``.
        costs: ``[F, T]``; the widths d_j themselves as printed, or parameters or bytes in units of a
            field of mean cardinality.
    """
    fields, candidates = costs.shape
    size = (p * costs).sum((1, 2)) / fields
    competition = (p - 1 / candidates).norm(dim=2).sum(1) / fields
    return (lambda_r * size - lambda_c * competition).mean()


@dataclass
class SearchTrace:
    """What one update of the policy saw."""

    step: int
    reward_mean: float
    reward_best: float
    entropy: float
    penalty: float
    expected_cost: float
    p: torch.Tensor


def search(
    score: Callable[[torch.Tensor], list[dict[str, float]]],
    costs: torch.Tensor,
    config: PolicyConfig,
    seed: int,
    absolute_costs: torch.Tensor | None = None,
    budget: float | None = None,
    watch: Callable[[SearchTrace], None] | None = None,
) -> torch.Tensor:
    """REINFORCE over subnets; returns the final probabilities P ``[F, T]``.

    The batch runs ``config.batch`` tracks side by side: the action of one step is the state of the next.
    A candidate's baseline is the mean reward of the others of its step, which moves with the policy and
    leaves the gradient unbiased.

    Args:
        score: ``[K, F]`` candidate indices -> metrics of each.
        costs: ``[F, T]`` costs of Eq. 9.
        absolute_costs: ``[F, T]`` costs in the budget's unit.
        budget: when given, a multiplier on the expected cost rises while it exceeds the budget (dual
            ascent), so that P ends near allocations that are affordable.
    """
    fields, candidates = costs.shape
    generator = torch.Generator().manual_seed(seed)
    state_before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    policy = Policy(fields, candidates, config)
    torch.random.set_rng_state(state_before)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
    state = torch.randint(candidates, (config.batch, fields), generator=generator)
    multiplier, sign = 0.0, -1.0 if config.metric == "logloss" else 1.0
    for step in range(config.steps):
        logits = policy(state)
        p = logits.softmax(2)
        action = torch.multinomial(p.detach().flatten(0, 1), 1, generator=generator).view(config.batch, fields)
        reward = torch.tensor([sign * m[config.metric] for m in score(action)])
        others = (reward.sum() - reward) / (len(reward) - 1)
        advantage = config.reward_weight * (reward - others)
        log_p = logits.log_softmax(2).gather(2, action[..., None]).squeeze(2).sum(1)
        extra = penalty(p, costs, config.lambda_r, config.lambda_c)
        objective = -(log_p * advantage).mean() + extra
        expected = torch.zeros(())
        if absolute_costs is not None:
            expected = (p * absolute_costs).sum((1, 2)).mean()
            if budget is not None:
                over = expected / budget - 1
                multiplier = max(0.0, multiplier + 0.02 * float(over.detach()))
                objective = objective + multiplier * over
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        optimizer.step()
        state = action
        if watch is not None:
            probabilities = p.detach()
            entropy = float(-(probabilities * logits.detach().log_softmax(2)).sum(2).mean())
            watch(
                SearchTrace(
                    step=step,
                    reward_mean=float(reward.mean()),
                    reward_best=float(reward.max()),
                    entropy=entropy,
                    penalty=float(extra.detach()),
                    expected_cost=float(expected.detach()),
                    p=probabilities.mean(0),
                )
            )
    with torch.no_grad():
        return policy(state).softmax(2).mean(0)


def argmax_choice(p: torch.Tensor) -> list[int]:
    """``t*_m = argmax_t P_m`` (section 3.3)."""
    return p.argmax(1).tolist()
