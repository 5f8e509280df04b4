"""Whether a split can say what AUC is: it takes rows of both classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Classes:
    """Rows and clicks of a split, over all ranks."""

    split: str
    rows: int
    clicks: int

    @property
    def one(self) -> bool:
        """Whether all rows are of one class, so that AUC is undefined."""
        return self.clicks in (0, self.rows)

    @property
    def said(self) -> str:
        """For a message: ``the test split has rows of one class only (120 rows, 0 clicks)``."""
        return f"the {self.split} split has rows of one class only ({self.rows:,} rows, {self.clicks:,} clicks)"


def count_classes(directory: Path | str, split: str) -> Classes:
    """Read the labels of a split, and nothing else of it.

    What cannot be read is passed over: whoever opens the split names it.
    """
    rows = clicks = 0
    for path in sorted((Path(directory) / split).glob("part-*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    label = file.read_row_group(group, columns=["label"], use_threads=False)["label"]
                    rows += len(label)
                    clicks += round(pc.sum(label).as_py() or 0)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            continue
    return Classes(split, rows, clicks)
