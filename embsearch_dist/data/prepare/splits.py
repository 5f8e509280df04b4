"""Which split each row belongs to: 8:1:1, by a seeded hash of the row number or by time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embsearch_dist.data.hashing import GOLDEN, mix
from embsearch_dist.data.prepare.staging import Part
from embsearch_dist.data.prepare.team import Team

HOW_TO_SPLIT = ("random", "time")
TIMES_IN_MEMORY = 1 << 22


def random_split(row: np.ndarray, seed: int) -> np.ndarray:
    """``[N]`` row numbers -> ``[N]`` uint8: 0 train, 1 validation, 2 test in 8:1:1, by SplitMix64 of the number.

    A hash rather than a drawn permutation: it depends on nothing but the row's number and the seed.
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        z = mix(start + (row.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    tenth = (z % np.uint64(10)).astype(np.uint8)
    return np.maximum(tenth, 7) - np.uint8(7)


def split_parts(parts: Sequence[Part], how: str, seed: int, team: Team) -> np.ndarray:
    """Give every staged row its split; returns ``[parts, 3]`` rows of each split in each part."""
    rows = sum(part.rows for part in parts)
    cuts = team.share("cuts", lambda: [_at_rank(parts, rows * k // 10) for k in (8, 9)]) if how == "time" else []
    for part in parts[team.rank :: team.size]:
        part.save_split(random_split(part.numbers, seed) if how == "random" else _time_split(part, cuts))
        team.look()
    team.barrier("split")
    counts = team.share("split counts", lambda: [np.bincount(p.split(), minlength=3).tolist() for p in parts])
    return np.array(counts, dtype=np.int64).reshape(-1, 3)


def _time_split(part: Part, cuts: Sequence[tuple[float, int]]) -> np.ndarray:
    """``[N]`` uint8: how many of the cuts a row of the part lies behind."""
    behind = np.zeros(part.rows, np.uint8)
    for time, row in cuts:
        behind += _not_before(part, time, row)
    return behind


def _not_before(part: Part, time: float, row: int) -> np.ndarray:
    """``[N]`` bool: whether a row of the part comes at ``(time, row)`` or later."""
    low, high = part.times
    if low == high:  # all alike, and not stored
        return part.numbers >= row if low == time else np.full(part.rows, low > time)
    when = part.time()
    return (when > time) | ((when == time) & (part.numbers >= row))


def _at_rank(parts: Sequence[Part], rank: int) -> tuple[float, int]:
    """Time and row number of the row at ``rank`` (from 0) in the order of (time, row number).

    Nothing is sorted: the times are counted in 65,536 bins, then those of the right bin in 65,536 finer
    ones, until the times that are left fit into memory.
    """
    left, prefix, shift = rank, np.uint64(0), 64
    while shift > 0:
        inside = [k for k, part in enumerate(parts) if _reaches(part, prefix, shift)]
        if sum(parts[k].rows for k in inside) <= TIMES_IN_MEMORY:
            break
        bins = np.zeros(1 << 16, np.int64)
        for k in inside:
            key = _keys(parts[k])
            key = key if shift == 64 else key[key >> np.uint64(shift) == prefix]
            bins += np.bincount((key >> np.uint64(shift - 16)) & np.uint64(0xFFFF), minlength=len(bins))
        below = np.cumsum(bins)
        found = int(np.searchsorted(below, left, side="right"))
        left -= int(below[found] - bins[found])
        prefix, shift = (prefix << np.uint64(16)) | np.uint64(found), shift - 16
    if shift > 0:
        key = np.concatenate([_keys(parts[k]) for k in inside])
        key = key if shift == 64 else key[key >> np.uint64(shift) == prefix]
        prefix = np.partition(key, left)[left]
        left -= int((key < prefix).sum())
    # Of the rows with exactly this time, the one with `left` of them before it.
    for part in parts:
        if not _reaches(part, prefix, 0):
            continue
        rows = np.flatnonzero(_keys(part) == prefix)
        if left < len(rows):
            low, _ = part.times
            time = low if low == part.times[1] else float(part.time()[rows[left]])
            return time, part.first_row + int(rows[left])
        left -= len(rows)
    raise AssertionError("unreachable: the rank lies among the rows")


def _key(time: np.ndarray) -> np.ndarray:
    """float64 -> uint64 in the same order (of either sign)."""
    bits = (time + 0.0).view(np.uint64)  # adding 0 makes -0.0 the same as 0.0
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def _keys(part: Part) -> np.ndarray:
    low, high = part.times
    return np.repeat(_key(np.array([low])), part.rows) if low == high else _key(part.time())


def _reaches(part: Part, prefix: np.uint64, shift: int) -> bool:
    """Whether the part may hold times whose key begins with ``prefix`` (all bits but ``shift``)."""
    if shift == 64:
        return True
    low, high = _key(np.array(part.times)) >> np.uint64(shift)
    return bool(low <= prefix <= high)
