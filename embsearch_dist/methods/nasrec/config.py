"""Settings of NASRec; where the published scripts give a number it is the default or a shipped config."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import one_of, option, require
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.networks.sampling import SCHEMES, SET_SIZES
from embsearch_dist.networks.space import SpaceConfig

PROXIES = ("snip", "zico", "jacob_cov")
STRATEGIES = ("evolution", "random")
COSTS = ("none", "flops", "parameters", "latency")


@dataclass
class SamplingConfig:
    """Which architecture a training step of the supernet uses (section 4.1)."""

    scheme: str = option("single_operator_any_connection", " | ".join(SCHEMES), choices=SCHEMES)
    set_size: str = option("binomial", "binomial | uniform: how many sources a drawn set has", choices=SET_SIZES)
    warmup: float = option(
        0.3, "share of the steps in which the whole supernet is trained, ever more rarely", low=0, high=1
    )
    same_network: bool = option(True, "all ranks draw one architecture; false: each its own, and slices are united")


@dataclass
class ScoringConfig:
    """How a candidate is judged with the supernet's weights (section 4.3, post-training fine-tuning)."""

    held_out: bool = option(
        True,
        "rows to tune on and to score are drawn from the validation split; false: tune on training rows",
        before=False,
    )
    rows: int = option(32768, "rows whose logloss is the score; 0 = all that are not tuned on", low=0)
    tune_rows: int = option(
        32768, "rows on whose features a candidate's head is fine-tuned; held out: at most half", low=1
    )
    tune_steps: int = option(500, "steps of fine-tuning; 0 = the head as the supernet left it", low=0)
    tune_batch: int = option(512, "rows of such a step", low=1)
    tune_lr: float = option(0.04, "its learning rate (Adagrad), falling to zero along a cosine", above=0)


@dataclass
class PrefilterConfig:
    """Random networks ranked by zero-cost proxies, from the best of which evolution starts."""

    proxies: list[str] = option([], f"of {', '.join(PROXIES)}: ranked by the mean of their ranks; empty = no prefilter")
    sample: int = option(128, "random networks that are ranked", low=2)
    keep: float = option(0.25, "upper share from which the first population comes, the best first", above=0, high=1)
    rows: int = option(128, "training rows of the one batch they are ranked on", low=16)

    def check(self) -> None:
        for name in self.proxies:
            one_of("search.prefilter.proxies", name, list(PROXIES))
        once = len(set(self.proxies)) == len(self.proxies)
        require(once, "search.prefilter.proxies", f"name each once, got {self.proxies}")


@dataclass
class EvolutionConfig:
    """Aging evolution (Real et al. 2019) over scored candidates."""

    strategy: str = option("evolution", "evolution | random: as many candidates, all drawn", choices=STRATEGIES)
    population: int = option(128, "random candidates at the start, and how many are alive", low=1)
    generations: int = option(240, "each adds `children` candidates, and the oldest leave", low=0)
    parents: int = option(64, "drawn from the population; the best of them is the parent", low=1)
    children: int = option(8, "mutations of the parent in a generation", low=1)
    keep: int = option(15, "best candidates that are left for retraining", low=1)
    cost: str = option(
        "none", "none | flops | parameters | latency (ms of 512 rows, predicted): joins the score", choices=COSTS
    )
    cost_weight: float = option(0.0, "beta of: score = logloss + beta * (cost / cost_target - 1)", low=0)
    cost_target: float = option(0.0, "cost at which nothing is added or taken off")
    cost_at_most: float = option(0.0, "a candidate that costs more is not looked at; 0 = no limit", low=0)
    cost_at_least: float = option(0.0, "nor is one that costs less", low=0)

    @property
    def limited(self) -> bool:
        """Whether the cost of candidates has limits."""
        return bool(self.cost_at_most or self.cost_at_least)

    def check(self) -> None:
        require(self.children <= self.population, "search.evolution.children", "must not exceed the population")
        require(self.parents <= self.population, "search.evolution.parents", "must not exceed the population")
        if self.cost_weight:
            require(self.cost != "none", "search.evolution.cost", "search.evolution.cost_weight needs a cost")
            require(self.cost_target > 0, "search.evolution.cost_target", "must be above 0 where cost_weight is")
        if self.limited:
            one = f"must be one of {', '.join(COSTS[1:])} where it has limits"
            require(self.cost != "none", "search.evolution.cost", one)
            in_order = not self.cost_at_most or self.cost_at_least <= self.cost_at_most
            require(in_order, "search.evolution.cost_at_least", f"must not exceed cost_at_most {self.cost_at_most:g}")


@dataclass
class NASRecConfig:
    """NASRec: supernet, then evolution."""

    name: str = option("nasrec", "name of the result")
    space: SpaceConfig = field(default_factory=SpaceConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    supernet: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1, patience=0))
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    prefilter: PrefilterConfig = field(default_factory=PrefilterConfig)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)

    def check(self) -> None:
        require(bool(self.name) and "/" not in self.name, "search.name", f"must be a plain word, got {self.name!r}")
