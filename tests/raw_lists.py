"""A small click log with list fields, and what a reader in plain Python makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.dataset import BatchMaker
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.store.bags import Bags, offsets_of
from embsearch_dist.data.store.shards import Rows as DataRows
from embsearch_dist.schema import Field, Schema

FIELDS = """
  user: categorical
  tags: {kind: list, pooling: mean, max_length: 4}
  likes: {kind: list, weight_separator: ":"}
  big: {kind: list, separator: " "}
  x: dense
"""
BIG = 3600
GOOD = ("t0", "t3", "t5")


@dataclass(frozen=True)
class Row:
    """One row; lists as they should come out: no blank values, no more than ``max_length``."""

    user: str
    tags: list[str]
    likes: list[tuple[str, float]]
    big: list[str]
    click: int

    @property
    def lists(self) -> dict[str, list[str]]:
        return {"user": [self.user], "tags": self.tags, "likes": [v for v, _ in self.likes], "big": self.big}


def make_lists(folder: Path, rows: int = 1000, seed: int = 0, fields: str = FIELDS) -> tuple[Path, list[Row]]:
    """``clicks.csv`` and its source file. ``user`` is a name of its own for every row.

    ``tags`` and ``likes`` are often empty, hold repetitions and blanks, and ``tags`` sometimes more than the four
    values that are kept. A click becomes likely with the weight of likes ``a`` and when any tag is of GOOD.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines, found = ["click,user,tags,likes,big,x"], []
    for i in range(rows):
        tags = [f"t{k}" for k in rng.integers(0, 12, rng.integers(0, 7))]
        likes = [(str(rng.choice(list("abcd:"))), round(float(rng.random() * 3), 2)) for _ in range(rng.integers(0, 4))]
        big = [f"b{k}" for k in [i % BIG, *rng.integers(0, BIG, rng.integers(0, 3))]]
        logit = 3 * any(t in GOOD for t in tags[:4]) - 2 + sum(w for v, w in likes if v == "a")
        click, x = int(rng.random() < 1 / (1 + np.exp(-logit))), rng.standard_normal()
        blank = "||" if i % 5 == 0 else "|"
        cells = [blank.join(tags), "|".join(f"{v}:{w}" for v, w in likes), " ".join(big)]
        lines.append(f"{click},u{i},{','.join(cells)},{x:.3f}")
        found.append(Row(f"u{i}", tags[:4], likes, big, click))
    (folder / "clicks.csv").write_text("\n".join(lines) + "\n")
    source = folder / "source.yaml"
    source.write_text(f"name: lists\nfiles: clicks.csv\nlabel: click\nfields:{fields}")
    return source, found


def prepared_lists(folder: Path, rows: int = 4000) -> Path:
    """:func:`make_lists`, prepared once; ``big`` has more than 2048 values, so that two ranks may split it by rows."""
    if not (folder / "out" / "schema.json").exists():
        source, _ = make_lists(folder, rows)
        prepare("table", source, folder / "out", quiet=True, row_group_rows=500)
    return folder / "out"


def list_schema(rows: int = 11, weighted: bool = True) -> Schema:
    """One field of every kind; ``mean`` has ``rows`` ids."""
    fields = (
        Field("one", 11),
        Field("mean", rows, "mean"),
        Field("sum", 5, "sum"),
        Field("scaled", 9, "sum", weighted),
    )
    return Schema("lists", fields, ("x0",))


def random_lists(schema: Schema, rows: int = 32, seed: int = 0, empty: str = "") -> Batch:
    """Random lists of up to four ids, many of none; a field named ``empty`` has none at all."""
    rng = np.random.default_rng(seed)
    single = [f for f in schema.fields if not f.is_list]
    ids = np.stack([rng.integers(0, f.cardinality, rows, dtype=np.int32) for f in single])
    bags = []
    for f in (f for f in schema.fields if f.is_list):
        lengths = rng.integers(0, 5, rows) * (f.name != empty)
        total = int(lengths.sum())
        weights = rng.random(total, dtype=np.float32) * 2 if f.weighted else None
        bags.append(Bags(rng.integers(0, f.cardinality, total, dtype=np.int32), offsets_of(lengths), weights))
    dense = rng.standard_normal((rows, len(schema.dense)), dtype=np.float32)
    label = rng.integers(0, 2, rows).astype(np.float32)
    return BatchMaker(schema)(DataRows(ids, dense, label, tuple(bags)), Position(0, 1))


def plain_pooled(table: torch.Tensor, field: Field, batch: Batch) -> torch.Tensor:
    """``[B, width]`` as torch's own embedding_bag pools them, with gradients to ``table``."""
    jagged = batch.sparse[field.name]
    weights = jagged.weights() if field.weighted else None
    ids, offsets = jagged.values().long(), (jagged.offsets() - jagged.offsets()[0])[:-1].long()
    return functional.embedding_bag(ids, table, offsets, mode=field.pooling or "sum", per_sample_weights=weights)
