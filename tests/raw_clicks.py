"""Small raw click logs for the tests of prepare, and digests of what it makes of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

SOURCE = """
files: [clicks.csv]
label: click
time: t
fields: {user: categorical, price: bucketed, score: dense}
"""
# Five shards: 300 training rows each (about 800 in all), 300 of the other splits.
OPTIONS: dict = {"row_group_rows": 100, "rows_per_shard": 300, "quiet": True}


def make_raw(folder: Path, rows: int = 1000, seed: int = 0) -> Path:
    """A small click log (23 bytes a row) whose times are in no order and have ties; gives its source file."""
    rng = np.random.default_rng(seed)
    lines = ["click,t,user,price,score"]
    for _ in range(rows):
        user = "" if rng.random() < 0.1 else f"u{int(rng.integers(8) ** 2)}"
        price, t = rng.integers(0, 50), rng.integers(0, 40)
        lines.append(f"{rng.integers(2)},{t},{user},{price},{rng.normal(5, 3):.3f}")
    (folder / "clicks.csv").write_text("\n".join(lines) + "\n")
    (folder / "source.yaml").write_text(SOURCE)
    return folder / "source.yaml"


def make_criteo(folder: Path, files: int, rows: int) -> list[Path]:
    """Files of ``rows`` rows in Criteo's form."""
    rng = np.random.default_rng(0)
    paths = []
    for k in range(files):
        label, numbers = rng.integers(0, 2, rows), rng.integers(-2, 500, (rows, 13))
        values = rng.integers(0, 40, (rows, 26))
        lines = [
            "\t".join([str(y), *("" if x == 0 else str(x) for x in n), *(f"{v:08x}" if v else "" for v in c)])
            for y, n, c in zip(label, numbers, values, strict=True)
        ]
        paths.append(folder / f"day_{k}.txt")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


def digest(directory: Path) -> dict[str, str]:
    """Path -> hash of every file below a directory."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
