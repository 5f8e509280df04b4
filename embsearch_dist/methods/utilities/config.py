"""Settings of the search by width utilities."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option, require
from embsearch_dist.config.widths import check_candidates
from embsearch_dist.methods.budget_options import BUDGET_HELP, PRECISION_HELP, check_precision
from embsearch_dist.precision import MIXED

UTILITIES = ("loss", "saliency")
BASES = ("sensitivity", "variance", "common")
JUDGES = ("known", "all")
JUDGE_HELP = (
    "rows by which a field's widths are judged: known (where its value has an id of its own: new users say nothing "
    "about the width of the users' table) | all"
)
SPEND_HELP = (
    "where values of some field are mostly new in validation rows, what a budget leaves goes to kept fields, by what "
    "wider candidates save on training rows; false = it is left"
)


@dataclass
class MeasuredSearch:
    """How the losses of a widest model that is cut down are measured, and which widths they are to pay for."""

    candidates: list[int] = option([0, 2, 4, 8, 16, 32], "candidate widths, ascending; a leading 0 may drop fields")
    width: int = option(32, "width of every field of the model that is trained and cut down", low=1)
    basis: str = option(
        "variance",
        "directions of a field: by variance (plain PCA) | sensitivity (of the logit) | common (one basis for all "
        "fields, as fine-tuning cuts fm and deepfm)",
        choices=BASES,
    )
    evidence: float = option(1.0, "a wider candidate counts if it gains more than this many standard errors", low=0)
    judge: str = option(
        "known",
        JUDGE_HELP,
        choices=JUDGES,
        before="all",
    )
    rows: int = option(100_000, "validation rows that are measured, drawn from the whole split", low=1)
    basis_rows: int = option(50_000, "training rows that the directions are taken from", low=1)
    spend: bool = option(
        True,
        SPEND_HELP,
        before=False,
    )
    rounds: int = option(3, "allocations that are measured for a budget, each found from the ones before", low=1)
    seed: int = option(0, "seed of the drawn rows, beside run.seed, which the training shares", low=0)
    budget: str = option("", BUDGET_HELP)
    precision: str = option("", PRECISION_HELP)

    def check(self) -> None:
        check_candidates(self.candidates)
        check_precision(self.precision)
        widest, width = self.candidates[-1], self.width
        require(widest <= width, "search.width", f"must be at least the widest candidate ({widest}), got {width}")


@dataclass
class UtilitiesConfig(MeasuredSearch):
    """Width utilities: no supernet; what the fields of one widest model lose when they are cut down."""

    name: str = option("utilities", "name of this search's result among the allocations of the run directory")
    utility: str = option(
        "loss", "loss (measured on validation rows) | saliency (first order, of one backward pass)", choices=UTILITIES
    )
    pareto: list[str] = option([], "further budgets to derive allocations for, e.g. [20%, 40%, 80%]")
    finetune: bool = option(
        True,
        "what was found begins with the widest model, cut down; false = with fresh weights (retrain.py --finetune)",
        before=False,
    )

    def check(self) -> None:
        super().check()
        measured = self.utility == "loss" or self.precision != MIXED
        require(measured, "search.precision", "mixed needs search.utility loss: it measures what rounding costs")
        require(bool(self.name) and "/" not in self.name, "search.name", f"must be a plain word, got {self.name!r}")


@dataclass
class AutoConfig(UtilitiesConfig):
    """Width utilities, trained beside the uniform width of the same budget; the better of both is the result."""

    name: str = option("auto", "name of this search's result among the allocations of the run directory")
    widen: bool = option(
        True,
        "train wider allocations, too, while the budget holds them and each is better on validation rows",
        before=False,
    )
