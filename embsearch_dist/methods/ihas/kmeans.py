"""Mini-batch K-means over all ranks: what divides samples into groups (iHAS, "Clusters" and "Clustering Stage").

Sculley, "Web-scale k-means clustering" (WWW 2010), in its batch form, from a k-means++ start; exact passes
(Lloyd) can follow. Every rank holds the same centres. Sums and counts are reduced in float64, so any number of
ranks ends with the same centres within float32 tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import Context

COINCIDE = 1e-12
"""Squared distance, as a share of the row's squared length, below which a row lies on a centre: float32 cannot
tell the two apart, and a second centre there would divide equal rows by rounding."""


class KMeans:
    """K centres of rows of width D.

    Attributes:
        centres: ``[K, D]`` float32.
        counts: ``[K]`` float64, the rows each centre has been updated with since it was placed.
        alive: ``[K]`` bool. A centre is dead until a row is found to put it on (the start saw fewer distinct
            rows than K): it gets no rows, and its place is without meaning.
        idle: ``[K]`` int64, updates in a row in which the centre got no rows.

    Equal on every rank, on the context's device. All methods but ``assign``, ``distances``, ``order``, ``state``
    and ``load_state`` call collectives: every rank must call them, in the same order.
    """

    def __init__(self, k: int, width: int, context: Context, seed: int, patience: int = 10) -> None:
        """``patience``: updates without a row after which a centre is re-seeded."""
        if min(k, width, patience) < 1:
            raise ValueError(f"k, width and patience must be at least 1, not {k}, {width}, {patience}")
        self.k, self.width, self.context, self.seed, self.patience = k, width, context, seed, patience
        device = context.device
        self.centres = torch.zeros(k, width, device=device)
        self.counts = torch.zeros(k, dtype=torch.float64, device=device)
        self.alive = torch.zeros(k, dtype=torch.bool, device=device)
        self.idle = torch.zeros(k, dtype=torch.int64, device=device)
        self._numbers = torch.arange(k, device=device)
        self._started = False

    @torch.no_grad()
    def start(self, rows: torch.Tensor) -> None:
        """Place the centres by k-means++ on the rows of all ranks, put together in rank order.

        Every rank gathers and holds all of them. Ranks that pass contiguous parts of one batch get the same
        centres whatever their number. Without K distinct rows the surplus centres stay dead.

        Args:
            rows: ``[b, D]``; b may differ between ranks and be 0 on some.

        Raises:
            UserError: NaN or infinity among the rows.
        """
        rows = self._rows(rows)
        rows = self.context.gather(rows.flatten()).view(-1, self.width)
        if not len(rows):
            raise ValueError("K-means cannot start: no rank has rows")
        if not bool(rows.isfinite().all()):
            raise _not_finite()
        chosen = plus_plus(rows, self.k, torch.Generator().manual_seed(self.seed))
        placed = torch.zeros(self.k, self.width + 1, device=self.context.device)
        placed[: len(chosen), :-1] = rows[chosen]
        placed[: len(chosen), -1] = 1
        if self.context.world_size > 1:
            # All ranks chose alike, unless their processors round differently and a draw fell between.
            dist.broadcast(placed, src=0)
        self.centres, self.alive = placed[:, :-1].contiguous(), placed[:, -1] > 0
        self.counts, self.idle = torch.zeros_like(self.counts), torch.zeros_like(self.idle)
        self._started = True

    @torch.no_grad()
    def update(self, rows: torch.Tensor) -> float:
        """One mini-batch step: each centre moves towards the mean of its rows, at the rate new / all rows so far.

        After the step a centre that is dead, or got no rows in ``patience`` updates, is put on that row of all
        ranks which is farthest from its nearest centre; a second one on the farthest that then remains. It
        starts anew: no counts, so the next batch takes it to the mean of what it attracts. Nothing is
        re-seeded where every row lies on a centre.

        Args:
            rows: ``[b, D]``; b may differ between ranks and be 0 on some.

        Returns:
            The mean squared distance of all ranks' rows to their nearest centre before the move.

        Raises:
            UserError: NaN or infinity among the rows; the centres are as before.
        """
        rows = self._rows(rows)
        totals, _ = self._totals(rows)
        self.context.sum(totals)
        sums, new = totals[:, :-2], totals[:, -2]
        idle = torch.where(new > 0, 0, self.idle + 1)
        due = ~self.alive | (idle >= self.patience)
        # One transfer from the device tells the figures and which centres are due.
        seen, loss, *waiting = torch.cat([totals[:, -2:].sum(0), due.double()]).tolist()
        _check(seen, loss)
        self._move(self.centres.double() * self.counts[:, None] + sums, self.counts + new, new > 0)
        self.counts, self.idle = self.counts + new, idle
        if any(waiting):
            nearest = self.distances(rows).amin(1)
            for group in (g for g, w in enumerate(waiting) if w):
                row = self._farthest(_farthest_here(rows, nearest))
                if not self._place(group, row):
                    break
                nearest = torch.minimum(nearest, _gaps(rows, row))
        return loss / seen

    @torch.no_grad()
    def lloyd(self, batches: Iterable[torch.Tensor]) -> float:
        """One exact pass: every centre becomes the mean of its rows over all batches and ranks.

        ``counts`` become the sizes of the groups. Of the centres without rows the first is put on the farthest
        row of the pass, if that lies on no centre; others stay where they are for the next pass.

        Args:
            batches: ``[b, D]`` each. Their number may differ between ranks: nothing is reduced before the end.

        Returns:
            The mean squared distance of all rows to their nearest centre before the move.

        Raises:
            UserError: NaN or infinity among the rows; the centres are as before.
        """
        totals = torch.zeros(self.k, self.width + 2, dtype=torch.float64, device=self.context.device)
        farthest = torch.full((self.width + 1,), -1.0, device=self.context.device)
        for batch in batches:
            rows = self._rows(batch)
            part, nearest = self._totals(rows)
            totals += part
            found = _farthest_here(rows, nearest)
            farthest = torch.where(found[0] > farthest[0], found, farthest)
        self.context.sum(totals)
        sums, sizes = totals[:, :-2], totals[:, -2]
        seen, loss, *counts = torch.cat([totals[:, -2:].sum(0), sizes]).tolist()
        _check(seen, loss)
        self._move(sums, sizes, sizes > 0)
        self.counts, self.idle = sizes.clone(), torch.where(sizes > 0, 0, self.idle)
        if 0 in counts:
            self._place(counts.index(0), self._farthest(farthest))
        return loss / seen

    @torch.no_grad()
    def distances(self, rows: torch.Tensor) -> torch.Tensor:
        """Squared Euclidean distances ``[b, K]`` of ``rows [b, D]``; infinite to a dead centre."""
        if not self._started:
            raise RuntimeError("call start() or load_state() first")
        return squared_distances(self._rows(rows), self.centres, self.alive)

    def assign(self, rows: torch.Tensor) -> torch.Tensor:
        """The group of each row: ``[b, D]`` -> ``[b]`` int64, the nearest live centre, of equals the first."""
        return self.distances(rows).argmin(1)

    def order(self) -> list[int]:
        """Number the groups anew, by falling counts, dead ones last.

        Returns:
            The old number of every new group.
        """
        counts, alive = self.counts.tolist(), self.alive.tolist()
        old = sorted(range(self.k), key=lambda g: (not alive[g], -counts[g], g))
        index = torch.tensor(old, device=self.context.device)
        self.centres, self.counts = self.centres[index], self.counts[index]
        self.alive, self.idle = self.alive[index], self.idle[index]
        return old

    def state(self) -> dict[str, Any]:
        """All that changes, for JSON. A float32 is exact as a Python float, and that as JSON text."""
        return {
            "started": self._started,
            "centres": self.centres.tolist(),
            "counts": self.counts.tolist(),
            "alive": self.alive.tolist(),
            "idle": self.idle.tolist(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue, bit for bit, from what :meth:`state` gave.

        Raises:
            UserError: it is of another K or D, or damaged.
        """
        device = self.context.device
        try:
            centres = torch.tensor(state["centres"], dtype=torch.float32, device=device)
            counts = torch.tensor(state["counts"], dtype=torch.float64, device=device)
            alive = torch.tensor(state["alive"], dtype=torch.bool, device=device)
            idle = torch.tensor(state["idle"], dtype=torch.int64, device=device)
            started = bool(state["started"])
            if any(x.shape != centres.shape[:1] for x in (counts, alive, idle)):
                raise ValueError("lists of differing lengths")
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"the saved centres are damaged ({e!r}); cluster anew in another run directory") from e
        if centres.shape != (self.k, self.width):
            raise UserError(
                f"the saved centres have the shape {list(centres.shape)}, this run needs {[self.k, self.width]} "
                "(groups, columns); set both back, or cluster anew in another run directory"
            )
        self.centres, self.counts, self.alive, self.idle, self._started = centres, counts, alive, idle, started

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dim() != 2 or rows.shape[1] != self.width:
            raise ValueError(f"expected rows [b, {self.width}], got {list(rows.shape)}")
        return rows.to(self.context.device, torch.float32)

    def _totals(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's ``[K, D + 2]`` float64: per group the sum of its rows, their number and the sum of their
        squared distances; and ``[b]``, the squared distance of each row to its centre."""
        nearest, group = self.distances(rows).min(1)
        member = (group == self._numbers[:, None]).double()
        # A product and not index_add_, whose order of addition varies on a GPU.
        wide = torch.cat([rows, torch.ones_like(nearest)[:, None], nearest[:, None]], 1).double()
        return member @ wide, nearest

    def _move(self, sums: torch.Tensor, counts: torch.Tensor, which: torch.Tensor) -> None:
        means = (sums / counts.clamp(min=1)[:, None]).float()
        self.centres = torch.where(which[:, None], means, self.centres)

    def _farthest(self, candidate: torch.Tensor) -> torch.Tensor:
        """The row ``[D]`` of the highest of all ranks' candidates, of equals that of the first rank."""
        everyone = self.context.gather(candidate).view(-1, self.width + 1)
        return everyone[everyone[:, 0].argmax(), 1:]

    def _place(self, group: int, row: torch.Tensor) -> bool:
        """Put a centre on a row, unless one is there already."""
        taken = self.alive & (_gaps(self.centres, row) <= COINCIDE * row.square().sum())
        if bool(taken.any()):
            return False
        chosen = self._numbers == group
        self.centres = torch.where(chosen[:, None], row, self.centres)
        self.counts = self.counts.masked_fill(chosen, 0)
        self.idle = self.idle.masked_fill(chosen, 0)
        self.alive = self.alive | chosen
        return True


def squared_distances(rows: torch.Tensor, centres: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """``|x|^2 - 2 x c + |c|^2``, not below 0: ``rows [b, D]``, ``centres [K, D]``, ``alive [K]`` -> ``[b, K]``.

    Infinite to dead centres. In float64: the three terms cancel near a centre, and float32 would leave an error that
    goes with the squares of the data and differs between processors (and is of the first three digits where products
    run in TF32 or bfloat16). The origin is moved to the mean of the live centres first, which makes the distance of
    equal rows to their own centre 0 to the bit.
    """
    c = centres.double()
    origin = (c * alive[:, None]).sum(0) / alive.sum().clamp(min=1)
    x, c = rows - origin, c - origin
    squares = torch.addmm(c.square().sum(1), x, c.T, alpha=-2) + x.square().sum(1, keepdim=True)
    return squares.clamp(min=0).float().masked_fill(~alive, math.inf)


def plus_plus(rows: torch.Tensor, k: int, generator: torch.Generator) -> list[int]:
    """k-means++ (Arthur and Vassilvitskii 2007): at most ``k`` indices of distinct ``rows [n, D]``, n > 0.

    The first is drawn evenly, every other with a probability that goes with its squared distance to the nearest
    chosen one. Of ``2 + log k`` draws that which lowers the sum of these distances most is taken (greedy
    k-means++, as in scikit-learn). Fewer than ``k`` where all rows lie on a chosen one.
    """
    trials = 2 + int(math.log(k))
    on_it = COINCIDE * rows.square().sum(1)

    def gaps(index: int) -> torch.Tensor:
        gap = _gaps(rows, rows[index])
        return gap.masked_fill(gap <= on_it, 0)

    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = gaps(chosen[0])
    while len(chosen) < k:
        # On the CPU: a running sum on a GPU may differ from run to run.
        running = nearest.cpu().double().cumsum(0)
        if float(running[-1]) == 0:
            break
        draws = torch.rand(trials, dtype=torch.float64, generator=generator) * running[-1]
        picks = torch.searchsorted(running, draws, right=True).clamp(max=len(rows) - 1).tolist()
        after = [torch.minimum(nearest, gaps(i)) for i in picks]
        best = int(torch.stack([a.double().sum() for a in after]).argmin())
        chosen.append(picks[best])
        nearest = after[best]
    return chosen


def _gaps(rows: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Squared distances ``[n]`` of ``rows [n, D]`` to one ``point [D]``, by differences: 0 for equal rows."""
    return (rows - point).square().sum(1)


def _farthest_here(rows: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """``[1 + D]``: the largest of ``nearest [b]`` and its row; -1 everywhere without rows."""
    if not len(rows):
        return rows.new_full((rows.shape[1] + 1,), -1.0)
    value, index = nearest.max(0, keepdim=True)
    return torch.cat([value, rows.index_select(0, index).squeeze(0)])


def _check(seen: float, loss: float) -> None:
    """Same figures, hence the same error, on every rank."""
    if seen == 0:
        raise ValueError("K-means got no rows on any rank")
    if not math.isfinite(loss):
        raise _not_finite()


def _not_finite() -> UserError:
    return UserError(
        "the rows to cluster hold NaN or infinity: the embeddings of the search have diverged; search again with "
        "lower learning rates",
        everywhere=True,
    )
