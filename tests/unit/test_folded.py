"""Maps and first layer as one matrix: what the model says with and without it."""

from __future__ import annotations

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.models.backbones.additive import make_backbone
from embsearch_dist.models.folded import FoldedMLP, can_fold
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.models.unify import MixedUnify, NoUnify
from tests.factories import one_rank, random_batch, small_config, small_schema

WIDTHS = [4, 1, 6, 4]
SCHEMA = small_schema(30, 20, 50, 9, 12)


def parts(kind: str, dense: int, norm: str = "none") -> tuple[MixedUnify, torch.nn.Module, Pooled]:
    torch.manual_seed(3)
    unify = MixedUnify(WIDTHS, 5, norm, 1.0, False)
    backbone = make_backbone(kind, len(WIDTHS), 5, dense, [7, 6])
    for p in [*unify.parameters(), *(p for p in backbone.parameters() if p.requires_grad)]:
        torch.nn.init.normal_(p, 0.2, 0.5)
    # Fields out of order, and a table that is wider than its field.
    return unify.eval(), backbone.eval(), Pooled(torch.randn(9, 20), (8, 0, 12, 4), tuple(WIDTHS))


@pytest.mark.parametrize("kind", ["mlp", "wide_deep"])
@pytest.mark.parametrize("dense", [0, 3])
def test_folded_is_the_same_function(kind: str, dense: int) -> None:
    unify, backbone, pooled = parts(kind, dense)
    assert can_fold(unify, backbone)
    folded = FoldedMLP(unify, backbone, pooled)  # type: ignore[arg-type]
    for seed in range(3):
        other = Pooled(torch.randn(9, 20, generator=torch.Generator().manual_seed(seed)), pooled.starts, pooled.widths)
        columns = torch.randn(9, dense)
        with torch.no_grad():
            torch.testing.assert_close(folded(columns, other), backbone(unify(other), columns), rtol=1e-4, atol=1e-4)


def test_what_is_not_linear_is_not_folded() -> None:
    assert not can_fold(*parts("deepfm", 0)[:2])
    assert not can_fold(*parts("mlp", 0, norm="field")[:2])
    assert not can_fold(NoUnify(), parts("mlp", 0)[1])


def test_a_model_folds_at_inference_alone() -> None:
    widths = dict(zip(SCHEMA.names, [4, 8, 0, 1, 5], strict=True))
    config = small_config("none", "none", "model.backbone=mlp", "model.hidden=[8]")
    model = SubnetModel(config, Allocation(SCHEMA, widths), one_rank()).eval()
    batch = random_batch(SCHEMA, 32)
    with torch.no_grad():
        plain = model(batch)[0]
        model.fold()
        folded = model(batch)[0]
    torch.testing.assert_close(plain, folded, rtol=1e-4, atol=1e-5)
    assert model.folds and len(model._folded) == 1
    assert "weight" not in " ".join(k for k in model.state_dict() if "folded" in k)
    trained = model(batch)[0]
    assert trained.requires_grad
