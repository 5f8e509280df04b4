"""A dense part larger than the machine is one clear line before any memory is asked for."""

from __future__ import annotations

import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.models.backbones.additive import make_backbone
from embsearch_dist.models.room import check_room


def test_layers_larger_than_the_machine_are_refused() -> None:
    for kind in ("wide_deep", "deepfm", "mlp"):
        with pytest.raises(
            UserError, match=r"model.hidden: layers of 1,000,000,000 units behind 40 inputs.* GiB, this"
        ):
            make_backbone(kind, 5, 8, 1, [10**9])
    with pytest.raises(
        UserError,
        match=r"model.bottom: layers of 1,000,000, 1,000,000 units behind 3 inputs have 1,000,003,000,000 weights",
    ):
        check_room("model.bottom", 3, [10**6, 10**6])
    make_backbone("fm", 5, 8, 1, [10**9])  # it has no such layers
    check_room("model.hidden", 10, [])
    check_room("model.hidden", 10, [64, 32])
