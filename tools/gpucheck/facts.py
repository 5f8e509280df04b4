"""What every line of the results says about where it comes from: device, versions, commit. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("embsearch_dist", "launch", "tools")


def facts(device: str) -> dict[str, str]:
    """``device`` (its name), ``driver`` where there is one, the versions, and ``commit``."""
    name, driver = _device(device)
    found = {"device": name} | ({"driver": driver} if driver else {})
    found |= {"torch": version("torch"), "torchrec": version("torchrec")}
    return found | {"fbgemm": version("fbgemm-gpu", "fbgemm-gpu-cpu"), "commit": commit(ROOT)}


def version(*names: str) -> str:
    """Of the first installed package of these names, from its metadata."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def commit(root: Path) -> str:
    """The commit of a checkout, ``-dirty`` behind it when files were changed. Without git, or without a repository,
    ``sources-`` and a hash of the sources, which another checkout can be compared by."""
    here = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    try:
        head = _said([*here, "rev-parse", "--short=12", "HEAD"])
        changed = _said([*here, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return f"sources-{sources_hash(root)}"
    return head + ("-dirty" if changed else "")


def sources_hash(root: Path) -> str:
    """The first 12 digits of SHA-256 over all Python files of the project, names included."""
    total = hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (root / folder).rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def hardware(used: str = "") -> str:
    """This machine in one line of a table: processor, what of it was ``used`` (e.g. ``1 thread``; by default all
    cores), the GPU where there is one, and the version of torch."""
    import torch

    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {used or f'{os.cpu_count()} cores'}{gpu}; torch {torch.__version__}"


def _device(kind: str) -> tuple[str, str]:
    """Name and driver."""
    if kind != "cuda":
        return ("pretend device on " if kind == "pretend" else "") + _processor(), ""
    try:
        line = _said(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "GPU that nvidia-smi does not name", ""
    name, _, driver = line.partition(", ")
    return name, driver


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    return done.stdout.strip()
