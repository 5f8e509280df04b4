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
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)
    ordered = np.where(bits < 0, ~bits & 0x7FFFFFFF | ~0x7FFFFFFF, bits)
    packed = np.sort((ordered << 1) | (labels > 0.5))
    return _auc_sorted(packed >> 1, packed & 1)


def _auc_sorted(scores: np.ndarray, labels: np.ndarray) -> float:
    positives = float(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    # Every positive beats the negatives of strictly lower score, and half of those of its own.
    starts = np.flatnonzero(np.concatenate(([True], scores[1:] != scores[:-1])))
    group_positives = np.add.reduceat(labels.astype(np.float64), starts)
    group_sizes = np.diff(np.append(starts, len(scores)))
    group_negatives = group_sizes - group_positives
    below = np.cumsum(group_negatives) - group_negatives
    return float((group_positives * (below + 0.5 * group_negatives)).sum() / (positives * negatives))


def logloss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cross-entropy of ``[N]`` logits, in nats, summed in double precision."""
    return float(functional.binary_cross_entropy_with_logits(logits.double(), labels.double()))


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


def score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """AUC, logloss and accuracy of ``[N]`` logits."""
    return {
        "auc": auc(logits.numpy(), labels.numpy()),
        "logloss": logloss(logits, labels),
        "accuracy": float(((logits > 0) == (labels > 0.5)).double().mean()),
        "rows": float(len(labels)),
    }
