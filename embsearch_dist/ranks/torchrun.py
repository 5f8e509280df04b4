"""torchrun whose exit code says whether starting the job again would help.

    python -m embsearch_dist.ranks.torchrun [options of torchrun] -- SCRIPT ...

torchrun itself ends every failure with 1, so a scheduler that starts failed jobs again repeats one that ended in an
``error:`` as often as it may. Here the code is that of the ranks: 2 for an ``error:``, 75 where the same command
continues (a signal, a rank that was killed, a host that is gone), 1 for a bug. TorchX's script for Slurm looks at no
code: there a job that must not be repeated is told to Slurm before it ends (:func:`forbid_requeue`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ENDS = "EMBSEARCH_ENDS"
"""Set for the ranks: a folder of this launch on this host, in which they leave what their exit code does not tell."""
ERROR, AGAIN, BUG = 2, 75, 1


def note_error() -> None:
    """Leave word that this rank ends in an ``error:``; torchrun drops its code where it is ended by a signal itself."""
    if folder := os.environ.get(ENDS):
        with contextlib.suppress(OSError):
            Path(folder, "error").touch()


def code_of(ranks: Iterable[int], error: bool) -> int:
    """The exit code of a launch.

    Args:
        ranks: exit codes of the ranks that failed; that of a killed one is the negative number of the signal. None
            failed by itself where the launcher was told to end.
        error: some rank ended in an ``error:``.
    """
    codes = set(ranks)
    if error or ERROR in codes:
        return ERROR
    return next((code for code in sorted(codes) if code > 0 and code != AGAIN), AGAIN)


def forbid_requeue(environment: Mapping[str, str] = os.environ) -> None:
    """Within a Slurm job that TorchX would start again after any failure: forbid Slurm to."""
    job = environment.get("SLURM_JOB_ID")
    if not job or not int(environment.get("TORCHX_MAX_RETRIES") or 0):
        return
    command = ["scontrol", "update", f"JobId={job}", "Requeue=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as e:
        problem = str(e)
    if problem:
        print(f"this job may be started again though that cannot help: {problem}", file=sys.stderr, flush=True)


def launch(arguments: list[str]) -> int:
    """Run torchrun; its exit code. Errors that ranks have told themselves are not told again."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    folder = tempfile.mkdtemp(prefix="embsearch-ends-")
    os.environ[ENDS] = folder
    try:
        run.main(arguments)
    except ChildFailedError as e:
        code = code_of((failure.exitcode for failure in e.failures.values()), Path(folder, "error").exists())
        if code not in (ERROR, AGAIN):
            print(e, file=sys.stderr, flush=True)
        return code
    except SignalException:
        return code_of([], Path(folder, "error").exists())
    except RendezvousError as e:
        told = " ".join(str(e).split())
        print(f"hosts did not meet: {told}. Start the same command again to continue", file=sys.stderr, flush=True)
        return AGAIN
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def main() -> None:
    code = launch(sys.argv[1:])
    if code not in (0, AGAIN):
        forbid_requeue()
    sys.exit(code)


if __name__ == "__main__":
    main()
