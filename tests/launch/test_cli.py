"""The command ``embsearch``, and an installation away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli

ROOT = Path(__file__).resolve().parents[2]


def told(*words: str, site: Path = ROOT, cwd: Path | None = None) -> tuple[int, str, str]:
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(site / "launch" / "cli.py"), *words]
    done = subprocess.run(command, env=env, cwd=cwd or ROOT, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def test_every_command_is_there() -> None:
    for command in cli.SCRIPTS:
        assert Path(cli.words_of(command, [])[1]).exists()
    assert cli.words_of("serve", ["DIR"])[1:] == ["-m", "embsearch_dist.serve", "DIR"]
    help_text = told("--help")[1]
    assert all(command in help_text for command in cli.COMMANDS)


def test_it_is_the_script_with_its_output_and_exit_code() -> None:
    code, out, _ = told("report", "--help")
    assert code == 0 and "usage" in out
    code, _, err = told("predict", "--input", "x.csv")  # it says so before it loads torch
    assert code == 2 and "the following arguments are required: --model, --out" in err
    code, _, err = told("serach")
    assert code == 2 and err.startswith("error: unknown command 'serach' (did you mean 'search'?)")


@pytest.mark.slow
def test_a_wheel_runs_away_from_the_checkout(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(build, check=True, capture_output=True)
    wheel, site = next(tmp_path.glob("*.whl")), tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    shutil.rmtree(tmp_path / "source")
    body = "method: random\ndata: {make: synthetic, path: d, rows: 3000}\nsearch: {budget: 25%}\ntrain: {epochs: 1}\n"
    (tmp_path / "my.yaml").write_text(body)
    for words in (
        ("search", "--config", "my.yaml", "--run.dir", "r"),
        ("retrain", "--run", "r"),
        ("report", "r"),
        ("export", "--run", "r/retrain/random", "--out", "x"),
        ("search", "--print-config"),  # the default config came along
    ):
        code, _, err = told(*words, site=site, cwd=tmp_path)
        assert code == 0, err
    assert (tmp_path / "r" / "report" / "index.html").exists() and (tmp_path / "x" / "model.json").exists()
