"""The directions of a field's embedding space, most important first: what is left of a field is its first few.

By variance (plain PCA, as FDO has it), by what the logit reads of them, or the table's own columns by any score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embsearch_dist.methods.widest import Moments

RIDGE = 1e-6  # of the mean sensitivity: directions that the head does not read keep a place in the basis


@dataclass(frozen=True)
class Bases:
    """Per field a basis of its embedding space, most important direction first.

    Attributes:
        mean: ``[F, w]``.
        analysis: ``[F, w, w]``; column k gives coefficient k of ``x - mean``.
        synthesis: ``[F, w, w]``; row k is what coefficient k stands for. Inverse of ``analysis``.
    """

    mean: torch.Tensor
    analysis: torch.Tensor
    synthesis: torch.Tensor

    @classmethod
    def of(cls, mean: torch.Tensor, analysis: torch.Tensor, synthesis: torch.Tensor) -> Bases:
        return cls(mean.float(), analysis.float().contiguous(), synthesis.float().contiguous())

    def coefficients(self, x: torch.Tensor) -> torch.Tensor:
        """``[F, n, w]`` embeddings -> their coefficients."""
        return torch.bmm(x - self.mean[:, None], self.analysis)

    def embeddings(self, coefficients: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[F, n, w]`` whose first ``ranks [F]`` directions are kept."""
        width = self.mean.shape[1]
        kept = torch.arange(width, device=ranks.device) < ranks[:, None]
        return torch.baddbmm(self.mean[:, None], coefficients, self.synthesis * kept[..., None])


def principal(moments: Moments) -> Bases:
    """Principal components of each field's embedding."""
    _, vectors = torch.linalg.eigh(moments.covariance)
    vectors = vectors.flip(2)
    return Bases.of(moments.mean, vectors, vectors.transpose(1, 2))


def common(moments: Moments) -> Bases:
    """One basis for all fields, as FM's products of fields ask for: eigenvectors of the sum of their second moments.
    :mod:`embsearch_dist.train.warm.widths` turns the tables of such models alike."""
    second = (moments.second / moments.count[:, None, None]).sum(0)
    _, vectors = torch.linalg.eigh(second)
    vectors = vectors.flip(1).expand_as(moments.second)
    return Bases.of(moments.mean, vectors, vectors.transpose(1, 2))


def sensitive(moments: Moments, gram: torch.Tensor) -> Bases:
    """Principal components in the metric of what the head reads.

    The error of a truncation is not the distance of two embeddings but what that does to the logit, to first order
    ``(g . dx)^2`` with the gradient g of the logit. So components are taken of ``G^(1/2) (x - mean)``, where
    ``G = E[g g^T]`` (as Fisher-weighted SVD does, Hsu et al. 2022, with the full matrix instead of row sums).

    Args:
        gram: ``[F, w, w]``, G.
    """
    width = gram.shape[1]
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(gram + ridge[:, None, None] * identity)
    root = values.clamp(min=0).sqrt().clamp(min=1e-15)
    half = vectors * root[:, None] @ vectors.transpose(1, 2)
    inverse = vectors / root[:, None] @ vectors.transpose(1, 2)
    _, components = torch.linalg.eigh(half @ moments.covariance @ half)
    components = components.flip(2)
    return Bases.of(moments.mean, half @ components, components.transpose(1, 2) @ inverse)


def by_columns(moments: Moments) -> Bases:
    """The embedding's own columns, largest mean square first."""
    return columns_by(moments.second.diagonal(dim1=1, dim2=2) / moments.count[:, None], moments.mean)


def columns_by(scores: torch.Tensor, mean: torch.Tensor) -> Bases:
    """The embedding's own columns, highest score first; ``scores`` and ``mean`` are ``[F, w]``."""
    order = scores.argsort(stable=True, dim=1, descending=True)
    chosen = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)[order]
    return Bases.of(mean, chosen.transpose(1, 2), chosen)
