"""Exact AUC and logloss over all rows of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch.nn import functional

from embsearch_dist.data.batch import Batch
from embsearch_dist.dist.context import Context


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted as one half (the Mann-Whitney statistic).

    Args:
        scores: ``[N]`` any order-preserving score (a logit will do).
        labels: ``[N]`` 0 or 1.

    Returns:
        The area; NaN when only one class is present.
    """
    # One sort of (score, label) packed into integers: several times faster than an argsort and a gather.
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    packed = np.sort((ordered << 1) | (labels > 0.5))
    positive = (packed & 1).astype(bool)
    places = np.flatnonzero(positive)
    positives, negatives = len(places), len(packed) - len(places)
    if positives == 0 or negatives == 0:
        return float("nan")
    # Negatives before each positive, those of its own score included; of these one half is taken back.
    below = int(places.sum()) - positives * (positives - 1) // 2
    return (below - 0.5 * _tied_pairs(packed >> 1, positive)) / (positives * negatives)


def _tied_pairs(scores: np.ndarray, positive: np.ndarray) -> int:
    """Pairs of a positive and a negative with the same score; ``scores`` ascending."""
    same = scores[1:] == scores[:-1]
    if not same.any():
        return 0
    # Ties are rare: only the rows in one are looked at again.
    tied = np.flatnonzero(np.concatenate((same, [False])) | np.concatenate(([False], same)))
    scores, positive = scores[tied], positive[tied]
    starts = np.flatnonzero(np.concatenate(([True], scores[1:] != scores[:-1])))
    of_group = np.add.reduceat(positive.astype(np.int64), starts)
    sizes = np.diff(np.append(starts, len(scores)))
    return int((of_group * (sizes - of_group)).sum())


def binned_auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """:func:`auc` without a sort, for comparing many models: logits in the same 1/1024, or beyond 32, count as tied.

    On 100,000 rows it is within 1e-5 of the exact area, since order inside so narrow a bin is chance.
    """
    bins = 1 << 16
    place = np.clip(logits * np.float32(1024) + np.float32(bins / 2), 0, bins - 1).astype(np.int32)
    place += (labels > 0.5).astype(np.int32) << 16
    counts = np.bincount(place, minlength=2 * bins)
    negatives, positives = counts[:bins], counts[bins:]
    total = int(negatives.sum()) * int(positives.sum())
    if total == 0:
        return float("nan")
    below = negatives.cumsum() - negatives
    return float((positives * (2 * below + negatives)).sum()) / (2 * total)


def logloss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cross-entropy of ``[N]`` logits, in nats; the rows' losses are added in double precision."""
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return float(losses.sum(dtype=torch.float64)) / len(losses)


@torch.no_grad()
def evaluate(predict: Callable[[Batch], torch.Tensor], batches: Iterable[Batch], context: Context) -> dict[str, float]:
    """Run ``predict`` (batch -> logits ``[B]``) over the batches; metrics over all ranks, on every rank.

    Returns:
        ``auc``, ``logloss``, ``accuracy`` and ``rows``.
    """
    logits, labels = [torch.zeros(0)], [torch.zeros(0)]
    for batch in batches:
        batch = batch.to(context.device)
        logits.append(predict(batch).float().cpu())
        labels.append(batch.label.cpu())
    every = context.gather(torch.cat(logits).to(context.device)).cpu()
    truth = context.gather(torch.cat(labels).to(context.device)).cpu()
    return score(every, truth)


def score(
    logits: torch.Tensor,
    labels: torch.Tensor,
    area: Callable[[np.ndarray, np.ndarray], float] = auc,
) -> dict[str, float]:
    """AUC (by ``area``), logloss and accuracy of ``[N]`` logits."""
    return {
        "auc": area(logits.numpy(), labels.numpy()),
        "logloss": logloss(logits, labels),
        "accuracy": float(((logits > 0) == (labels > 0.5)).double().mean()),
        "rows": float(len(labels)),
    }
