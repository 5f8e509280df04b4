"""TorchX components for the entry scripts: ``torchx run embsearch.search --config FILE -j 1x2``.

Also usable without installation: ``torchx run launch/components.py:search --config FILE``. Anything
after ``--`` goes to the script, so a config key is overridden with ``-- --train.batch_size 4096``.
Named resources (``-h``) and the scheduler's own options say where it runs.
"""

# See launch/ddp.py about the spelling of annotations.
from typing import Dict, Optional

import torchx.specs as specs

from launch.ddp import ddp


def prepare(
    *overrides: str,
    format: str,
    out: str,
    input: str = "",
    j: str = "1x1",
    cpu: int = 0,
    memMB: int = 0,
    h: Optional[str] = None,
    name: str = "/",
) -> specs.AppDef:
    """Turn raw click logs into a schema and Parquet shards; several processes share the work.

    Args:
        overrides: after `--`: further raw files, then further arguments of launch/prepare.py
        format: criteo, avazu, movielens_1m, movielens_100k, kdd2012, table, synthetic or populations
        out: folder to write
        input: raw file or folder; for table the YAML source file; none for synthetic and populations
        j: [NODESx]PROCESSES_PER_NODE
        cpu: cores per node; 0 asks for none and uses what the node gives
        memMB: memory per node in MB; 0 asks for none
        h: a named resource, instead of cpu and memMB
        name: EXPERIMENT/RUN, either part may be left out
    """
    words = ["--format", format, "--out", out, *(["--input", input] if input else []), *overrides]
    return ddp(*words, script="prepare.py", j=j, cpu=cpu, memMB=memMB, h=h, name=name)


def search(
    *overrides: str,
    config: str,
    j: str = "1x1",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_restarts: int = 0,
    name: str = "/",
) -> specs.AppDef:
    """Search the width of every field's embedding.

    Args:
        overrides: config overrides, after `--`, e.g. --run.dir runs/first
        config: YAML file of the search
        j: [NODESx]RANKS_PER_NODE
        cpu: cores per node; 0 asks for none and uses what the node gives
        gpu: GPUs per node; 0 asks for none
        memMB: memory per node in MB; 0 asks for none
        h: a named resource, instead of cpu, gpu and memMB
        env: environment variables of the ranks, e.g. A=1,B=2
        max_restarts: how often all ranks are started again after one fails
        name: EXPERIMENT/RUN, either part may be left out
    """
    words = ["--config", config, *overrides]
    return ddp(
        *words,
        script="search.py",
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        env=env,
        max_restarts=max_restarts,
        name=name,
    )


def retrain(
    *overrides: str,
    run: str,
    allocation: str = "",
    j: str = "1x1",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_restarts: int = 0,
    name: str = "/",
) -> specs.AppDef:
    """Train the model of an allocation from scratch.

    Args:
        overrides: further arguments of launch/retrain.py, after `--`
        run: run directory of the search
        allocation: an allocation other than the one found, e.g. ues-32 or a JSON file
        j: [NODESx]RANKS_PER_NODE
        cpu: cores per node; 0 asks for none and uses what the node gives
        gpu: GPUs per node; 0 asks for none
        memMB: memory per node in MB; 0 asks for none
        h: a named resource, instead of cpu, gpu and memMB
        env: environment variables of the ranks, e.g. A=1,B=2
        max_restarts: how often all ranks are started again after one fails
        name: EXPERIMENT/RUN, either part may be left out
    """
    words = ["--run", run, *(["--allocation", allocation] if allocation else []), *overrides]
    return ddp(
        *words,
        script="retrain.py",
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        env=env,
        max_restarts=max_restarts,
        name=name,
    )


def evaluate(
    *overrides: str,
    run: str,
    j: str = "1x1",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    h: Optional[str] = None,
    name: str = "/",
) -> specs.AppDef:
    """Measure a retrained model: quality, speed and size.

    Args:
        overrides: further arguments of launch/evaluate.py, after `--`
        run: directory of the retrained model, e.g. runs/first/retrain/adass
        j: [NODESx]RANKS_PER_NODE
        cpu: cores per node; 0 asks for none and uses what the node gives
        gpu: GPUs per node; 0 asks for none
        memMB: memory per node in MB; 0 asks for none
        h: a named resource, instead of cpu, gpu and memMB
        name: EXPERIMENT/RUN, either part may be left out
    """
    words = ["--run", run, *overrides]
    return ddp(*words, script="evaluate.py", j=j, cpu=cpu, gpu=gpu, memMB=memMB, h=h, name=name)
