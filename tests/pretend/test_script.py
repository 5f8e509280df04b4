"""``python -m tools.pretend SCRIPT``: the entry scripts as a user starts them, killed in earnest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist.config.read import load_config
from embsearch_dist.ranks.environment import TUNED
from embsearch_dist.train.faults import VARIABLE
from tests.conftest import ROOT
from tests.factories import CONFIGS, recorded
from tests.pretend.chains import Chain
from tests.scripts import fork_script

MAIN = ROOT / "tools" / "pretend" / "__main__.py"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``start("search.py", *words, fault="")``: the script on the pretend device, in a process of its own."""

    def run(script: str, *words: object, fault: str = "") -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(ROOT), VARIABLE: fault}
        given = [f"launch/{script}", *map(str, words)]
        done = fork_script(MAIN, given, ROOT, {k: v for k, v in env.items() if v}, 120, tmp_path)
        assert done is not None, "not done after 120 s"
        return done

    return run


def test_a_killed_search_goes_on_and_its_model_is_the_same_on_the_cpu(
    ids: Path, tmp_path: Path, start: Callable, run_script: Callable
) -> None:
    chain, run = Chain("adass", "adagrad"), tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text(load_config(CONFIGS, None, chain.words(ids, "cuda"), "adass").to_yaml())
    words = ["--config", config, "--run.dir", run]
    broken = start("search.py", *words, fault="kill stage=supernet step=5")
    assert broken.returncode == -9 and "1 rank(s) on cuda" in broken.stdout
    done = start("search.py", *words)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout and f"next: python launch/retrain.py --run {run}" in done.stdout
    assert len(recorded(run, "supernet", "loss")) == 6
    trained = start("retrain.py", "--run", run)
    assert trained.returncode == 0, trained.stderr
    own = run / "retrain" / "adass"
    auc = json.loads((own / "evaluation.json").read_text())["auc"]
    on_cpu = run_script("evaluate.py", "--run", own, "--run.device", "cpu")
    assert json.loads(on_cpu.stdout)["auc"] == pytest.approx(auc, abs=1e-4)


def test_a_script_finds_the_device_after_the_restart_with_tuned_variables(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(
        "import os, sys, torch\n"
        f"print(sys.argv, os.environ['{TUNED}'], torch.ones(2, device='cuda').device, __name__, sys.path[0])\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in (TUNED, "OMP_NUM_THREADS", "GLIBC_TUNABLES")}
    command = [sys.executable, "-m", "tools.pretend", str(script), "--a", "b"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{[str(script), '--a', 'b']} 1 cuda:0 __main__ {tmp_path}"
