"""Checks that end in every way a check of tools/gpu_check.py can end; see tests/unit/test_gpu_check.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tools.gpucheck.lab import Lab
from tools.gpucheck.worker import Skip


def fine(lab: Lab) -> None:
    lab.note(answer=42, shown_in_two_words=0.5)
    lab.note(parts={"a": 1}, nothing=float("nan"))
    (lab.folder / "file").write_text("writes where it may")


def wrong(lab: Lab) -> None:
    lab.note(first=1)
    lab.close("auc", 0.75, 0.7, 1e-4)


def broken(lab: Lab) -> None:
    raise ZeroDivisionError("a bug of the check")


def leaves(lab: Lab) -> None:
    sys.exit(0)


def crashes(lab: Lab) -> None:
    lab.note(before=2)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(lab: Lab) -> None:
    """Not alone: with a child that must not outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    lab.note(child=child.pid)
    signal.pause()


def skips(lab: Lab) -> None:
    raise Skip("nothing to see")
