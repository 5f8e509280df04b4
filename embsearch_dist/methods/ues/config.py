"""Settings of UES, the same width for every field."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option


@dataclass
class UESConfig:
    """Uniform embedding size."""

    width: int = option(32, "width of every field", above=0)
