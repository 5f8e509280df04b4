"""What a run directory holds in the end, without what differs from run to run, and how a broken case has ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.breaking.lab import HUNG, Done

# Measured, so never equal; a seal of what holds such a figure differs with it.
MEASURED = {
    *("time", "seconds", "inference_rows_per_s", "share_of_time", "samples_per_s", "memory_mb", "sha256", "routing_s"),
    *("lines", "files"),  # of files that hold measured figures
}
PASSED = {"run.lock", "written.json", ".metadata"}
CLASSES = ("refused", "healed", "harmless", "told", "SILENT", "TRACEBACK", "UNNAMED", "HUNG")
BAD = CLASSES[4:]


def outcome(run: Path) -> dict[str, Any]:
    """Path in the run directory -> what it says, of every file that is a result or is read again."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        inside = path.relative_to(run)
        if path.is_dir() or path.name in PASSED or path.suffix in (".tmp", ".png") or "tb" in inside.parts:
            continue
        if any(part.endswith(".damaged") for part in inside.parts):
            continue
        found[str(inside)] = _content(path)
    return found


def _content(path: Path) -> Any:
    data = path.read_bytes() if path.exists() else b"(nothing)"
    try:
        if path.suffix == ".json":
            body = json.loads(data)
            if path.name == "manifest.json" and "world_size" in body:  # of a checkpoint: state.json holds seconds
                return {k: v for k, v in body["files"].items() if k.endswith(".distcp")}
            return plain(body)
        if path.suffix == ".jsonl":
            return [plain(json.loads(line)) for line in data.splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return hashlib.sha256(data).hexdigest()


def plain(body: Any) -> Any:
    """A JSON body without measured figures."""
    if isinstance(body, dict):
        return {k: plain(v) for k, v in body.items() if k not in MEASURED}
    return [plain(v) for v in body] if isinstance(body, list) else body


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Paths whose content differs or that only one of the two has."""
    return sorted(k for k in {*one, *other} if one.get(k) != other.get(k))


def names(text: str, file: Path, kind: str) -> bool:
    """Whether a message names the damaged file (relative to the folder of the run): its path, its checkpoint, or, where
    there is none to name, its folder."""
    places = [file, *(p for p in file.parents if p.name.startswith("step-"))]
    if kind in ("remove", "empty", "directory", "loop") or file.suffix == ".parquet":
        places += [p for p in file.parents if len(p.parts) > 1]
    beside = file.name in text and str(file.parent) in text
    return beside or any(str(p) in text for p in places)


def judge(done: Done, file: Path, kind: str, different: list[str], restored: bool) -> str:
    """One of :data:`CLASSES`.

    Args:
        different: what differs from the outcome of the undamaged run; not the damaged file itself where it lies there
            untouched.
        restored: the file is now as the undamaged run leaves it.
    """
    if done.code == HUNG:
        return "HUNG"
    if "Traceback (most recent call last)" in done.text or done.code not in (0, 2):
        return "TRACEBACK"
    named = names(done.text, file, kind)
    if done.code == 2:
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        return "refused" if named and len(lines) == 1 else "UNNAMED"
    if not different:
        return "healed" if restored else "harmless"
    return "told" if named else "SILENT"
