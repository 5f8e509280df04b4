"""prepare.py as a user starts it on several processes: with TorchX and with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.files import read_json
from tests.raw_clicks import OPTIONS, digest, make_criteo

TORCHX = [sys.executable, "-c", "import sys; from torchx.cli.main import main; sys.exit(main())"]
WORDS = ["--row-group-rows", "100", "--rows-per-shard", "300", "--min-count", "2"]


@pytest.fixture
def start(tmp_path: Path, repo_root: Path):
    """Run a launcher in a folder where TorchX finds this repository's components."""
    (tmp_path / ".torchxconfig").write_text((repo_root / ".torchxconfig").read_text())
    paths = [str(repo_root)]
    if not any(ep.value == "launch.ddp" for ep in entry_points(group="torchx.components")):
        info = tmp_path / "site" / "embsearch_dist-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: embsearch_dist\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[torchx.components]\ndist = launch.ddp\n")
        paths.append(str(info.parent))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = list(map(str, words))
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.slow
def test_two_processes_under_torchx_and_several_files(start, tmp_path: Path) -> None:
    pytest.importorskip("torchx")
    files = make_criteo(tmp_path, files=3, rows=400)
    both = start(
        *(*TORCHX, "run", "dist.ddp", "-j", "1x2", "prepare.py", "--", "--format", "criteo", "--input", *files),
        *("--out", tmp_path / "two", *WORDS),
    )
    assert both.returncode == 0, both.stdout + both.stderr
    assert "1,200 rows in" in both.stdout + both.stderr
    prepare("criteo", files, tmp_path / "one", min_count=2, **OPTIONS)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    # The same rows in one file: all but the names of the sources is the same.
    (tmp_path / "all.txt").write_bytes(b"".join(f.read_bytes() for f in files))
    prepare("criteo", tmp_path / "all.txt", tmp_path / "joined", min_count=2, **OPTIONS)
    left, right = (read_json(tmp_path / d / "manifest.json") for d in ("one", "joined"))
    assert all(left.pop(key) != right.pop(key) for key in ("sources", "sha256"))
    assert left == right


def test_a_bad_line_ends_two_processes_with_one_message(start, repo_root: Path, tmp_path: Path) -> None:
    files = make_criteo(tmp_path, files=2, rows=300)
    files[1].write_text(files[1].read_text() + "2\tno\n")
    begin = time.monotonic()
    done = start(
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, repo_root / "launch" / "prepare.py"),
        *("--format", "criteo", "--input", *files, "--out", tmp_path / "out"),
    )
    assert done.returncode != 0 and time.monotonic() - begin < 60
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {files[1]}, line 301: 2 columns (separator: tab), expected 40. "
        "Fix or remove that line; it begins: '2\\tno'"
    ]
    assert "exitcode  : 2" in done.stderr and 'prepare.py", line' not in done.stderr
    assert not list(tmp_path.glob("out*"))
