"""TorchX: what `dist.ddp` builds, and real local jobs through the command line a user types."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torchx")

from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torchx.specs import AppDef
from torchx.specs.builders import materialize_appdef
from torchx.specs.file_linter import validate
from torchx.specs.finder import ComponentValidationException

from embsearch_dist.data.formats import FORMATS
from launch import components
from launch import ddp as dist
from tests.launch.processes import DIST_DDP, finish

WORKER = """
import json, os, signal, sys, time
folder, behaviour, *rest = sys.argv[1:]
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
names = ("WORLD_SIZE", "OMP_NUM_THREADS", "GLIBC_TUNABLES", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
report = {"argv": rest, "pid": os.getpid(), "python": sys.executable, "env": {n: os.environ.get(n) for n in names}}
path = f"{folder}/rank{rank}-attempt{attempt}.json"
with open(path + ".part", "w") as f:
    json.dump(report, f)
os.rename(path + ".part", path)
print("hello from rank", rank, flush=True)
while behaviour == "fail" and not os.path.exists(f"{folder}/rank0-attempt{attempt}.json"):
    time.sleep(0.01)  # the failure ends rank 0 as well, which may have come this far later
if behaviour == "fail-once" and attempt == "0" or behaviour == "fail" and rank == "1":
    sys.exit("rank 1 gives up")
if behaviour == "stubborn" and rank == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour in ("fail", "stubborn"):
    time.sleep(120)
"""


PYTHON = '"$$(command -v /venv/bin/python python python3 | head -n 1)"'


def appdef(*args: str) -> AppDef:
    return materialize_appdef(dist.ddp, list(args))


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> None:
    """The repository as current folder, and none of the variables that we would set."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES", "LOGLEVEL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", *dist.SUBMITTING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.chdir(repo_root)
    # The entry scripts are another folder's business; here only their names matter.
    monkeypatch.setattr(dist, "_find_script", lambda script: f"launch/{script}")


@pytest.mark.usefixtures("plain_machine")
def test_single_node_appdef() -> None:
    app = appdef("-j", "1x4", "--max_restarts", "2", "search.py", "--config", "a b.yaml", "--run.dir", "runs/x")
    (role,) = app.roles
    assert (app.name, role.name, role.num_replicas, role.entrypoint) == ("search", "search", 1, "bash")
    assert role.args == [
        "-c",
        f'eval "$$({PYTHON} -m embsearch_dist.ranks.environment --ranks 4 --nodes 1)"; '
        f"exec {PYTHON} -m embsearch_dist.ranks.torchrun "
        "--standalone --local-addr localhost --nnodes 1 --nproc-per-node 4 --max-restarts 2 --tee 3 --role '' "
        "-- launch/search.py --config 'a b.yaml' --run.dir runs/x",
    ]
    assert role.env == {
        "LOGLEVEL": "WARNING",
        "TORCHX_TRACKING_EXPERIMENT_NAME": "default-experiment",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    # Nothing is asked of a scheduler that was not asked for here.
    assert (role.resource.cpu, role.resource.memMB, role.resource.gpu) == (-1, -1, -1)


@pytest.mark.usefixtures("plain_machine")
def test_multi_node_appdef_uses_the_c10d_rendezvous() -> None:
    (role,) = appdef("-j", "2:4x8", "--cpu", "16", "--memMB", "32000", "--gpu", "8", "search.py").roles
    assert (role.min_replicas, role.num_replicas, role.port_map) == (2, 4, {"c10d": 29500})
    assert "--rdzv-backend c10d --rdzv-endpoint $${${rank0_env}:=localhost}:29500 --rdzv-id ${app_id}" in role.args[1]
    assert "--nnodes 2:4 --nproc-per-node 8" in role.args[1]
    assert "--standalone" not in role.args[1]
    assert (role.resource.cpu, role.resource.memMB, role.resource.gpu) == (16, 32000, 8)
    assert "-m embsearch_dist.ranks.environment --ranks 8 --nodes 4 --cores 16)" in role.args[1]
    assert not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} & role.env.keys()  # those of the node count, not of this machine


@pytest.mark.usefixtures("plain_machine")
def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0")
    (role,) = appdef("-j", "1x2", "--env", "GLIBC_TUNABLES=mine,LOGLEVEL=INFO", "search.py").roles
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in role.env  # the job inherits it
    assert (role.env["GLIBC_TUNABLES"], role.env["LOGLEVEL"]) == ("mine", "INFO")


@pytest.mark.usefixtures("plain_machine")
def test_schedulers_are_asked_for_what_the_options_say_and_no_more() -> None:
    pytest.importorskip("torchx.schedulers.slurm_scheduler")
    from torchx.schedulers.slurm_scheduler import SlurmReplicaRequest

    def asked(*options: str) -> dict[str, str | None]:
        (role,) = appdef(*options, "search.py").roles
        return SlurmReplicaRequest.from_role("search-0", role, {}, nomem=False).sbatch_opts

    assert not {"cpus-per-task", "mem", "gpus-per-task"} & asked("-j", "1x8").keys()
    told = asked("-j", "1x8", "--cpu", "16", "--gpu", "8", "--memMB", "32000")
    assert (told["cpus-per-task"], told["mem"], told["gpus-per-task"]) == ("16", "32000", "8")


@pytest.mark.usefixtures("plain_machine")
@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
def test_the_script_of_a_scheduler_ends_with_the_code_of_the_ranks(scheduler: str) -> None:
    """What Slurm and Kubernetes get; neither is here."""
    pytest.importorskip("kubernetes" if scheduler == "kubernetes" else "torchx.schedulers.slurm_scheduler")
    from torchx.schedulers import get_scheduler_factories

    app = appdef("-j", "2x1", "--max_retries", "3", "search.py", "--config", "a.yaml")
    made = get_scheduler_factories()[scheduler](session_name="tests")
    cfg = {"queue": "default"} if scheduler == "kubernetes" else {}
    text = " ".join(str(made.submit_dryrun(app, made.run_opts().resolve(cfg))).split())  # YAML breaks lines
    assert text.count("-m embsearch_dist.ranks.torchrun") == 2  # a node each
    assert "-m torch.distributed.run" not in text
    assert "--nnodes 2 --nproc-per-node 1 --max-restarts 0" in text
    assert ("TORCHX_MAX_RETRIES=3" if scheduler == "slurm" else "maxRetry: 3") in text


@pytest.mark.usefixtures("plain_machine")
def test_slurm_tells_a_time_limit_before_it_comes_and_keeps_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBATCH_SIGNAL", raising=False)
    monkeypatch.setenv("SLURM_OPEN_MODE", "truncate")  # the user's own
    appdef("-j", "1x2", "search.py")
    assert (os.environ["SBATCH_SIGNAL"], os.environ["SLURM_OPEN_MODE"]) == ("TERM@120", "truncate")


@pytest.mark.usefixtures("plain_machine")
@pytest.mark.parametrize(
    "words",
    [
        ["search.py", "--max", "3"],
        ["--", "search.py", "--max", "3"],
        ["--", "search.py", "--", "--max", "3"],
        ["--script", "search.py", "--", "--max", "3"],
    ],
)
def test_spellings_of_the_script(words: list[str]) -> None:
    if words[0] == "search.py":  # argparse looks for abbreviations even behind the script's name
        with pytest.raises(SystemExit):
            appdef(*words)
    else:
        assert appdef(*words).roles[0].args[1].endswith(" -- launch/search.py --max 3")


@pytest.mark.usefixtures("plain_machine")
def test_module_and_names() -> None:
    app = appdef("--name", "ads/first", "-m", "my.trainer", "--", "--lr", "0.1")
    assert (app.name, app.roles[0].name) == ("first", "trainer")
    assert app.roles[0].args[1].endswith(" -m -- my.trainer --lr 0.1")
    assert app.roles[0].env["TORCHX_TRACKING_EXPERIMENT_NAME"] == "ads"


@pytest.mark.parametrize("words", [[], ["--script", "a.py", "-m", "a"], ["-j", "2y3", "a.py"]])
def test_bad_calls_are_reported_without_a_traceback(words: list[str]) -> None:
    with pytest.raises(ComponentValidationException):
        appdef(*words)


def test_scripts_of_this_repository_need_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repo_root: Path
) -> None:
    monkeypatch.chdir(repo_root)
    assert dist._find_script("components.py") == "launch/components.py"
    monkeypatch.chdir(tmp_path)
    assert dist._find_script("components.py") == str(repo_root / "launch" / "components.py")
    assert dist._find_script("elsewhere.py") == "elsewhere.py"
    (tmp_path / "components.py").touch()
    assert dist._find_script("components.py") == "components.py"


@pytest.mark.usefixtures("plain_machine")
def test_components_are_valid_and_call_the_scripts() -> None:
    raw = ["--format", "criteo", "--out", "o", "--input", "day_0", "-j", "1x4", "--", "day_1", "--split", "time"]
    calls = {
        components.prepare: (raw, "--format criteo --out o --input day_0 day_1 --split time"),
        components.search: (["--config", "c.yaml", "--", "--seed", "1"], "--config c.yaml --seed 1"),
        components.retrain: (["--run", "r", "--allocation", "ues-32"], "--run r --allocation ues-32"),
        components.evaluate: (["--run", "r"], "--run r"),
    }
    for component, (words, expected) in calls.items():
        assert validate(components.__file__, component.__name__) == []
        app = materialize_appdef(component, words)
        assert app.roles[0].args[1].endswith(f"-- launch/{component.__name__}.py {expected}")
        assert f"--nproc-per-node {4 if '1x4' in words else 1} " in app.roles[0].args[1]
    assert validate(dist.__file__, "ddp") == []


def test_the_help_of_prepare_names_the_formats_there_are() -> None:
    words = str(components.prepare.__doc__).partition("format: ")[2].partition("\n")[0]
    assert words.replace(" or ", ", ").split(", ") == [*FORMATS, "synthetic", "populations"]


# ---- real jobs ----


@pytest.fixture
def job(tmp_path: Path, start: Callable) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `torchx run dist.ddp -j 1x2 ... worker.py`; ranks whose launcher has left them are killed afterwards."""
    (tmp_path / "worker.py").write_text(WORKER)

    def run(behaviour: str, *rest: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        return start(*DIST_DDP, *options, "worker.py", tmp_path, behaviour, *rest)

    yield run
    for report in reports(tmp_path):
        if alive(report["pid"]):
            os.kill(report["pid"], signal.SIGKILL)


def reports(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_workers(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    deadline = time.monotonic() + 60
    while len(found := reports(folder)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)[0]
        time.sleep(0.05)
    return [report["pid"] for report in found]


def test_a_job_runs_on_two_ranks(job, tmp_path: Path) -> None:
    output = finish(job("work", "--config", "c.yaml", "--log", "a b", "--run", "$HOME"))
    assert "hello from rank 0" in output and "hello from rank 1" in output
    first, second = reports(tmp_path)
    # --log and --run are abbreviations of torchrun's own options, and must not reach it
    assert first["argv"] == second["argv"] == ["--config", "c.yaml", "--log", "a b", "--run", "$HOME"]
    assert first["env"]["WORLD_SIZE"] == "2"
    assert first["env"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "glibc.malloc.hugetlb=1" in first["env"]["GLIBC_TUNABLES"]
    assert int(first["env"]["OMP_NUM_THREADS"]) >= 1
    assert first["python"] == sys.executable


def test_a_failing_rank_ends_the_job(job, tmp_path: Path) -> None:
    process = job("fail")
    pids = wait_for_workers(tmp_path, process)
    begin = time.monotonic()
    output = finish(process, code=None, timeout=60)
    assert "rank 1 gives up" in output
    assert time.monotonic() - begin < 20
    assert not any(alive(pid) for pid in pids)


def test_a_failed_attempt_is_repeated(job, tmp_path: Path) -> None:
    finish(job("fail-once", options=("--max_restarts", "1")))
    assert (tmp_path / "rank0-attempt1.json").exists() and (tmp_path / "rank1-attempt1.json").exists()


@pytest.mark.skipif(
    "shutdown_timeout" not in inspect.signature(SimpleElasticAgent.__init__).parameters,
    reason="torch 2.11 cannot be told how long a rank may take to end: TorchX kills torchrun first",
)
def test_interrupt_ends_all_ranks(job, tmp_path: Path) -> None:
    """Also a rank that ignores SIGTERM: TorchX itself would leave it running."""
    process = job("stubborn")
    pids = wait_for_workers(tmp_path, process)
    time.sleep(0.5)  # until rank 1 ignores the signal
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    finish(process, code=None, timeout=60)
    assert time.monotonic() - begin < 20
    assert not any(alive(pid) for pid in pids)
