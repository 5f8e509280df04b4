"""Settings of SSEDS (Qu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option
from embsearch_dist.methods.budget_options import BudgetOptions

ORDERS = ("saliency", "density")


@dataclass
class SSEDSConfig(BudgetOptions):
    """SSEDS: the columns of a trained model whose closing would change the loss most, by one backward pass a batch."""

    width: int = option(32, "width of every field of the model that is trained and cut down", low=1)
    batch_size: int = option(2048, "rows of a batch of which the gradient is taken, at most", low=1)
    batches: int = option(16, "batches whose saliencies are averaged; 1 as published", low=1)
    order: str = option(
        "saliency",
        "columns by saliency, as published | by saliency over values of the field (density)",
        choices=ORDERS,
    )
    keep: float = option(0.9, "without a budget: share of the summed saliency that is kept", above=0, high=1)
    rows: int = option(50_000, "validation rows drawn for the figures shown", low=1)

    @property
    def candidates(self) -> list[int]:
        """All widths that a choice of columns can give."""
        return list(range(self.width + 1))
