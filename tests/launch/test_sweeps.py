"""The sweeps of corruption.py and kills.py in tools/breaking: nothing silently different, no traceback, no hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def sweep(tool: str, out: Path, *words: object) -> tuple[list[dict[str, Any]], str]:
    """Run a tool to its end; its cases and what it printed. Its exit code says whether any case is bad."""
    command = [sys.executable, str(ROOT / "tools" / "breaking" / tool), "--out", str(out), *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()[1:]], done.stdout


@pytest.mark.slow
def test_a_few_damaged_files(tmp_path: Path) -> None:
    cases, told = sweep("corruption.py", tmp_path, "--methods", "ues", "--cases", 6, "--seed", 2)
    assert {"refused", "harmless"} <= {c["class"] for c in cases} and "| all | 6 |" in told
    again, _ = sweep("corruption.py", tmp_path, "--methods", "ues", "--cases", 6, "--seed", 2)
    assert again == cases


@pytest.mark.slow
def test_five_hundred_damaged_files(tmp_path: Path) -> None:
    cases, _ = sweep("corruption.py", tmp_path, "--cases", 500)
    classes = [c["class"] for c in cases]
    assert len(cases) == 500 and min(classes.count(c) for c in ("refused", "healed", "harmless")) > 30


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    cases, _ = sweep("kills.py", tmp_path, "--cases", 120)
    assert sum(c["kills"] for c in cases) >= 100
