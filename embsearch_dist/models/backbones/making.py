"""The backbone that a config names, whichever kind of model it stands in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from embsearch_dist.config.backbones import ADDITIVE, read_options, registered
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.errors import UserError
from embsearch_dist.models.backbones.additive import make_backbone
from embsearch_dist.models.backbones.dlrm import DLRM
from embsearch_dist.models.room import check_room


def backbone_of(
    model: ModelConfig, fields: int, width: int, dense: int, values: bool = False, widths: Sequence[int] = ()
) -> nn.Module:
    """Build ``model.backbone``.

    Args:
        fields: F; of a found model the kept ones.
        width: d, at which they come.
        dense: dense columns.
        values: first-order weights come from the tables; for additive backbones alone.
        widths: of each field, where additive backbones take them side by side.

    Raises:
        UserError: nothing is registered under that name, a setting does not suit it, or its layers are larger than the
            memory that is free.
    """
    kind = model.backbone
    if kind in ADDITIVE:
        return make_backbone(kind, fields, width, dense, model.hidden, model.dropout, model.precision, values, widths)
    if kind == "nasrec":
        raise UserError("config key model.backbone: nasrec is for the model of an allocation (retrain.py) alone")
    if kind == "dlrm":
        check_room("model.bottom", dense, model.bottom)
        check_room("model.hidden", fields * (fields + 1) // 2 + width, model.hidden)
        return DLRM(fields, width, dense, model.bottom, model.hidden, model.dropout)
    found, options = registered(kind), read_options(kind, model.options)
    check_room("model.hidden", fields * width + dense, model.hidden)
    more: dict[str, Any] = {} if options is None else {"options": options}
    made = found.make(fields=fields, width=width, dense=dense, hidden=list(model.hidden), dropout=model.dropout, **more)
    if not isinstance(made, nn.Module):
        raise UserError(f"config key model.backbone: {kind} ({found.source}) is no torch.nn.Module. Let it be one")
    return made
