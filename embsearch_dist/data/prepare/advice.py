"""What of a data set will disappoint whoever trains on it: said by prepare, while it is cheap to change.

The answers go into ``provenance["warnings"]`` of the schema. They depend on the rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.data.formats.cells import PLAIN, Spelling
from embsearch_dist.data.prepare.staging import Part
from embsearch_dist.data.prepare.vocabulary import Ids
from embsearch_dist.schema import SPLITS, Field

FEW_CLICKS = 200
FEW_STEPS = 20
LEAK = 0.99
DRIFT = 2.0
LEAST = 10  # clicks, and rows without one, below which an AUC says nothing
ONE_EACH = 0.95  # values a row
LEAST_CELLS = 1000  # of which a field of few rows says nothing
SAMPLE = 200_000
BINS = 256


def of_splits(rows: dict[str, int], clicks: dict[str, int]) -> list[str]:
    """Splits of one class or of few clicks (or few rows without one), click rates that change, few steps an epoch."""
    found, few = [], []
    for split in SPLITS:
        n, yes = rows[split], clicks[split]
        if yes in (0, n):
            what = "no click" if yes == 0 else "clicks only"
            found.append(f"the {split} split has {what}: AUC is undefined there. Give more rows or another --split")
        elif min(yes, n - yes) < FEW_CLICKS:
            few.append(f"{yes:,} clicks" if yes <= n - yes else f"{n - yes:,} rows without a click")
            few[-1] += f" in the {split} split"
    if few:
        found.append(f"only {', '.join(few)}: AUC will be uncertain. Give more rows")
    found += _of_rates(rows, clicks)
    batch = TrainConfig().batch_size
    if rows["train"] // batch < FEW_STEPS:
        found.append(
            f"{rows['train']:,} training rows are {rows['train'] // batch} steps an epoch at the default batch size "
            f"of {batch}. Lower train.batch_size, or train more epochs"
        )
    return found


def _of_rates(rows: dict[str, int], clicks: dict[str, int]) -> list[str]:
    """Splits whose odds of a click are :data:`DRIFT` times those of the training rows or more, or less alike."""
    counts = {split: (clicks[split], rows[split] - clicks[split]) for split in SPLITS}
    if any(min(pair) < LEAST for pair in counts.values()):
        return []

    def differs(split: str) -> bool:
        (yes, no), (one, other) = counts["train"], counts[split]
        error = sum(1 / n for n in (yes, no, one, other)) ** 0.5
        return abs(math.log(yes / no * other / one)) > math.log(DRIFT) + 2 * error

    if not any(differs(split) for split in SPLITS[1:]):
        return []
    shares = ", ".join(f"{clicks[split] / rows[split]:.3g} of the {split} rows" for split in SPLITS)
    return [
        f"the share of clicks changes: {shares}. What is chosen on validation rows may not hold for test rows. Check "
        "how the rows are sorted, and that the time of a row is known before the click; or give --split random"
    ]


def of_leaks(parts: Sequence[Part], fields: Sequence[Field], ids: Ids, dense: Sequence[str]) -> list[str]:
    """Columns that decide the label alone: the click rate of their values orders rows held out almost perfectly.

    At most :data:`SAMPLE` rows are looked at, evenly spread over the input.
    """
    step = -(-sum(part.rows for part in parts) // SAMPLE) or 1
    label = np.concatenate([part.label()[::step] for part in parts])
    train = np.concatenate([part.split()[::step] for part in parts]) == 0
    label = label > 0
    clicks = int((label & ~train).sum())
    if min(clicks, int((~train).sum()) - clicks) < LEAST:
        return []
    found = []
    for name in (f.name for f in fields if not f.is_list):
        codes = np.concatenate([ids.of(name, i).take(part.codes(name)[::step]) for i, part in enumerate(parts)])
        found.append((name, _auc(codes, label, train)))
    for name in dense:
        x = np.concatenate([part.dense(name)[::step] for part in parts])
        known = x[train & ~np.isnan(x)]
        cuts = np.unique(np.quantile(known, np.linspace(0, 1, BINS))) if len(known) else known
        codes = np.where(np.isnan(x), 0, 1 + np.searchsorted(cuts, x))
        found.append((name, _auc(codes, label, train)))
    return [
        f"{name!r} alone decides the label (AUC {auc:.3f} on held-out rows). Is it known before the click? "
        "Remove it if not"
        for name, auc in found
        if auc > LEAK
    ]


def _auc(codes: np.ndarray, label: np.ndarray, train: np.ndarray) -> float:
    """AUC over the rows held out of the click rate that a row's code has in training, of few rows drawn to the mean.
    Equal rates count half.

    Args:
        codes: ``[N]``, from 0.
        label, train: ``[N]`` bool.
    """
    if codes.max(initial=0) > 4 * len(codes):
        codes = np.unique(codes, return_inverse=True)[1]
    size = int(codes.max(initial=0)) + 1
    # One pass over the rows; what follows works on codes, of which most fields have far fewer.
    counts = np.bincount(codes + size * (label + 2 * train), minlength=4 * size).reshape(2, 2, size)
    (held_no, held_yes), (no, yes) = counts
    mean = yes.sum() / max(yes.sum() + no.sum(), 1)
    there = held_no + held_yes > 0
    _, place = np.unique(((yes + mean) / (yes + no + 1))[there], return_inverse=True)
    above, below = np.bincount(place, held_yes[there]), np.bincount(place, held_no[there])
    lower = np.cumsum(below) - below / 2
    return float((above * lower).sum() / (above.sum() * below.sum()))


def of_constants(parts: Sequence[Part], scale: dict[str, tuple[float, float]]) -> list[str]:
    """Dense columns that were constant in the earlier data, whose ``scale`` is kept, and are so no more."""
    found = []
    for name in (name for name, (_, std) in scale.items() if std == 0):
        mean = scale[name][0]
        if any(((x := part.dense(name)) != mean)[~np.isnan(x)].any() for part in parts):
            found.append(
                f"dense column {name!r} was constant ({mean:g}) in the data of --vocabulary and stays zeros. Prepare "
                "once without --vocabulary if it is to count"
            )
    return found


def of_identity(name: str, distinct: int, cells: int) -> str | None:
    """A warning where a field has almost one value a row: the number of the row, of the session, or a time.

    Args:
        distinct: values in the training rows.
        cells: training rows that are not blank.
    """
    if cells < LEAST_CELLS or distinct < ONE_EACH * cells:
        return None
    return (
        f"{name!r} has almost a value for each row ({distinct:,} in {cells:,} training rows): nothing can be learned "
        "from it for other rows, but it costs a table. Remove it, or make it bucketed or dense if it is a number"
    )


def of_floats(name: str, values: pl.Series, limit: float) -> str | None:
    """A warning where a vocabulary that was read from floats holds values from ``limit`` on, the power of two from
    which on these cannot tell one whole number from the next."""
    large = values.filter((values.cast(pl.Float64, strict=False).fill_nan(None).abs() >= limit).fill_null(False))
    if not len(large):
        return None
    return (
        f"{name!r} has {len(large):,} values from 2^{math.log2(limit):.0f} on, such as {large[0]}, and the floats in "
        "its files cannot tell whole numbers of that size apart: several ids may have become one when the files were "
        "written. Write ids as whole numbers or text"
    )


def of_spellings(name: str, values: pl.Series, spelling: Spelling = PLAIN, lists: bool = False) -> str | None:
    """A warning where a vocabulary holds a value twice: a whole number as ``1`` and as ``1.0``, or any with blanks.

    ``lists``: it is that of a list.
    """
    return _of_blanks(name, values) or _of_points(name, values, spelling, "list" if lists else "categorical")


def _of_blanks(name: str, values: pl.Series) -> str | None:
    bare = values.str.strip_chars()
    padded = bare != values
    twice = values.filter(padded & bare.is_in(values.filter(~padded).implode()))
    if not len(twice):
        return None
    one = str(twice[0])
    return (
        f"{name!r} has {len(twice):,} values with and without blanks around them, such as {one!r} and {one.strip()!r}. "
        "If they are the same, write `spaces: trim` in the source file"
    )


def _of_points(name: str, values: pl.Series, spelling: Spelling, kind: str) -> str | None:
    pointed = values.filter(values.str.ends_with("0"))  # most values are let go without a regular expression
    whole = spelling.whole(pointed)
    twice = pointed.filter((whole != pointed) & whole.is_in(values.implode()))
    if not len(twice):
        return _of_points_alone(name, values, whole, kind)
    one = twice.head(1)
    return (
        f"{name!r} has {len(twice):,} values written in two ways, such as {spelling.whole(one)[0]} and {one[0]}. "
        f"If they are the same: {name}: {{kind: {kind}, whole_numbers: true}}"
    )


def _of_points_alone(name: str, values: pl.Series, whole: pl.Series, kind: str) -> str | None:
    """A warning where all values are whole numbers with a point, ``whole`` without it: pandas writes a column of whole
    numbers so that has gaps."""
    if len(whole) < len(values) or not len(values) or (whole == values).any():
        return None
    return (
        f"all values of {name!r} are written like {values[0]}. Rows to be predicted that hold numbers (Parquet, JSON) "
        f"say {whole[0]}, another value. If they are whole numbers: {name}: {{kind: {kind}, whole_numbers: true}}"
    )


def of_rare(name: str, cardinality: int, distinct: int) -> str | None:
    """A warning where no value of a field has an id: each is in too few training rows, or was not known, or none is
    there."""
    if cardinality > 1:
        return None
    if distinct == 0:
        return f"{name!r} has no value in the training rows, so nothing can be learned from it. Remove it"
    return (
        f"none of the {distinct:,} values of {name!r} in the training rows has an id of its own: all rows have id 0, "
        "so nothing can be learned from it. Lower --min-count (or extend the --vocabulary), or remove it"
    )
