"""The search policy and its training (AdaS&S section 3.2, Eq. 8 and 9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.methods.adass.config import PolicyConfig

FAR = 1e4  # a logit so far below the others has probability 0, and unlike -inf none of its products is NaN


class Policy(nn.Module):
    """Transformer over the fields: state (chosen candidate per field) -> logits of the next choice.

    A token is the sum of a field's embedding and its current candidate's embedding. Every field has an output
    layer of its own: behind a shared one, "wider is better" for most fields becomes so for all of them.
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
        # Starts at the uniform distribution: nothing is preferred before a reward was seen.
        self.weight = nn.Parameter(torch.zeros(fields, width, candidates))
        self.bias = nn.Parameter(torch.zeros(fields, candidates))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """``state [B, F]`` int64 -> logits ``[B, F, T]``."""
        hidden = self.encoder(self.field + self.candidate(state))
        return torch.einsum("bfw,fwt->bft", hidden, self.weight) + self.bias


class AdditiveValue:
    """Running ridge regression of rewards on choices: what each (field, candidate) adds to the reward.

    It is a control variate, not a model to search on: see :func:`factored_advantage`.
    """

    def __init__(self, fields: int, candidates: int, decay: float = 0.95, ridge: float = 1.0) -> None:
        self.decay, self.ridge = decay, ridge
        size = fields * candidates
        self.shape = (fields, candidates)
        self.moments = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        self.targets = torch.zeros(size + 1, dtype=torch.float64)

    def update(self, choices: torch.Tensor, rewards: torch.Tensor) -> None:
        """``choices [K, F]``, ``rewards [K]``; older ones count ``decay`` times less per call."""
        hot = functional.one_hot(choices, self.shape[1]).flatten(1).double()
        hot = torch.cat([hot, torch.ones(len(hot), 1, dtype=torch.float64)], 1)
        self.moments = self.decay * self.moments + hot.T @ hot
        self.targets = self.decay * self.targets + hot.T @ rewards.double()

    def values(self) -> torch.Tensor:
        """``[F, T]``: the fitted contributions; zeros before the first update."""
        if not self.moments.any():
            return torch.zeros(self.shape)
        penalty = torch.full((len(self.moments),), self.ridge, dtype=torch.float64)
        penalty[-1] = 1e-6  # the mean reward is not shrunk
        solution = torch.linalg.solve(self.moments + penalty.diag(), self.targets)
        return solution[:-1].view(self.shape).float()


def factored_advantage(rewards: torch.Tensor, choices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Advantage of each field's choice ``[K, F]``: the reward less what the *other* fields' choices add to it.

    Given the state the policy draws the fields independently, so a baseline of field f may look at all other
    fields' choices and leaves the gradient unbiased (action-dependent factorized baselines, Wu et al. 2018,
    section 4). What remains is the mean over the other subnets of the step.

    Args:
        rewards: ``[K]``.
        choices: ``[K, F]`` candidate indices.
        values: ``[F, T]``, fitted on earlier steps only.
    """
    own = values.T.gather(0, choices)
    rest = (rewards - own.sum(1))[:, None] + own
    return rest - (rest.sum(0) - rest) / (len(rest) - 1)


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
    allowed: torch.Tensor | None = None,
    column_price: torch.Tensor | None = None,
) -> torch.Tensor:
    """REINFORCE over subnets; returns the final probabilities P ``[F, T]``.

    The batch runs ``config.batch`` tracks side by side: the action of one step is the state of the next.
    Baselines are per field (:func:`factored_advantage`).

    Args:
        score: ``[K, F]`` candidate indices -> metrics of each.
        costs: ``[F, T]`` costs of Eq. 9.
        absolute_costs: ``[F, T]`` costs in the budget's unit.
        budget: when given, a multiplier on the expected cost rises while it exceeds the budget (dual
            ascent), so that P ends near allocations that are affordable.
        allowed: ``[F, T]`` bool, candidates that may be drawn; P is 0 at all others.
        column_price: ``[T]``, what a field with each candidate takes from the reward, before ``reward_weight``.
    """
    fields, candidates = costs.shape
    price = config.lambda_r * costs
    if column_price is not None:
        price = price + fields * config.reward_weight * column_price
    closed = torch.zeros(costs.shape, dtype=torch.bool) if allowed is None else ~allowed
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(fields, candidates, config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
    value = AdditiveValue(fields, candidates)
    state = nearest_allowed(torch.randint(candidates, (config.batch, fields), generator=generator), ~closed)
    multiplier, sign = 0.0, -1.0 if config.metric == "logloss" else 1.0
    for step in range(config.steps):
        logits = policy(state).masked_fill(closed, -FAR)
        p = logits.softmax(2)
        action = torch.multinomial(p.detach().flatten(0, 1), 1, generator=generator).view(config.batch, fields)
        reward = torch.tensor([sign * m[config.metric] for m in score(action)])
        advantage = config.reward_weight * factored_advantage(reward, action, value.values())
        value.update(action, reward)
        extra = penalty(p, price, 1.0, config.lambda_c)
        objective = _surrogate(logits, action, advantage) + extra
        expected = torch.zeros(()) if absolute_costs is None else (p * absolute_costs).sum((1, 2)).mean()
        if absolute_costs is not None and budget is not None:
            over = expected / budget - 1
            multiplier = max(0.0, multiplier + 0.02 * float(over.detach()))
            objective = objective + multiplier * over
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        optimizer.step()
        state = action
        if watch is not None:
            watch(_trace(step, reward, logits, p, extra, expected))
    with torch.no_grad():
        return policy(state).masked_fill(closed, -FAR).softmax(2).mean(0)


def _surrogate(logits: torch.Tensor, action: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """The scalar whose gradient is that of REINFORCE, downwards: ``-mean_k sum_f A_kf log P(a_kf)``."""
    log_p = logits.log_softmax(2).gather(2, action[..., None]).squeeze(2)
    return -(log_p * advantage).sum(1).mean()


def _trace(
    step: int,
    reward: torch.Tensor,
    logits: torch.Tensor,
    p: torch.Tensor,
    penalty: torch.Tensor,
    expected_cost: torch.Tensor,
) -> SearchTrace:
    """What one update shows of itself."""
    probabilities = p.detach()
    return SearchTrace(
        step=step,
        reward_mean=float(reward.mean()),
        reward_best=float(reward.max()),
        entropy=float(-(probabilities * logits.detach().log_softmax(2)).sum(2).mean()),
        penalty=float(penalty.detach()),
        expected_cost=float(expected_cost.detach()),
        p=probabilities.mean(0),
    )


def nearest_allowed(choices: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """``choices [K, F]`` with every candidate that is not allowed replaced by the nearest that is, the lower first."""
    distance = (torch.arange(allowed.shape[1])[:, None] - torch.arange(allowed.shape[1])).abs().double()
    # To which candidate each one goes: [F, T].
    nearest = distance.expand(len(allowed), -1, -1).masked_fill(~allowed[:, None], float("inf")).argmin(2)
    return nearest.gather(1, choices.T).T


def argmax_choice(p: torch.Tensor) -> list[int]:
    """``t*_m = argmax_t P_m`` (section 3.3)."""
    return p.argmax(1).tolist()
