"""The ``dist.ddp`` component: ``torchx run dist.ddp -j 1x8 search.py``.

Registered under the entry point group ``torchx.components`` (``setup.py``) in place of TorchX's own,
which wants ``--script`` for what comes first here and cannot restart a failed job.
"""

# TorchX reads annotations from the source and knows only names, Optional, List and Dict of typing;
# postponed or newer spellings make the component invalid.
import os
import shlex
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torchx
import torchx.specs as specs
from torchx.components.dist import parse_nnodes
from torchx.components.structured_arg import StructuredNameArgument
from torchx.specs.finder import ComponentValidationException

from embsearch_dist.ranks.environment import GPUS, LAUNCHER_ENVIRONMENT

SCRIPTS = Path(__file__).resolve().parent
SUBMITTING = {
    # What sbatch and srun read from the environment, since TorchX has no options for it. A time limit is told to the
    # ranks two minutes before: they save and end with 75. A job that starts again keeps what it has logged.
    "SBATCH_SIGNAL": "TERM@120",
    "SBATCH_OPEN_MODE": "append",
    "SLURM_OPEN_MODE": "append",
}


def ddp(
    *script_args: str,
    script: str = "",
    m: str = "",
    j: str = "1x2",
    name: str = "/",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    image: str = torchx.IMAGE,
    mounts: Optional[List[str]] = None,
    tee: int = 3,
    debug: bool = False,
) -> specs.AppDef:
    """Run a script on several ranks with torchrun: `dist.ddp -j 1x8 search.py --config FILE`.

    A script of launch/ needs no folder name. `--` keeps its options from those: `dist.ddp -j 1x8 -- search.py --max 3`.

    Args:
        script_args: the script, then its arguments; a `--` before either is dropped
        script: the script, as an option instead of the first word
        m: a module to run instead of a script
        j: [[MIN_NODES:]NODESx]RANKS_PER_NODE, e.g. 1x8
        name: EXPERIMENT/RUN, either part may be left out
        cpu: cores per node; 0 asks for none and uses what the node gives
        gpu: GPUs per node; 0 asks for none
        memMB: memory per node in MB; 0 asks for none
        h: a named resource, instead of cpu, gpu and memMB
        env: environment variables of the ranks, e.g. A=1,B=2
        max_restarts: how often all ranks are started again after one fails; they resume from checkpoints
        max_retries: how often the scheduler starts the job again (local_cwd never does); Slurm: not after an error
        rdzv_port: port on the first node; a single node picks a free one
        image: container image, for schedulers that use one
        mounts: container mounts, e.g. type=bind,src=/host,dst=/job
        tee: output shown and kept: 0 none, 1 stdout, 2 stderr, 3 both
        debug: turn on the debug checks of torch.distributed (slow)
    """
    script, words = _asked(script, m, list(script_args))
    min_nodes, nodes, ranks, nodes_text = _nodes(j)
    title = StructuredNameArgument.parse_from(name=name, m=m or None, script=script or None)
    torchrun = _torchrun(_meeting(nodes, rdzv_port), nodes_text, ranks, max_restarts, tee)
    role = specs.Role(
        name=Path(script).stem if script else m.rpartition(".")[2],
        image=image,
        min_replicas=min_nodes,
        num_replicas=nodes,
        entrypoint="bash",
        args=["-c", f"{_tuned(ranks, nodes, cpu)}; exec {torchrun} {_target(script, m, words)}"],
        env=_environment(env or {}, title.experiment_name, gpu, debug),
        resource=specs.resource(h=h) if h else _resource(cpu, gpu, memMB),
        port_map={"c10d": rdzv_port},
        max_retries=max_retries,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=title.run_name, roles=[role])


def _nodes(j: str) -> Tuple[int, int, int, str]:
    """The option -j: fewest nodes, nodes, ranks on each, and torchrun's words for the nodes."""
    try:
        return parse_nnodes(j)
    except ValueError:
        raise ComponentValidationException(f"-j {j}: expected RANKS or [MIN_NODES:]NODESxRANKS, e.g. 1x8") from None


def _asked(script: str, m: str, words: List[str]) -> Tuple[str, List[str]]:
    """The script, empty for a module, and the arguments behind it."""
    if not script and not m:
        if not words:
            # The one exception that TorchX reports without a traceback.
            raise ComponentValidationException("no script, e.g.: torchx run dist.ddp -j 1x2 search.py --config FILE")
        script = words.pop(0)
        if words[:1] == ["--"]:
            words.pop(0)
    if script and m:
        raise ComponentValidationException("give either a script or -m MODULE, not both")
    return _find_script(script) if script else "", words


def _target(script: str, m: str, words: List[str]) -> str:
    """What torchrun starts. Behind `--` it leaves the script's options alone; else it takes --run or --log for its
    own."""
    return shlex.join(["-m", "--", m, *words] if m else ["--", script, *words])


def _tuned(ranks: int, nodes: int, cpu: int) -> str:
    """Shell words that set the threads: they follow from the cores of the node, which the machine that submits the
    job does not know."""
    cores = f" --cores {cpu}" if cpu else ""
    return f'eval "$$({_python()} -m embsearch_dist.ranks.environment --ranks {ranks} --nodes {nodes}{cores})"'


def _torchrun(meeting: str, nodes: str, ranks: int, max_restarts: int, tee: int) -> str:
    """The launcher on a node, told how many ranks there are and how often they are started again."""
    counts = f"--nnodes {nodes} --nproc-per-node {ranks} --max-restarts {max_restarts} --tee {tee} --role ''"
    return f"{_python()} -m embsearch_dist.ranks.torchrun {meeting} {counts}"


def _meeting(nodes: int, port: int) -> str:
    """Options of torchrun that say where nodes meet."""
    if nodes == 1:
        # The local address spares a look-up of this host's name, which fails or stalls without DNS.
        return "--standalone --local-addr localhost"
    # Some schedulers tell the first node's address to all nodes but the first.
    host = f"$${{{specs.macros.rank0_env}:=localhost}}"
    return f"--rdzv-backend c10d --rdzv-endpoint {host}:{port} --rdzv-id {specs.macros.app_id}"


def _resource(cpu: int, gpu: int, memory_mb: int) -> specs.Resource:
    """What is not asked for stays out of the request: TorchX's own defaults are 2 cores and 1 GB a node."""
    return specs.Resource(cpu=cpu or -1, gpu=gpu or -1, memMB=memory_mb or -1)


def _environment(asked: Dict[str, str], experiment: str, gpu: int, debug: bool) -> Dict[str, str]:
    """Variables of the ranks: what was asked for, and what they need beside it. What submits the job reads its own
    from the environment of this process."""
    os.environ.update({**SUBMITTING, **os.environ})
    found = dict(asked)
    found.setdefault("LOGLEVEL", os.environ.get("LOGLEVEL", "WARNING"))
    found["TORCHX_TRACKING_EXPERIMENT_NAME"] = experiment
    if debug:
        found.setdefault("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
        found.setdefault("TORCH_SHOW_CPP_STACKTRACES", "1")
        found.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    if gpu:
        found.setdefault(GPUS, str(gpu))
    for variable, value in LAUNCHER_ENVIRONMENT.items():
        if variable not in os.environ:
            found.setdefault(variable, value)
    return found


def _find_script(script: str) -> str:
    """The script as given if it exists, else the one of that name in the launch folder: of the tree one stands in,
    which need not be the installed one, or else of this tree, seen from here."""
    own, near = SCRIPTS / script, Path("launch", script)
    if Path(script).exists() or not own.is_file():
        return script
    if near.is_file() and Path("embsearch_dist").is_dir():
        return str(near)
    # A relative path also holds on the nodes of a cluster, where the folder is mounted or copied elsewhere.
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)


def _python() -> str:
    """Shell words for the interpreter that runs TorchX where it exists, else the `python` of a container.

    A bare `python` would be the wrong one when the virtual environment is not activated.
    """
    return f'"$$(command -v {shlex.quote(sys.executable)} python python3 | head -n 1)"'
