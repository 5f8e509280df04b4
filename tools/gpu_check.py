"""Check this installation on a device, in one command: fifteen checks, each in a process of its own, and a table.

    python3 tools/gpu_check.py --device cuda --out check --budget 420      on a machine with a GPU
    python3 tools/gpu_check.py --device pretend --out check                everything but the speed, without a GPU
    python3 tools/gpu_check.py --device cpu --out check --only tbe resume  some of them
    python3 tools/gpu_check.py --list                                      what each check does

Start it from the repository root, with torch, TorchRec and FBGEMM importable. Nothing is downloaded, and polars is not
needed. --budget bounds the whole run in seconds: every check gets a share of what is left, by its weight, and one that
no longer fits is left out. A check that fails, crashes or takes too long does not stop the next one.

What it leaves in --out: results.jsonl (a line as each check ends, all its figures in it), table.md (the table of the
end), log.txt (what the checks printed). The exit code is 1 if any check failed, 2 for a wrong command line.
See docs/gpu.md on how to read the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs without installation too

from tools.gpucheck.command import main

if __name__ == "__main__":
    sys.exit(main(document=__doc__))
