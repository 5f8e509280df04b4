"""Settings of AdaFS (Lin et al. 2022); the numbers are those of the authors' published code."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option, require
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.config.widths import check_table_width
from embsearch_dist.methods.gated.config import OuterConfig

MODES = ("soft", "hard")
NORMS = ("field", "width", "none")


@dataclass
class AdaFSConfig:
    """AdaFS: a controller that weighs or chooses fields, row by row."""

    name: str = option("", "name of the result; empty = adafs-soft or adafs-hard")
    mode: str = option(
        "soft", "soft: all fields, weighed | hard: the heaviest fields of each row, the others 0", choices=MODES
    )
    width: int = option(16, "d: width of every field")
    k: int = option(0, "hard: fields that a row keeps; 0 = half of them")
    renormalise: bool = option(True, "hard: the kept weights of a row add up to 1 again")
    scale: bool = option(False, "multiply weights by the number of fields: embeddings do not shrink when it sets in")
    norm: str = option(
        "field", "BatchNorm of the embeddings: field (statistics per field) | width (over all) | none", choices=NORMS
    )
    dropout: float = option(0.2, "of the controller's outputs, before its softmax", low=0, below=1)
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=20, patience=3))
    outer: OuterConfig = field(default_factory=lambda: OuterConfig(pretrain_epochs=2.0, every=10))

    def check(self) -> None:
        require("/" not in self.name, "search.name", f"must be a plain word, got {self.name!r}")
        check_table_width(self.width)
        require(self.k >= 0, "search.k", f"must be >= 0 (0 = half of the fields), got {self.k}")

    @property
    def result_name(self) -> str:
        """``name``, or what the method is called in its mode."""
        return self.name or f"adafs-{self.mode}"

    def kept(self, fields: int) -> int:
        """How many of ``fields`` fields a row keeps."""
        return fields if self.mode == "soft" else self.k or max(1, fields // 2)
