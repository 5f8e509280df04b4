"""What weighs the columns of a row at inference: the controller of AdaFS, the gates of iHAS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from embsearch_dist.models.rows import fill_rows


class Selector(nn.Module):
    """Embeddings ``[F, B, d]`` as the tables hold them -> ``[B, F, d]`` as the head reads them."""

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class AdaFSSelector(Selector):
    """BatchNorm of the embeddings, the controller's weights, and the choice by them; see methods/adafs."""

    def __init__(self, fields: int, width: int, selection: Mapping[str, Any]) -> None:
        super().__init__()
        from embsearch_dist.methods.adafs.controller import Controller
        from embsearch_dist.models.norm import UnifyNorm

        self.norm = UnifyNorm(fields, 1, width, selection["norm"], 1.0, False)
        self.controller = Controller(fields, width, 0.0, False)
        self.register_buffer("choice", torch.zeros(fields, dtype=torch.int64), persistent=False)
        self.choice: torch.Tensor
        self.selection, self.count = dict(selection), fields

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        from embsearch_dist.methods.adafs.controller import keep_top

        u = self.norm(raw, self.choice)
        weights = self.controller(u)
        if self.selection["mode"] != "soft":
            weights = keep_top(weights, self.selection["k"], self.selection["renormalise"])
        return u * (weights * self.count if self.selection["scale"] else weights)[..., None]


class GateSelector(Selector):
    """Gates of iHAS by threshold (section 3.3.2)."""

    def __init__(self, fields: int, width: int, selection: Mapping[str, Any]) -> None:
        super().__init__()
        from embsearch_dist.methods.ihas.gates import BernoulliGates

        self.gates = BernoulliGates(fields * width, bool(selection["shared"]), 0.0)
        self.selection = dict(selection)

    def look(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``u [B, F, d]`` -> logits of the gates and masks, each ``[B, F * d]``."""
        from embsearch_dist.methods.ihas.gates import deterministic

        logits = self.gates(fill_rows(u.flatten(1)))[: u.shape[0]]
        s = self.selection
        return logits, deterministic(logits, s["bins"], s["fallback"], s["smooth"])

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        u = raw.transpose(0, 1)
        return u * self.look(u)[1].view_as(u)


Make = Callable[[int, int, Mapping[str, Any]], Selector]


def make_selector(selection: Mapping[str, Any], fields: int, width: int) -> Any:
    """By ``selection["kind"]``: ``adafs`` or ``gates``.

    Raises:
        ValueError: another kind. KeyError: a setting is missing.
    """
    kinds: dict[str, Make] = {"adafs": AdaFSSelector, "gates": GateSelector}
    if selection["kind"] not in kinds:
        raise ValueError(f"selection {selection['kind']!r}")
    return kinds[selection["kind"]](fields, width, selection)
