"""Settings of AdaS&S; where the paper prints a number it is the default or a shipped config."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import one_of, option, require
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.config.widths import SCHEMES, check_candidates
from embsearch_dist.methods.budget_options import BUDGET_HELP, PRECISION_HELP, check_precision
from embsearch_dist.methods.utilities.config import JUDGE_HELP, JUDGES, SPEND_HELP
from embsearch_dist.precision import served

MODES = ("adaptive", "random", "vanilla_uniform", "weighted_uniform")
PRECISIONS = ("auto", "bfloat16", "float32")
EQ5 = ("growth", "layernorm")
KEEP = ("best", "last")
METRICS = ("auc", "logloss", "accuracy")
REFITS = ("none", "linear")
RESOURCES = ("widths", "parameters", "bytes", "served_bytes")
FINDERS = ("auto", "policy", "sweeps", "knapsack")


@dataclass
class SamplingConfig:
    """How subnets are drawn while the supernet trains (section 3.1, Eq. 4-6, and Table 4)."""

    mode: str = option(
        "adaptive", "adaptive | random | vanilla_uniform | weighted_uniform (the modes of Table 4)", choices=MODES
    )
    eq5: str = option("growth", "what Eq. 5 compares: growth of the variance since the start | layernorm (as printed)")
    eta_e: float = option(0.05, "step of Eq. 5 on the logits of P_E")
    clip_e: float = option(
        0.5, "growth: bound of those logits; the ratio of two candidates is at most exp(2 clip_e)", above=0
    )
    eta_f: float = option(0.05, "step of Eq. 6 on the logits of P_F")
    lambda_fs: float = option(0.6, "Eq. 6: weight of the gradient against the size of the embedding", low=0, high=1)
    update_every: int = option(50, "steps between two updates of P_E and P_F", low=1)
    floor_e: float = option(0.05, "no candidate is drawn with a smaller probability than this, a width of 0 with it")
    floor_f: float = option(0.5, "no field is kept with a smaller probability than this", low=0, below=1)
    keep_start: float = option(0.8, "probability to keep a field before the first update; 'random' uses 0.6")
    warmup: float = option(
        0.0, "share of the steps in which the whole supernet is trained, ever more rarely", low=0, high=1
    )
    subnets: int = option(
        1, "subnets of a step; 3 or more: the widest, the narrowest and sampled ones that learn from it"
    )
    same_subnet: bool = option(True, "ranks draw one subnet together; false = each rank its own")

    def check_floors(self, candidates: int) -> None:
        one_of("search.sampling.eq5", self.eq5, EQ5)
        if self.eq5 == "growth":
            require(0 < self.eta_e <= 1, "search.sampling.eta_e", f"must be in (0, 1] with growth, got {self.eta_e}")
        one, message = self.subnets, "must be 1, or 3 or more (the widest, the narrowest and sampled ones)"
        require(one == 1 or one >= 3, "search.sampling.subnets", f"{message}, got {one}")
        bound = 1 / candidates
        require(0 < self.floor_e < bound, "search.sampling.floor_e", f"must be in (0, {bound:g}), got {self.floor_e}")
        low = self.floor_f
        start = self.keep_start
        require(low < start < 1, "search.sampling.keep_start", f"must be in ({low}, 1), got {start}")


@dataclass
class SupernetConfig(TrainConfig):
    """Training of the supernet, and the fixed panel of subnets that judges it."""

    panel: int = option(
        16, "subnets whose mean metric cuts the rates, stops and marks the best step; 1 = the widest", low=1
    )
    panel_rows: int = option(32_768, "validation rows they are judged on, spread over the whole split", low=1)
    keep: str = option(
        "best", "best | last: which weights are searched, those of the best step by the panel or the last", choices=KEEP
    )


@dataclass
class PolicyConfig:
    """The search itself (section 3.2, Eq. 8-9)."""

    finder: str = option(
        "auto",
        "policy (as printed) | sweeps over single changes | knapsack: over measured losses, as method utilities does | "
        "auto: sweeps above 64 fields, else the policy",
        choices=FINDERS,
    )
    rows: int = option(100_000, "validation rows every candidate is scored on, drawn at random from all of them", low=1)
    policy_rows: int = option(0, "of these, how many the policy learns from; all that follows sees all; 0 = all", low=0)
    precision: str = option(
        "auto",
        "of the cached MLP sums: bfloat16 | float32 | auto: bfloat16 where processors have instructions for it (about "
        "twice as fast there; several times slower elsewhere)",
        choices=PRECISIONS,
    )
    cache_mb: int = option(
        4096,
        "memory of the scored rows over all ranks: terms if they fit, else pooled rows; knapsack holds as much once "
        "more, for training rows",
        low=1,
    )
    refit: str = option(
        "none",
        "none | linear: fit every candidate's head on half of the scored rows, score on the others",
        choices=REFITS,
    )
    steps: int = option(200, "updates of the policy", low=1)
    batch: int = option(32, "candidates sampled per update")
    lr: float = option(
        2e-3, "learning rate of the policy (Adam); the paper's 5e-4 needs several times the steps", above=0
    )
    metric: str = option("auc", "reward: auc | logloss (its negative) | accuracy (as printed)", choices=METRICS)
    reward_weight: float = option(10.0, "weight of the reward (the paper prints lambda_r here too, but no number)")
    resource: str = option(
        "widths", "the penalty counts: widths (as printed) | parameters | bytes | served_bytes", choices=RESOURCES
    )
    lambda_r: float = option(0.0025, "Eq. 9: weight of the expected size; effect-first 0.0025, resource-first 0.005")
    lambda_c: float = option(0.08, "Eq. 9: weight of the competition term; effect-first 0.08, resource-first 0.04")
    model_width: int = option(32, "width of the transformer", low=1)
    layers: int = option(2, "layers of the transformer", low=1)
    heads: int = option(4, "attention heads", low=1)
    column_cost: float = option(0.0, "what a column has to add to the metric, whatever its field's cardinality", low=0)
    refine: bool = option(True, "finish with a local search over single and paired changes of width")
    moves: int = option(
        384, "changes of the local search that are scored a round; every single one if they are fewer", low=1
    )
    evidence: float = option(
        1.0, "at last a field gets a narrower width unless its rows' loss rises by so many standard errors; -1 = off"
    )
    judge: str = option("known", f"knapsack: {JUDGE_HELP}", choices=JUDGES)
    spend: bool = option(True, f"knapsack: {SPEND_HELP}")
    seed: int = option(0, "seed of this search, beside run.seed, which the supernet shares")

    def check(self) -> None:
        require(self.batch >= 2, "search.policy.batch", "must be at least 2: the baseline is the others' mean")
        width, heads = self.model_width, self.heads
        require(width % heads == 0, "search.policy.model_width", f"must be a multiple of heads ({heads}), got {width}")


@dataclass
class AdassConfig:
    """AdaS&S: supernet, search, budgets."""

    name: str = option("adass", "name of this search's result among the allocations of the run directory")
    candidates: list[int] = option([2, 8, 16, 32, 64], "candidate widths D, ascending; a leading 0 may drop fields")
    scheme: str = option(
        "shared", "shared (max-table, leading columns) | independent (a table per candidate)", choices=SCHEMES
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    distinct: bool = option(True, "draw and search candidates of a field that cannot differ once, at the cheapest")
    supernet: SupernetConfig = field(default_factory=lambda: SupernetConfig(epochs=10, patience=0))
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    budget: str = option("", BUDGET_HELP)
    precision: str = option("", PRECISION_HELP)
    pareto: list[str] = option([], "further budgets to derive allocations for, e.g. [20%, 40%, 80%]")

    def check(self) -> None:
        check_candidates(self.candidates)
        self.sampling.check_floors(len(self.candidates))
        check_precision(self.precision)
        by_bytes = self.policy.resource == "served_bytes"
        require(bool(self.precision) or not by_bytes, "search.policy.resource", "served_bytes needs search.precision")
        require(bool(self.name) and "/" not in self.name, "search.name", f"must be a plain word, got {self.name!r}")

    @property
    def counted(self) -> str:
        """The resource that the penalty counts."""
        resource = self.policy.resource
        return served(self.precision) if resource == "served_bytes" else resource
