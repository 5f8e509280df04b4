"""What a command line asks to be trained, read without loading what trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from embsearch_dist.errors import UserError

BRACKET = "bracket"


@dataclass(frozen=True)
class Wish:
    """What the command line asks to be trained.

    Attributes:
        allocation: a file, ``ues-WIDTH``, ``bracket`` or empty.
        name: of the result; empty: from the allocation.
        or_uniform: the uniform width of the budget beside it, and a choice.
        widen: before that choice wider allocations than the found one, as far as they are better and fit the budget.
        best: so many networks of the search; 0: none but the first.
        refit: the winner of them once more, on training and validation rows.
        start: directory of an earlier training to begin with; empty: fresh weights.
        start_optimizer: take the state of its optimizers along.
        finetune: begin with the widest model, cut down; None: as the method does by default.
    """

    allocation: str
    name: str
    or_uniform: bool
    best: int
    refit: bool
    start: str = ""
    start_optimizer: bool = True
    finetune: bool | None = None
    widen: bool = False

    @classmethod
    def of(cls, plain: Mapping[str, str], overrides: Sequence[str]) -> Wish:
        """Raises:
        UserError: options that cannot go together, or no number behind ``--best``.
        """
        wish = cls(
            plain.get("allocation", ""),
            plain.get("name", ""),
            "or-uniform" in plain,
            _best_of(plain, overrides),
            "refit" in plain,
            plain.get("from", ""),
            plain.get("from-optimizer", "true") == "true",
            plain["finetune"] == "true" if "finetune" in plain else None,
        )
        if plain.get("finetune", "true") not in ("true", "false"):
            raise UserError(f"--finetune {plain['finetune']!r}: write true or false")
        if wish.finetune and (wish.start or wish.best):
            other = "--from" if wish.start else "--best"
            raise UserError(f"--finetune begins with the widest model, {other} with other weights. Give one of them")
        if wish.start == "true" or ("from-optimizer" in plain and not wish.start):
            raise UserError("--from wants the directory of an earlier training, RUN/retrain/NAME. Write it behind")
        if plain.get("from-optimizer", "true") not in ("true", "false"):
            raise UserError(f"--from-optimizer {plain['from-optimizer']!r}: write true or false")
        if wish.start and wish.best:
            raise UserError("--best compares networks trained anew. Leave --from out, or give it for the winner alone")
        around = wish.allocation == BRACKET
        if wish.or_uniform and around:
            raise UserError(
                f"--or-uniform compares what was found with a uniform width; leave --allocation {BRACKET} out"
            )
        if around and wish.name:
            raise UserError(f"--allocation {BRACKET} names its results ues-WIDTH; leave --name out")
        if wish.best and (around or wish.or_uniform):
            raise UserError(
                "--best compares networks and --or-uniform or --allocation bracket widths; give one of them"
            )
        return wish


def _best_of(plain: Mapping[str, str], overrides: Sequence[str]) -> int:
    if "best" not in plain:
        if "refit" in plain:
            raise UserError("--refit trains the winner of --best K once more; give both")
        return 0
    if any(o.startswith(("model.architecture=", "model.backbone=")) for o in overrides):
        raise UserError("--best trains the networks that the search kept; leave out --model.architecture and backbone")
    if not plain["best"].isdecimal() or plain["best"] == "0":
        raise UserError(f"--best {plain['best']}: give how many of the search's best networks to train, at least 1")
    return int(plain["best"])
