"""Settings of iHAS; where the paper prints a number it is the default or a shipped config."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option, require
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.config.widths import check_table_width
from embsearch_dist.methods.gated.config import OuterConfig

FEATURES = ("embeddings", "scaled", "masks", "probabilities")


@dataclass
class GatesConfig:
    """The Bernoulli gates (section 3.3)."""

    shared: bool = option(False, "one vector of probabilities for all rows (the ablation iHAS-4)")
    temperature: float = option(0.1, "of the straight-through Gumbel-softmax", above=0)
    sparsity: float = option(0.1, "lambda of Eq. 5: what an open gate costs; mean over rows and columns", low=0)
    polarization: float = option(0.1, "weight of Eq. 5's second term; 0 leaves it out (the ablation iHAS-3)", low=0)
    bias: float = option(1.0, "logit of every gate at the start; above 0 gates begin open")
    through: bool = option(False, "gradients of the tables flow through the gates as well; slower")
    bins: int = option(20, "of a row's histogram of probabilities, over [0, 1]", low=3)
    smooth: int = option(0, "average that histogram over so many bins to either side before its minimum is sought")
    fallback: float = option(0.5, "threshold of a row whose histogram has no local minimum", low=0, below=1)

    def check(self) -> None:
        require(0 <= self.smooth < self.bins, "search.gates.smooth", f"must be in [0, bins), got {self.smooth}")


@dataclass
class GroupsConfig:
    """Clustering, and what a group keeps (section 3.4)."""

    k: int = option(2, "groups; 1 = one model for all rows (the ablation iHAS-2)", low=1, high=255)
    features: str = option(
        "embeddings", "what K-means sees: embeddings (masked) | scaled | masks | probabilities", choices=FEATURES
    )
    batch_size: int = option(8192, "global batch of the clustering", low=1)
    passes: int = option(1, "passes of mini-batch K-means over the training split")
    exact: int = option(1, "exact passes (all rows, then all centres) that follow")
    min_rows: int = option(1000, "a group with fewer training rows is dissolved: its rows go to the next centre", low=1)
    keep: float = option(
        0.5, "a group keeps a dimension that is open in more than this share of its rows", low=0, below=1
    )
    inherit: bool = option(False, "group models start from the search's tables instead of new ones")

    def check(self) -> None:
        require(self.passes >= 0 and self.exact >= 0, "search.groups.passes", "and exact must be >= 0")
        require(self.passes + self.exact >= 1, "search.groups.passes", "and exact must not both be 0")


@dataclass
class IHASConfig:
    """iHAS: gates, groups, group models."""

    name: str = option("ihas", "name of the result")
    width: int = option(16, "d: width of every field while searching")
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5, patience=0))
    outer: OuterConfig = field(default_factory=OuterConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)

    def check(self) -> None:
        require(bool(self.name) and "/" not in self.name, "search.name", f"must be a plain word, got {self.name!r}")
        check_table_width(self.width)
