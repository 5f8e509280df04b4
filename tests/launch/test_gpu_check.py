"""tools/gpu_check.py as a user starts it, on the pretend device: fifteen checks, a line each, none failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.processes import ROOT
from tools.gpucheck.listing import CHECKS, ONE_CARD


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifteen_checks_run_and_none_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "tools/gpu_check.py", "--device", "pretend", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--budget", "840"], cwd=ROOT, capture_output=True, text=True, timeout=880)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["check"] for line in lines] == [c.name for c in CHECKS] and len(lines) == 15
    assert {line["check"]: line["why"] for line in lines if line["status"] != "ok"} == {}, done.stdout
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == lines
    assert "15 checks: 15 ok." in done.stdout and ONE_CARD in (tmp_path / "table.md").read_text()
    for line in lines:
        assert line["device"].startswith("pretend device") and line["torch"] and line["fbgemm"] and line["commit"]
