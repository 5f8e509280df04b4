"""What ``evaluation.json`` says of a trained model: the same keys for every kind of model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.train.metrics import area_of


@dataclass(frozen=True)
class Evaluation:
    """A model measured on a split.

    Attributes:
        metrics: :func:`embsearch_dist.train.metrics.figures` of its answers.
        seconds: that they took.
        embedding_parameters, embedding_bytes: of all tables that must be loaded.
        dense_parameters: all others that were trained.
        flops_per_sample: of one row; where rows differ, on average.
        own: keys of this kind of model, such as ``widths`` or ``groups``.
        told: :func:`embsearch_dist.train.figures.told` of the answers.
    """

    metrics: dict[str, float]
    seconds: float
    embedding_parameters: int
    embedding_bytes: int
    dense_parameters: int
    flops_per_sample: float
    own: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    def body(self, name: str, stream: BatchStream, config: Config) -> dict[str, Any]:
        """As it is written.

        Args:
            name: of the result's directory.
            stream: the rows it was measured on.
        """
        data, split = stream.schema.data, stream.shards.split
        return {
            "name": result_name(name),
            "seed": config.run.seed,
            "split": split,
            "rows": int(self.metrics["rows"]),
            **area_of(self.metrics, split),
            "logloss": self.metrics["logloss"],
            "embedding_parameters": self.embedding_parameters,
            "embedding_bytes": self.embedding_bytes,
            "dense_parameters": self.dense_parameters,
            "flops_per_sample": self.flops_per_sample,
            "inference_rows_per_s": self.metrics["rows"] / self.seconds,
            "backbone": config.model.backbone,
            **({"data": data} if data else {}),
            **self.own,
            **rows_left_out(stream),
            **self.told,
        }


def result_name(name: str) -> str:
    """The name of a sub-run's directory without its ``-seedN``, so that seeds are averaged."""
    return re.sub(r"-seed\d+$", "", name)


def rows_left_out(stream: BatchStream) -> dict[str, int]:
    """For the record of a result: how many rows it has not seen; nothing when it has seen all."""
    return {"rows_left_out": stream.rows_left_out} if stream.left_out else {}
