"""What stands behind the tables of a model: the transform to one width and the backbone. Nothing here is sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from embsearch_dist.config.backbones import ADDITIVE
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.backbones.making import backbone_of
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.models.room import check_room
from embsearch_dist.models.unify import MixedIdentity, MixedUnify, NoUnify, SupernetUnify
from embsearch_dist.networks.network import read_network


class Head(nn.Module):
    """Unify + backbone: everything that is replicated."""

    def __init__(self, unify: nn.Module, backbone: Any) -> None:
        """``backbone``: see :func:`embsearch_dist.config.backbones.register_backbone`."""
        super().__init__()
        self.unify, self.backbone = unify, backbone

    def forward(self, dense: torch.Tensor, *embeddings: Any) -> torch.Tensor:
        u = self.unify(*embeddings)
        if not (isinstance(self.backbone, Backbone) and self.backbone.values):
            return self.backbone(u, dense)
        return self.backbone(u, dense, self._first_order(*embeddings))

    @property
    def additive(self) -> bool:
        """Whether the backbone is a sum over fields up to its first non-linearity."""
        return isinstance(self.backbone, Backbone)

    def _first_order(
        self, pooled: Pooled, choice: torch.Tensor | None = None, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of the values' weights over the fields that a subnet keeps (all without one): ``[B]``."""
        weights = pooled.first_order()
        if choice is None or keep is None:
            return weights.sum(1)
        assert isinstance(self.unify, SupernetUnify)
        return weights @ (keep & self.unify.present[choice]).to(weights.dtype)


def make_head(model: ModelConfig, widths: Sequence[int], dense: int, synchronise: bool) -> Head:
    """Transform and backbone of one allocation.

    Args:
        widths: nominal width of each kept field, in schema order.
        dense: number of dense columns.
        synchronise: statistics of a BatchNorm are those of all ranks.

    Raises:
        UserError: the architecture file of a NASRec network is missing, wrong, or of another width; what
            :func:`backbone_of` raises.
    """
    check_room("model.unified_width", max(widths), [model.unified_width] * (model.transform != "identity"))
    unify = make_unify(model, widths, synchronise, model.backbone in ADDITIVE)
    fields, width = len(widths), common_width(model, widths)
    if model.backbone == "nasrec":
        return Head(unify, read_network(model.architecture, fields, width, dense, model.layer_norm))
    own = list(widths) if isinstance(unify, MixedIdentity) else []
    return Head(unify, backbone_of(model, fields, width, dense, bool(model.extra), own))


def common_width(model: ModelConfig, widths: Sequence[int]) -> int:
    """Width at which the kept fields of an allocation reach the backbone."""
    alike = model.unify == "mixed" and len(set(widths)) == 1
    return max(widths) if alike or model.transform == "identity" else model.unified_width


def make_unify(model: ModelConfig, widths: Sequence[int], synchronise: bool, side_by_side: bool) -> nn.Module:
    """The transform of an allocation's kept fields.

    ``side_by_side``: the backbone takes fields of different widths as they are.
    """
    alike, identity = len(set(widths)) == 1, model.transform == "identity"
    if alike and (model.unify == "mixed" or (identity and model.norm == "none")):
        return NoUnify()
    if identity:
        return MixedIdentity(widths, model.norm, model.gain, synchronise, side_by_side)
    return MixedUnify(widths, model.unified_width, model.norm, model.gain, synchronise, model.transform)
