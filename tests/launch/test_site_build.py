"""The site builds from nothing, without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)  # it installs packages
def test_the_site_builds_and_a_warning_would_fail_it(tmp_path: Path) -> None:
    env = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    build = [str(ROOT / "tools" / "site.sh")]
    done = subprocess.run(build, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    html = ROOT / "runs" / "site" / "html"
    assert (
        "Allocation" in (html / "docs" / "api.html").read_text() and (html / "examples" / "01_own_data.html").exists()
    )
    # The pages that it has laid out, with an anchor that is nowhere:
    page = ROOT / "runs" / "site" / "source" / "docs" / "config.md"
    page.write_text(page.read_text() + "\n[there](running.md#nowhere)\n")
    words = ["-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "runs" / "site" / "mkdocs.yml")]
    again = subprocess.run([tmp_path / "venv" / "bin" / "python", *words], capture_output=True, text=True, timeout=120)
    assert again.returncode != 0 and "#nowhere" in again.stdout + again.stderr
