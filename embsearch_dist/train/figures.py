"""What a result file says of a model's answers, beyond AUC and logloss: the same keys whatever the method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.bootstrap import FIGURES, RESAMPLES, Sample, as_told, resampled
from embsearch_dist.train.measures import pack, reliability
from embsearch_dist.train.metrics import Predictions

DIFFERENCE = "difference"


@dataclass(frozen=True)
class Other:
    """A model to compare with: its result's name, its seed, and its answers in stored order."""

    name: str
    seed: int
    found: Predictions


@dataclass(frozen=True)
class Wanted:
    """What an evaluation is to tell.

    Attributes:
        group: a field for AUC by group; intervals then draw its values and not rows. Empty: none.
        resamples: for intervals; 0: none.
        seed: of the resamples.
        other: the model from which the differences are wanted.
    """

    group: str = ""
    resamples: int = 0
    seed: int = 0
    other: Other | None = None


def resamples_of(text: str | None) -> int:
    """How many resamples ``--intervals`` asks for; None: it was not given.

    Raises:
        UserError: no number, or too few for an interval.
    """
    if text is None:
        return 0
    number = RESAMPLES if text == "true" else int(text) if text.isdecimal() else 0
    if number < 40:
        raise UserError(f"--intervals {text}: give how many resamples to draw, at least 40, or nothing for {RESAMPLES}")
    return number


def told(figures: dict[str, float], found: Predictions, wanted: Wanted, context: Context) -> dict[str, Any]:
    """The keys that an evaluation file has beside AUC and logloss; all ranks call it. What is undefined is None.

    ``ne``, ``calibration``, ``ece``, and ``reliability`` (:class:`embsearch_dist.train.measures.Curve`); with a group
    ``by_group``; with resamples ``intervals``; with another model :data:`DIFFERENCE`, which goes to a file of its own.

    Args:
        figures: :func:`embsearch_dist.train.metrics.figures` of ``found``.
    """
    body: dict[str, Any] = {key: _known(figures[key]) for key in ("ne", "calibration", "ece")}
    packed = pack(found.logits.numpy(), found.labels.numpy())
    packed.sort()
    body["reliability"] = reliability(packed).body()
    del packed
    if wanted.group:
        auc, count, share = (figures[f"group_{key}"] for key in ("auc", "count", "share"))
        body["by_group"] = {"field": wanted.group, "auc": _known(auc), "groups": int(count), "rows": _known(share)}
    if wanted.resamples:
        body |= _intervals(found.in_stored_order(context), wanted, context)
    return body


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _intervals(found: Predictions, wanted: Wanted, context: Context) -> dict[str, Any]:
    logits, labels = found.logits.numpy(), found.labels.numpy()
    groups = None if found.groups is None else found.groups.numpy()
    own = Sample(logits, labels, groups)
    head = {"resamples": wanted.resamples, "seed": wanted.seed, "drawn": wanted.group or "rows"}
    body: dict[str, Any] = {"intervals": head | _bootstrap([own], groups, wanted, context)}
    if wanted.other is not None:
        if not np.array_equal(wanted.other.found.labels.numpy(), labels):
            raise UserError(f"{wanted.other.name} was measured on other rows: their labels differ", everywhere=True)
        other = Sample(wanted.other.found.logits.numpy(), labels, groups)
        figures = _bootstrap([own, other], groups, wanted, context)
        body[DIFFERENCE] = {"against": wanted.other.name, "against_seed": wanted.other.seed, **head, **figures}
    return body


def _bootstrap(
    samples: list[Sample], groups: np.ndarray | None, wanted: Wanted, context: Context
) -> dict[str, dict[str, Any]]:
    """Each rank draws its share of the resamples; which they are does not depend on the number of ranks."""
    numbers = range(context.rank, wanted.resamples, context.world_size)
    parts = context.every(resampled(samples, wanted.seed, numbers, groups).tolist())
    spread = np.empty((wanted.resamples, len(FIGURES)))
    for rank, part in enumerate(parts):
        if part:  # with fewer resamples than ranks some draw none
            spread[rank :: context.world_size] = part
    ones = np.ones(len(samples[0].order), np.uint8)
    values = [s.figures(ones) for s in samples]
    return as_told(values[0] if len(values) == 1 else values[0] - values[1], spread)
