"""Launchers in processes of their own, for the tests of this folder: what to start, and how it ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
# Two ranks each. Options of the launcher come behind these words, then the script: for torchrun after `--`.
TORCHX = [sys.executable, "-c", "import sys; from torchx.cli.main import main; sys.exit(main())"]
DIST_DDP = [*TORCHX, "run", "dist.ddp", "-j", "1x2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
TORCHRUN += ["--nproc-per-node", "2"]


def launcher_home(folder: Path) -> dict[str, str]:
    """Make ``folder`` one from which TorchX finds this repository's components; the environment for that."""
    (folder / ".torchxconfig").write_text((ROOT / ".torchxconfig").read_text())
    paths = [str(ROOT)]
    if not any(ep.value == "launch.ddp" for ep in entry_points(group="torchx.components")):
        # Not installed in this environment: metadata on the path registers the components just as well.
        info = folder / "site" / "embsearch_dist-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: embsearch_dist\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[torchx.components]\ndist = launch.ddp\n")
        paths.append(str(info.parent))
    return {"PYTHONPATH": os.pathsep.join(paths), "HOME": str(folder)}


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started."""
    if process.poll() is None:
        family = psutil.Process(process.pid)
        for member in [*family.children(recursive=True), family]:
            member.kill()


def finish(process: subprocess.Popen[str], code: int | None = 0, timeout: float = 150) -> str:
    """Wait; what was printed, errors among it. Any exit code but 0 will do for ``code=None``."""
    try:
        told = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        end(process)
        pytest.fail(f"not done after {timeout} s\n{process.communicate()[0]}")
    assert process.returncode != 0 if code is None else process.returncode == code, f"{process.returncode}\n{told}"
    return told


def wait_for_checkpoint(process: subprocess.Popen[str], run: Path) -> None:
    """Until the supernet of ``run`` has a checkpoint that counts, and still trains."""
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints" / "supernet").glob("step-*[0-9]/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
