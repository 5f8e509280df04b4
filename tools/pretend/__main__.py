"""Run a script on the pretend device: ``python -m tools.pretend launch/search.py --run.device cuda ...``."""

from __future__ import annotations

import os
import runpy
import sys

from embsearch_dist.ranks.environment import TUNED, reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # the whole command again, so that the script needs not do it without the device

from tools.pretend import install


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    script = sys.argv[1]
    os.environ.setdefault(TUNED, "1")
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    install()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
