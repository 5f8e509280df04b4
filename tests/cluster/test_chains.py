"""From raw data to evaluated models, iHAS and NASRec: two hosts make, bit for bit, what two ranks on one host make."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.cluster.conftest import two_hosts
from tests.cluster.training import ROOT, TORCHRUN
from tests.factories import command_line, small_config
from tests.launch.test_ihas_script import SEARCH
from tests.launch.test_nasrec_script import CONFIG, SHORT

HOSTS = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host-a:29521"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RESULTS = ("allocation.json", "groups.json", "architecture.json", "pareto.json", "evaluation.json", "schema.json")
UNEQUAL = ("seconds", "_per_s", "time", "sha256", "latency", "share", "data", "metrics.jsonl", "path")
Start = Callable[[list[str]], None]


@pytest.fixture(scope="module")
def hosts() -> Iterator[ModuleType]:
    with two_hosts() as tool:
        yield tool


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "ihas.yaml").write_text(small_config("to-be-named", "to-be-named", *SEARCH, method="ihas").to_yaml())
    (folder / "nasrec.yaml").write_text(CONFIG)
    return {path.stem: path for path in folder.iterdir()}


def on_one_host(words: list[str]) -> None:
    command = [*TORCHRUN, "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", "--", *words]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def on_two(hosts: ModuleType, words: list[str]) -> None:
    command = [*TORCHRUN, *HOSTS, "--rdzv-id", hashlib.md5(" ".join(words).encode()).hexdigest(), "--", *words]
    both = {host: hosts.started(host, command, "", ENVIRONMENT) for host in hosts.HOSTS}
    told = {host: process.communicate(timeout=300)[0] for host, process in both.items()}
    assert all(process.returncode == 0 for process in both.values()), told


def chain(start: Start, raw: Path, configs: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Raw data to evaluated models of both methods -> what the files hold, by name."""
    scripts = ROOT / "launch"
    words = ["--format", "table", "--input", raw / "clicks.yaml", "--out", folder / "prepared"]
    start([str(scripts / "prepare.py"), *map(str, words)])
    for method, overrides in (("ihas", []), ("nasrec", SHORT)):
        run = folder / method
        own = command_line(folder / "prepared", run, *overrides)
        start([str(scripts / "search.py"), "--config", str(configs[method]), *own])
        start([str(scripts / "retrain.py"), "--run", str(run)])
        start([str(scripts / "evaluate.py"), "--run", str(run / "retrain" / method)])
    return {str(path.relative_to(folder)): facts(path, folder) for path in sorted(folder.rglob("*")) if is_result(path)}


def is_result(path: Path) -> bool:
    kept = path.suffix in (".distcp", ".parquet") or path.name in RESULTS or path.parent.name == "vocabulary"
    return path.is_file() and kept


def facts(path: Path, folder: Path) -> Any:
    """A checksum; of JSON what it says, but for times, places, and checksums of what holds those."""
    if path.suffix != ".json":
        return hashlib.sha256(path.read_bytes()).digest()
    return same(json.loads(path.read_text().replace(str(folder), "")))


def same(body: Any) -> Any:
    if isinstance(body, dict):
        return {k: same(v) for k, v in body.items() if not any(word in k for word in UNEQUAL)}
    return [same(v) for v in body] if isinstance(body, list) else body


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hosts_make_what_one_makes(hosts: ModuleType, data: Path, configs: dict[str, Path], tmp_path: Path) -> None:
    one = chain(on_one_host, data.parent, configs, tmp_path / "one")
    two = chain(lambda words: on_two(hosts, words), data.parent, configs, tmp_path / "two")
    kinds = [sum(name.endswith(kind) for name in one) for kind in (".distcp", ".parquet", "evaluation.json")]
    assert all(kinds) and kinds[2] >= 2
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
