"""Backbones behind the unified embeddings [B, F, d], each with its formula. To import any of them registers all."""

from __future__ import annotations

from embsearch_dist.models.backbones import autoint, dcnv2, finalmlp, masknet, xdeepfm

__all__ = ["autoint", "dcnv2", "finalmlp", "masknet", "xdeepfm"]
