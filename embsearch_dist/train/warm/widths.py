"""Earlier columns into new widths: cut, filled up, or turned to their principal directions first.

A narrower table keeps the leading columns. Trained columns are in no order, so where the head allows it they are turned
first: ``x -> x R`` with the eigenvectors R of ``E[x x^T]``, largest eigenvalue first, over the rows as often as their
values occur (that is truncated SVD, which loses the least of x in squares). What reads the columns takes ``R^T`` in
front of its weights, so that nothing else changes. A product of two fields (FM) is the same under R only where both are
turned alike: then one R, of all fields, turns them all, which needs one earlier width.

A wider table has new columns behind the earlier ones. They keep their fresh values, small but not zero, and the head's
weights on them begin at zero: the model starts as the earlier one (but for FM's products of fresh columns, of the order
of ``init_std^2``), and both sides have gradients, which zeros on both sides of a product would not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embsearch_dist.models.backbones.additive import Backbone


@dataclass(frozen=True)
class FieldMove:
    """Earlier columns of one field into new ones.

    Attributes:
        old, new: nominal widths.
        rotation: ``[old, old]`` float32, applied before the columns are cut; None: as they are.
    """

    old: int
    new: int
    rotation: torch.Tensor | None = None

    @property
    def kept(self) -> int:
        """Leading columns that the new table gets."""
        return min(self.old, self.new)

    @property
    def how(self) -> str:
        """For the record: ``same``, ``cut``, ``padded``, and ``turned`` in front."""
        change = "same" if self.old == self.new else "cut" if self.old > self.new else "padded"
        return change if self.rotation is None else f"turned, {change}"

    def columns(self, rows: torch.Tensor, squares: bool = False) -> torch.Tensor:
        """``[n, >= old]`` earlier rows -> ``[n, kept]``.

        ``squares``: they are means of squares; what is not on the diagonal is taken for zero.
        """
        rows = rows[:, : self.old]
        if self.rotation is not None:
            turn = self.rotation.to(rows.device, rows.dtype)
            rows = rows @ (turn.square() if squares else turn)
        return rows[:, : self.kept]

    def inputs(self, weight: torch.Tensor, places: int, squares: bool = False) -> torch.Tensor:
        """Weights ``[outputs, old]`` that read the earlier columns -> ``[outputs, places]`` that read the new ones.

        They are zero on columns that were not there.
        """
        moved = self.columns(weight, squares)
        return torch.nn.functional.pad(moved, (0, places - self.kept))


def turning(head: Any, norm: str, by_field: bool, maps: tuple[bool, bool], moves: Mapping[str, FieldMove]) -> str:
    """How columns may be turned: ``field`` by field, ``common`` to all fields, or not at all (empty).

    Only where some field gets narrower, and is not dropped.

    Args:
        by_field: learned maps belong to fields.
        maps: whether the earlier and the new tables stand before learned maps.
    """
    if not any(0 < m.new < m.old for m in moves.values()) or norm != "none" or maps[0] != maps[1]:
        return ""
    if maps[0]:
        return "field" if by_field else ""  # else one map serves several fields
    if type(head.backbone) is not Backbone:  # others may read embeddings in places that nobody turns
        return ""
    if not head.backbone.fm:
        return "field"
    return "common" if len({m.old for m in moves.values()}) == 1 else ""


def principal(second: torch.Tensor) -> torch.Tensor:
    """Eigenvectors ``[w, w]`` float32 of second moments ``[w, w]``, the largest first."""
    _, vectors = torch.linalg.eigh(second.double())
    return vectors.flip(1).float().contiguous()


def second_moments(rows: torch.Tensor, weights: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """``E[x x^T]`` ``[w, w]`` float64 of rows ``[n, w]`` that occur as ``weights [n]`` say; of ``x - E[x]`` if
    ``centred``."""
    x = rows.double()
    if centred:
        x = x - weights @ x / weights.sum()
    return (x * weights[:, None]).T @ x / weights.sum()


def common_rotation(seconds: Sequence[torch.Tensor]) -> torch.Tensor:
    """One turn for all fields, from the second moments of each."""
    return principal(torch.stack(list(seconds)).sum(0))
