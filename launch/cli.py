"""The command ``embsearch``: the entry scripts by name, wherever the package is installed.

    embsearch search --config my.yaml          as python launch/search.py --config my.yaml
    embsearch search --help
    torchrun --nproc-per-node 2 --no-python -- embsearch search --config my.yaml

Commands: prepare, search, retrain, evaluate, export, predict, report, plan (each as its script in launch/), serve (HTTP
for an exported model) and doctor (is this installation sound?).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from embsearch_dist import __version__
from embsearch_dist.errors import nearest

SCRIPTS = ("prepare", "search", "retrain", "evaluate", "export", "predict", "report", "plan")
MODULES = {"serve": "embsearch_dist.serve", "doctor": "embsearch_dist.doctor"}
COMMANDS = (*SCRIPTS, *MODULES)


def words_of(command: str, arguments: Sequence[str]) -> list[str]:
    """The command line of this interpreter that a command stands for."""
    if command in MODULES:
        return [sys.executable, "-m", MODULES[command], *arguments]
    return [sys.executable, str(Path(__file__).with_name(f"{command}.py")), *arguments]


def main() -> NoReturn:
    """Become the script: its output, its exit code, and the signals that it gets."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print((__doc__ or "").strip())
        sys.exit(0)
    if command == "--version":
        print(__version__)
        sys.exit(0)
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS)
        print(f"error: unknown command {command!r}{hint}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    words = words_of(command, arguments)
    os.execv(words[0], words)


if __name__ == "__main__":
    main()
