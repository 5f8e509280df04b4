"""How far entries lie above their thresholds: what a shift of all thresholds keeps, and which shift a budget needs."""

from __future__ import annotations

import torch

from embsearch_dist.schema import Schema

REACH, BIN = 40.0, 0.01  # of the shift c that meets a budget
BINS = round(2 * REACH / BIN)


def bins_of(v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The bin of the margin ``logit(|v|) - s`` of each entry ``v``, int64; ``s`` broadcasts to it. An entry stays at a
    shift ``c = edge * BIN - REACH`` if its bin is above ``edge``."""
    margin = v.abs().double().clamp(1e-30, 1 - 1e-15).logit() - s.double()
    return ((margin + REACH) / BIN).floor().clamp(0, BINS - 1).long()


def edge_of(c: float) -> int:
    """The bin that a shift ends."""
    return round((c + REACH) / BIN)


class Margins:
    """How many entries of each column stay when c is added to all s, for c in steps of :data:`BIN`.

    An entry stays while ``|v| > sigmoid(s + c)``, so while c is below its margin ``logit(|v|) - s``.
    """

    def __init__(self, schema: Schema, width: int) -> None:
        self.bins, self.schema = BINS, schema
        self.counts = torch.zeros(len(schema.fields), width, self.bins, dtype=torch.float64)

    def add(self, v: torch.Tensor, s: torch.Tensor, counted: torch.Tensor) -> None:
        """Rows ``v [F, n, w]`` with ``s [F, w]``; ``counted [F, n]``: 0 for a row that is none."""
        place = bins_of(v, s[:, None]).transpose(1, 2)
        weight = counted.double()[:, None].expand_as(place)
        self.counts.scatter_add_(2, place.cpu(), weight.cpu().contiguous())

    def kept(self, edge: int) -> torch.Tensor:
        """``[F, w]``: entries that stay at ``c = edge * BIN - REACH``, but for those of a margin in that very bin."""
        return self.counts[..., edge + 1 :].sum(2)

    def edge_under(self, most: float) -> int:
        """The lowest edge at which at most ``most`` entries stay; at least one does, where one can."""
        above = self.counts.sum((0, 1)).flip(0).cumsum(0).flip(0)  # [bins]: entries in this bin or a later one
        stays = torch.cat([above[1:], above.new_zeros(1)])
        fits = (stays <= most).nonzero()
        some = (stays > 0).nonzero()
        edge = int(fits[0]) if len(fits) else self.bins - 1
        return min(edge, int(some[-1])) if len(some) else edge
