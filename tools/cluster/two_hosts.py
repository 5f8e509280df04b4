"""Two hosts on one machine, to try what several machines do: network namespaces joined by a cable, names of their own.

    python tools/cluster/two_hosts.py up
    python tools/cluster/two_hosts.py run -- torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d \\
        --rdzv-endpoint host-a:29500 --rdzv-id try -- launch/search.py --config FILE
    python tools/cluster/two_hosts.py run --on b -- hostname
    python tools/cluster/two_hosts.py down

Needs root, Linux and iproute2. The hosts are host-a (10.77.0.1) and host-b (10.77.0.2); they share the file system, but
for --private DIR, which gives host-b an empty one of its own there. ``run`` gives a command to both (or to one, --on),
shows their lines with the host's name in front, and exits with the first code that is not 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}
INTERFACE = "cable"


def lacking() -> str:
    """Why two hosts cannot be had here; empty where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install iproute2 util-linux"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()}"


def up(debian: bool = False) -> None:
    """Make the hosts; those that are there are replaced. ``debian``: each knows its own name as 127.0.1.1."""
    down()
    for host in HOSTS:
        known = {h: "127.0.1.1" if debian and h == host else address for h, address in HOSTS.items()}
        names = "".join(f"{address} host-{h}\n" for h, address in known.items())
        _ip("netns", "add", _name(host))
        folder = Path("/etc/netns") / _name(host)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    _ip("link", "add", f"{INTERFACE}-a", "type", "veth", "peer", "name", f"{INTERFACE}-b")
    for host, address in HOSTS.items():
        _ip("link", "set", f"{INTERFACE}-{host}", "netns", _name(host))
        inside = ("-n", _name(host))
        _ip(*inside, "link", "set", f"{INTERFACE}-{host}", "name", INTERFACE)
        _ip(*inside, "addr", "add", f"{address}/24", "dev", INTERFACE)
        _ip(*inside, "link", "set", INTERFACE, "up")
        _ip(*inside, "link", "set", "lo", "up")


def down() -> None:
    """Take the hosts away, with what still runs on them."""
    for host in HOSTS:
        kill(host)
        subprocess.run(["ip", "netns", "delete", _name(host)], capture_output=True)
        shutil.rmtree(Path("/etc/netns") / _name(host), ignore_errors=True)


def kill(host: str) -> None:
    """Kill all that runs on a host."""
    pids = subprocess.run(["ip", "netns", "pids", _name(host)], capture_output=True, text=True).stdout.split()
    if pids:
        subprocess.run(["kill", "-9", *pids], check=False)


def cut() -> None:
    """Cut the cable."""
    _ip("-n", _name("b"), "link", "set", INTERFACE, "down")


def started(
    host: str, command: Sequence[str], private: str = "", env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """The command on a host, its two outputs as one; ``private``: a folder that is an empty one of its own there."""
    mount = f"mount -t tmpfs tmpfs {private} && " if private else ""
    script = f'{mount}hostname host-{host} && exec "$@"'
    # Gloo asks for the address of the host's name, which is that of the cable.
    whole = ["ip", "netns", "exec", _name(host), "unshare", "--uts", "--mount", "bash", "-c", script, "bash", *command]
    return subprocess.Popen(
        whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}
    )


def run(command: Sequence[str], hosts: Sequence[str], private: str) -> int:
    """Run a command on hosts at the same time and show its lines."""
    processes = {h: started(h, command, private if h == "b" else "") for h in hosts}
    threads = [threading.Thread(target=_show, args=(h, p)) for h, p in processes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((code for p in processes.values() if (code := p.wait())), 0)


def _show(host: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"host-{host}: {line}", end="", flush=True)


def _name(host: str) -> str:
    return f"embsearch-{host}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["up", "run", "cut", "down"])
    parser.add_argument("--on", choices=sorted(HOSTS), help="run: on this host alone")
    parser.add_argument("--debian", action="store_true", help="up: each host knows its own name as 127.0.1.1")
    parser.add_argument("--private", default="", help="run: a folder that host-b has for itself, empty")
    words = sys.argv[1:]
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = parser.parse_args(own)
    if problem := lacking():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if args.what == "run":
        if not command:
            parser.error("run needs a command behind --")
        return run(command, [args.on] if args.on else sorted(HOSTS), args.private)
    {"up": partial(up, args.debian), "cut": cut, "down": down}[args.what]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
