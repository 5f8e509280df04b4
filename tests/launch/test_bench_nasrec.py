"""The benchmarks of NASRec's supernet: their ways of a step agree, and each has a line in the table."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.launch.processes import ROOT
from tests.scripts import fork_ranks

SMALL = ["--space", "small", "--batch", "16"]


def lines_of(tool: str, ranks: int, words: list[str], folder: Path) -> tuple[str, dict[str, list[str]]]:
    """What rank 0 prints, and the cells of its table by name."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    found = fork_ranks(ranks, ROOT / "tools" / "bench" / tool, [*SMALL, *words], ROOT, env, 240, folder)
    assert [done is not None and done.returncode for done in found] == [0] * ranks, found
    printed = found[0].stdout  # type: ignore[union-attr]
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return printed, {name: cells for name, *cells in rows[2:]}


def test_sliced_alone_and_masked_compute_the_same(tmp_path: Path) -> None:
    one = ["--networks", "2", "--masked", "1", "--repeats", "1"]
    printed, rows = lines_of("nasrec.py", 1, one, tmp_path)
    worst = re.search(r"difference of logits (\S+);", printed)
    assert worst is not None and float(worst[1]) < 1e-4
    assert set(rows) == {"sliced", "alone", "masked"} and rows["masked"][2] == "1.0x"


def test_two_ranks_exchange_what_a_step_uses_or_all_of_it(tmp_path: Path) -> None:
    _, rows = lines_of("nasrec_exchange.py", 2, ["--steps", "1"], tmp_path)
    megabytes = [float(cells[1]) for cells in rows.values()]
    assert 0 < megabytes[0] <= megabytes[1] < megabytes[2]
