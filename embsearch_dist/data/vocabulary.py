"""Values to ids: counted on the training split, id 0 for everything missing, rare or unseen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one field and what was seen of it in the training split.

    Attributes:
        name: the field.
        values: values with an id of their own; the id of ``values[k]`` is ``k + 1``.
        counts: training rows of each value.
        rows: training rows in all.
        missing: training rows where the field is blank.
        distinct: distinct values in the training rows, before the minimum count.
    """

    name: str
    values: pl.Series
    counts: pl.Series
    rows: int
    missing: int
    distinct: int

    @property
    def cardinality(self) -> int:
        return len(self.values) + 1

    @property
    def rare_share(self) -> float:
        """Share of training rows whose value is there but too rare for an id."""
        return (self.rows - self.missing - int(self.counts.sum())) / max(self.rows, 1)

    @property
    def missing_share(self) -> float:
        return self.missing / max(self.rows, 1)

    def encode(self) -> pl.Expr:
        """Expression: column ``name`` of strings -> int32 ids. It builds its hash table once."""
        if len(self.values) == 0:
            return pl.lit(0, dtype=pl.Int32).alias(self.name)
        known = pl.Enum(self.values)
        code = pl.col(self.name).cast(known, strict=False).to_physical().cast(pl.Int32)
        return (code + 1).fill_null(0).alias(self.name)

    def save(self, directory: Path) -> None:
        """Write ``DIRECTORY/<field>.parquet``: value (string), id (int32), count (int64)."""
        ids = pl.int_range(1, self.cardinality, dtype=pl.Int32, eager=True)
        table = pa.table(
            {
                "value": self.values.to_arrow().cast(pa.large_string()),
                "id": ids.to_arrow(),
                "count": self.counts.cast(pl.Int64).to_arrow(),
            }
        )
        directory.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, directory / f"{self.name}.parquet", compression="zstd", row_group_size=1 << 20)


def build(parts: Sequence[Path], name: str, train: pl.Expr, min_count: int) -> Vocabulary:
    """Count the values of one column over staged Parquet ``parts`` and number them.

    Ids go by falling count, equal counts by value, so they depend on nothing but the rows. One column
    is read at a time and streamed: memory grows with its distinct values, not with the rows.
    """
    counted = (
        pl.scan_parquet(list(parts))
        .filter(train)
        .group_by(name)
        .agg(pl.len().alias("count").cast(pl.Int64))
        .collect(engine="streaming")
    )
    blank = counted.filter(pl.col(name).is_null())
    seen = counted.filter(pl.col(name).is_not_null())
    kept = seen.filter(pl.col("count") >= min_count).sort(["count", name], descending=[True, False])
    return Vocabulary(
        name=name,
        values=kept[name].rechunk(),
        counts=kept["count"].rechunk(),
        rows=int(counted["count"].sum()),
        missing=int(blank["count"].sum()),
        distinct=seen.height,
    )


def load_values(prepared_dir: Path | str, name: str) -> pl.DataFrame:
    """The saved vocabulary of a field: columns value, id, count, by rising id (id 0 has no row)."""
    return pl.read_parquet(Path(prepared_dir) / VOCABULARY / f"{name}.parquet")
