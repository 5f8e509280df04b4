"""The benchmarks of NASRec's supernet: their ways of a step agree, and each has a line in the table."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.launch.processes import ROOT, TORCHRUN

SMALL = ["--space", "small", "--batch", "16"]


def lines_of(command: list[str]) -> tuple[str, dict[str, list[str]]]:
    """What is printed, and the cells of its table by name."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return done.stdout, {name: cells for name, *cells in rows[2:]}


def test_sliced_alone_and_masked_compute_the_same() -> None:
    tool = str(ROOT / "tools" / "bench_nasrec.py")
    one = ["--networks", "2", "--masked", "1", "--repeats", "1"]
    printed, rows = lines_of([sys.executable, "-W", "ignore", tool, *SMALL, *one])
    worst = re.search(r"difference of logits (\S+);", printed)
    assert worst is not None and float(worst[1]) < 1e-4
    assert set(rows) == {"sliced", "alone", "masked"} and rows["masked"][2] == "1.0x"


def test_two_ranks_exchange_what_a_step_uses_or_all_of_it() -> None:
    tool = str(ROOT / "tools" / "bench_nasrec_ranks.py")
    _, rows = lines_of([*TORCHRUN, tool, *SMALL, "--steps", "1"])
    megabytes = [float(cells[1]) for cells in rows.values()]
    assert 0 < megabytes[0] <= megabytes[1] < megabytes[2]
