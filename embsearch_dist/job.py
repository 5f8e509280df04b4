"""What a launcher calls this job, and whether it may have been started before under that name."""

from __future__ import annotations

import os
from collections.abc import Mapping


def job(environment: Mapping[str, str] = os.environ) -> str:
    """What a launcher or scheduler calls this job, the same after a restart; empty where nothing does."""
    for name in ("TORCHX_JOB_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if value := environment.get(name):
            return f"{name} {value}"
    return ""


def may_be_restart(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether these ranks may have been started before under the name of :func:`job`: by torchrun, by Slurm's requeue,
    or by TorchX, whose schedulers tell no count but give each launch a name of its own."""
    restarted = int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
    requeued = int(environment.get("SLURM_RESTART_COUNT") or 0) > 0
    return restarted or requeued or bool(environment.get("TORCHX_JOB_ID"))
