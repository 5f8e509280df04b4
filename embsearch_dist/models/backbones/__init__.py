"""Backbones behind the unified embeddings [B, F, d], each with its formula."""
