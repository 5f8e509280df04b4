"""What each candidate of each field is worth by measured losses, and the choice that a budget allows.

Evidence comes first: a wider candidate counts where held-out rows say so by more than their noise. What that leaves of
a budget may be spent by what training rows save.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embsearch_dist.methods.budget import knapsack, total_cost
from embsearch_dist.methods.truncated import Changes

LEAST_GAIN = 1e-6  # nats; below it lies the rounding of float32 logits
NEW = 0.5  # of the share of training rows that know a field: where fewer validation rows do, its values are mostly new
AGAIN = 1.0  # other training rows with the id of a row: of fewer, most of what a table saves there was learned by heart
SCALE = 1e4  # of the scores: the knapsack's solver stops within 1e-6 of the best sum


def supported(
    changes: Changes, evidence: float, held: torch.Tensor | None = None, widths: Sequence[int] | None = None
) -> torch.Tensor:
    """Worth ``[F, T]`` of each candidate of each field, in nats of logloss saved against the field's narrowest.

    A candidate is worth more than a narrower one only if its rows' losses, paired, are lower by more than ``evidence``
    standard errors. Else it is worth the same, so that nothing is paid for what noise may have given. What a field
    loses by a wider candidate does not count against it: the directions added last are the least important ones. That
    cannot be said of a narrower one that costs more because it is stored more finely: it has the worth of what is no
    wider than itself, or what it gains.

    To drop a field asks for evidence as well. One that does nothing for validation rows may have done much in training:
    user ids that are new in every later split take up there what items would have to explain without them. So unless
    some width of it is worse than none, and none is better, its first width is worth what it is on training rows.

    Args:
        changes: of candidates in the order of their cost.
        held: ``[F]``: worth of the first candidate above 0 on training rows; None where no candidate drops a field.
        widths: ``[T]``, of the candidates; None where they ascend.
    """
    fields, count = changes.more.shape
    wide = list(widths or range(count))
    worth = torch.zeros(fields, count, dtype=torch.float64)
    for f in range(fields):
        best, first = 0, 1
        if held is not None:
            gains = [changes.gain(f, 0, j) for j in range(1, count)]
            helps = any(gain > max(evidence * error, LEAST_GAIN) for gain, error in gains)
            hurts = any(gain < -max(evidence * error, LEAST_GAIN) for gain, error in gains)
            if helps or not hurts:
                worth[f, 1] = max(float(held[f]), gains[0][0], 0.0)
                best, first = 1, 2
        for j in range(first, count):
            gain, error = changes.gain(f, best, j)
            worth[f, j] = max(float(worth[f, i]) for i in range(j) if wide[i] <= wide[j])
            if gain > max(evidence * error, LEAST_GAIN):
                worth[f, j] = worth[f, best] + gain
                best = j
    return worth


def choose(worth: torch.Tensor, costs: torch.Tensor, limit: float | None, groups: int = 1) -> list[int]:
    """The candidates ``[F]`` of the highest summed worth whose cost is at most ``limit``; of equal worth the cheapest.

    Args:
        worth: ``[F, T]``.
        costs: ``[F, T]``, not falling along T; only the first may be 0.
        groups: F counts the fields of each, group by group, and each keeps at least one.

    Raises:
        ValueError: no choice fits.
    """
    bound = float(costs[:, -1].sum()) if limit is None else limit
    choice = knapsack(worth * (SCALE / max(float(worth.max()), 1e-30)), costs, bound, groups)
    choice = [cheapest_alike(worth[f], costs[f], j) for f, j in enumerate(choice)]
    own = len(choice) // groups
    for fields in (range(k * own, (k + 1) * own) for k in range(groups)):
        if not any(costs[f, choice[f]] for f in fields):  # all dropped is no model
            room = bound - total_cost(choice, costs)
            order = sorted(fields, key=lambda f: (-float(worth[f, 1]), float(costs[f, 1])))
            choice[next(f for f in order if float(costs[f, 1]) <= room)] = 1
    return within(choice, costs, bound)


def cheapest_alike(worth: torch.Tensor, costs: torch.Tensor, own: int) -> int:
    """The cheapest candidate of a field, by ``worth [T]`` and ``costs [T]``, that is worth no less than candidate
    ``own``; of equal cost the first."""
    alike = [j for j in range(len(worth)) if worth[j] >= worth[own]]
    return min(alike, key=lambda j: (float(costs[j]), j))


def within(choice: list[int], costs: torch.Tensor, limit: float) -> list[int]:
    """``choice [F]`` as it is. A budget is hard, so what has been changed after the knapsack is added up once more.

    Raises:
        ValueError: it costs more than ``limit`` under ``costs [F, T]``.
    """
    total = total_cost(choice, costs)
    if total > limit:
        raise ValueError(f"a choice that costs {total:,.0f} was found under a limit of {limit:,.0f}")
    return choice


def spend(
    choice: Sequence[int],
    changes: Changes,
    widths: Sequence[int],
    costs: torch.Tensor,
    limit: float,
    harms: torch.Tensor | None = None,
) -> list[int]:
    """What ``choice`` leaves of a budget, spent on wider candidates of kept fields by what they save on training rows.

    Where most validation rows are of users that training never met, no width of the users' table shows there, and none
    of what meets it. Who names a budget is ready to pay it, so what no evidence asks for goes to what training itself
    could use. Dropped fields stay dropped.

    Args:
        choice: candidates that evidence asks for.
        changes: around ``choice``, on training rows.
        widths: of the candidates.
        costs: ``[F, T]``, not falling along T.
        harms: ``[F, T]`` bool: candidates that validation rows speak against; None: they speak against none.

    Raises:
        ValueError: ``choice`` costs more than ``limit``.
    """
    worth = torch.full(costs.shape, -torch.inf, dtype=torch.float64)
    for f, j in enumerate(choice):
        stop = len(widths) if widths[j] else j + 1
        worth[f, j:stop] = rising(-changes.more[f, j:stop], widths[j:stop])
        if harms is not None:
            worth[f, j + 1 :][harms[f, j + 1 :]] = -torch.inf
    top = float(worth.max())
    if top <= LEAST_GAIN:
        return within(list(choice), costs, limit)
    found = knapsack(worth * (SCALE / top), costs, limit)
    return within([cheapest_alike(worth[f], costs[f], j) for f, j in enumerate(found)], costs, limit)


def mostly_new(widths: Sequence[int], held_out: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """``[F]`` bool: kept fields whose values in held-out rows are mostly new, so that no width of theirs shows there.

    Args:
        widths: ``[F]``; 0 drops a field.
        held_out: ``[F]``: of each field the share of held-out rows whose value has an id of its own.
        trained: the same of training rows: rare values have no id there either, and are not new.
    """
    return (torch.tensor(list(widths)) > 0) & (held_out < NEW * trained)


def by_heart(again: torch.Tensor) -> torch.Tensor:
    """``[F]`` bool: fields whose ids hardly come again in training rows, such as the number of a row or of an order.

    What their tables save on training rows was learned by heart, row by row, and says nothing of other rows.

    Args:
        again: ``[F]``: how often an id comes again, NaN where that is not known.
    """
    return again < AGAIN


def rising(saved: torch.Tensor, widths: Sequence[int] | None = None) -> torch.Tensor:
    """``[n]``: the most that is saved so far by what is no wider; what a candidate saves beyond it by rounding alone
    does not count.

    A table of three values has no more than three directions: all widths from there on save the same but for rounding.

    Args:
        saved: ``[n]``, by each candidate.
        widths: ``[n]``, of the candidates; None where they ascend.
    """
    wide, found = list(widths or range(len(saved))), list[float]()
    for j, value in enumerate(saved.tolist()):
        best = max((found[i] for i in range(j) if wide[i] <= wide[j]), default=-float("inf"))
        found.append(value if value > best + LEAST_GAIN else best)
    return saved.new_tensor(found)


def harming(choice: Sequence[int], around: Changes, evidence: float) -> torch.Tensor:
    """``[F, T]`` bool: candidates under which the measured rows lose more than ``evidence`` standard errors against
    ``choice``, all other fields being as they are."""
    found = torch.zeros(around.more.shape, dtype=torch.bool)
    for f, j in enumerate(choice):
        for k in range(around.more.shape[1]):
            gain, error = around.gain(f, j, k)
            found[f, k] = gain < -max(evidence * error, LEAST_GAIN)
    return found
