"""Options that methods with parameters trained by held-out rows have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.methods.budget_options import BudgetOptions

MODES = ("softmax", "tempered", "gumbel")
MOST = 63  # buckets: the last one begins at 2^61


@dataclass
class OuterConfig:
    """When and how fast the selector learns from held-out rows."""

    pretrain_epochs: float = option(
        1.0, "epochs at the start with everything open; part of the training's epochs", low=0
    )
    every: int = option(100, "ordinary batches to one held-out batch that trains the selector", low=1)
    lr: float = option(1e-3, "learning rate of the selector (Adam)", above=0)


@dataclass
class RelaxConfig:
    """How a choice among candidates is relaxed while it is learned."""

    mode: str = option(
        "gumbel", "softmax (of the logits) | tempered (over tau) | gumbel (over tau, with noise)", choices=MODES
    )
    tau: float = option(1.0, "temperature at the first step with a choice", above=0)
    fall: float = option(5e-5, "by which the temperature falls with each ordinary step", low=0)
    floor: float = option(0.01, "least temperature", above=0)

    def temperature(self, step: int) -> float:
        """Of an ordinary step, counted from the first with a choice; evaluation does not count."""
        return 1.0 if self.mode == "softmax" else max(self.floor, self.tau - self.fall * max(step, 0))


@dataclass
class PopularityConfig:
    """Buckets of popularity, and the network that looks at them."""

    buckets: int = option(24, "buckets of a value's popularity, one for each doubling of its count", low=2, high=MOST)
    width: int = option(16, "embedding of a bucket", low=1)
    hidden: int = option(64, "hidden layer of the network behind it", low=1)


@dataclass
class ChoiceOptions(BudgetOptions):
    """Budgets, the training of the search, when held-out rows train the choice, and how it is relaxed."""

    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))
    outer: OuterConfig = field(default_factory=lambda: OuterConfig(pretrain_epochs=0.0, every=10))
    relax: RelaxConfig = field(default_factory=RelaxConfig)
