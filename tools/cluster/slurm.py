"""A Slurm of two nodes on one machine, with accounting, to try what a cluster does with jobs.

    python tools/cluster/slurm.py up
    python tools/cluster/slurm.py run -- torchx run --scheduler slurm dist.ddp -j 2x1 search.py --config FILE
    python tools/cluster/slurm.py run -- squeue
    python tools/cluster/slurm.py down

Needs root, Linux and Debian's packages slurm-wlm, munge, slurmdbd and mariadb-server (their own services need not run).
The nodes n1 and n2 are two slurmd on this machine, each with a host's name of its own. All of it, keys and database
included, lies in one temporary folder and listens on this machine's ports; ``down`` ends the daemons and deletes the
folder. ``run`` gives a command the variable that says where this Slurm is (SLURM_CONF). Jobs that span nodes are
started by Slurm's backfill scheduler, which looks every 30 s by default: here every second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(tempfile.gettempdir()) / "embsearch-slurm"
NODES = ("n1", "n2")
CORES = 4  # that each node says it has; jobs may share those of the machine
PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "munged": "munge",
    "unshare": "util-linux",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
PORTS = {"database": 17306, "accounting": 17819, "controller": 17817, "n1": 17001, "n2": 17002}
READY_S = 60

SLURM_CONF = """
ClusterName=embsearch
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={folder}/munge/socket
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeAddr=127.0.0.1 Port={n1} CPUs={cores} RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.1 Port={n2} CPUs={cores} RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


def lacking() -> str:
    """Why a Slurm cannot be had here; empty where it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm is Linux's"
    if os.geteuid() != 0:
        return "nodes of Slurm need root"
    missing = [tool for tool in PACKAGES if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"missing {', '.join(missing)}: apt-get install {' '.join(dict.fromkeys(PACKAGES[t] for t in missing))}"
    return ""


def environment() -> dict[str, str]:
    """What a command needs to talk to this Slurm."""
    return {"SLURM_CONF": str(FOLDER / "slurm.conf"), "PATH": _path()}


def up() -> None:
    """Start everything and wait until both nodes take jobs; a Slurm of before is ended first.

    Raises:
        RuntimeError: a part does not start; names its log.
    """
    down()
    FOLDER.mkdir()
    FOLDER.chmod(0o755)
    for name in ("munge", "state", "database", *NODES):
        (FOLDER / name).mkdir()
    values = {"folder": FOLDER, "host": socket.gethostname().partition(".")[0], "cores": CORES, **PORTS}
    (FOLDER / "slurm.conf").write_text(SLURM_CONF.format_map(values))
    accounting = FOLDER / "slurmdbd.conf"
    accounting.write_text(SLURMDBD_CONF.format_map(values))
    accounting.chmod(0o600)
    _start_munge()
    _start_database()
    _start("slurmdbd", "slurmdbd", "-D")
    _until("slurmdbd", lambda: _quiet("sacctmgr", "-i", "list", "cluster"))
    _quiet("sacctmgr", "-i", "add", "cluster", "embsearch")
    _start("slurmctld", "slurmctld", "-D", "-c")
    (FOLDER / "hosts").write_text(f"127.0.0.1 localhost {' '.join(NODES)} {values['host']}\n")
    for node in NODES:
        # Ranks look up the name of their own host and that of the first one.
        named = f'mount --bind {FOLDER / "hosts"} /etc/hosts && hostname {node} && exec "$@"'
        _start(node, "unshare", "--mount", "--uts", "bash", "-c", named, "bash", "slurmd", "-D", "-N", node)
    _until("slurmctld", lambda: _told("sinfo", "-h", "-N", "-o", "%N %T").split() == ["n1", "idle", "n2", "idle"])


def down() -> None:
    """End the jobs and the daemons, and delete the folder."""
    if not FOLDER.exists():
        return
    ended = [int(pid) for path in FOLDER.glob("*.started") for pid in [path.read_text()] if _is_ours(int(pid))]
    steps = [pid for pid in _pids() if (c := _command(pid)).startswith(b"slurmstepd: [") and _uses_folder(pid, c)]
    for pid in [*steps, *ended]:
        _kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while any(map(_is_alive, [*steps, *ended])) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in [*steps, *ended]:
        _kill(pid, signal.SIGKILL)
    shutil.rmtree(FOLDER, ignore_errors=True)


def run(command: Sequence[str]) -> int:
    """A command with this Slurm as its own."""
    return subprocess.run(command, env={**os.environ, **environment()}, check=False).returncode


def _start_munge() -> None:
    folder = FOLDER / "munge"
    folder.chmod(0o711)
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid", "seed-file": folder / "seed"}
    options = [f"--{name}={path}" for name, path in files.items()]
    _start("munged", "munged", "--foreground", "--force", f"--log-file={folder / 'log'}", *options)
    _until("munged", (folder / "socket").exists)


def _start_database() -> None:
    folder = FOLDER / "database"
    # The database refuses to run as root unless it is told to.
    own = ["--no-defaults", f"--datadir={folder}", "--user=root"]
    _run("mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db")
    place = [f"--socket={folder / 'socket'}", "--bind-address=127.0.0.1", f"--port={PORTS['database']}"]
    # Small and forgetful: what it holds is deleted at the end.
    size = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"]
    _start("mariadbd", "mariadbd", *own, *place, f"--pid-file={folder / 'pid'}", *size)
    make = (
        "CREATE DATABASE IF NOT EXISTS slurm_acct_db; "
        "CREATE OR REPLACE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; "
        "CREATE OR REPLACE USER slurm@localhost IDENTIFIED BY 'slurm'; "
        "GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1'; GRANT ALL ON slurm_acct_db.* TO slurm@localhost"
    )
    _until("mariadbd", lambda: _quiet("mariadb", "--no-defaults", f"--socket={folder / 'socket'}", "-e", make))


def _start(name: str, *command: str) -> None:
    with open(FOLDER / f"{name}.out", "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=_environment(), start_new_session=True
        )
    (FOLDER / f"{name}.started").write_text(str(process.pid))


def _until(name: str, ready: Callable[[], bool]) -> None:
    """Wait for a daemon to answer.

    Raises:
        RuntimeError: it has ended, or does not answer within ``READY_S`` seconds.
    """
    deadline = time.monotonic() + READY_S
    while not ready():
        alive = _is_alive(int((FOLDER / f"{name}.started").read_text()))
        if not alive or time.monotonic() > deadline:
            logs = [p for p in (FOLDER / f"{name}.log", FOLDER / f"{name}.out", FOLDER / "munge" / "log") if p.exists()]
            told = "\n".join(f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in logs)
            raise RuntimeError(f"{name} {'does not answer' if alive else 'has ended'}\n{told}")
        time.sleep(0.1)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stdout}{done.stderr}")


def _quiet(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, env=_environment(), check=False).returncode == 0


def _told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False).stdout


def _environment() -> dict[str, str]:
    return {**os.environ, **environment()}


def _path() -> str:
    """Daemons lie where the path of a user may not lead."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _pids() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _uses_folder(pid: int, command: bytes) -> bool:
    """Whether a process is one of this Slurm's: it names the folder, or was started with it in its environment."""
    try:
        return str(FOLDER).encode() in command + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _is_ours(pid: int) -> bool:
    return _is_alive(pid) and _uses_folder(pid, _command(pid))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["up", "run", "down"])
    words = sys.argv[1:]
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = parser.parse_args(own)
    if problem := lacking():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if args.what == "run":
        if not command:
            parser.error("run needs a command behind --")
        if not (FOLDER / "slurm.conf").exists():
            print("error: no Slurm is up; start it: python tools/cluster/slurm.py up", file=sys.stderr)
            return 2
        return run(command)
    {"up": up, "down": down}[args.what]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
