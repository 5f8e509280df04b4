"""The model repository of NVIDIA's Triton Inference Server: ``NAME/config.pbtxt`` and ``NAME/1/model.onnx``.

The batch is Triton's to put together (``dynamic_batching``), so dimensions in ``config.pbtxt`` leave it out. Requests
are joined where their shapes agree: clients fill lists up to one length.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from embsearch_dist.serving.programs import OUTPUTS, Port

TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}
MAX_BATCH = 8192
DELAY_US = 500


def config(name: str, inputs: Sequence[Port], max_batch: int = MAX_BATCH, delay_us: int = DELAY_US) -> str:
    """The text of ``config.pbtxt``."""
    parts = [f'name: "{name}"', 'backend: "onnxruntime"', f"max_batch_size: {max_batch}"]
    for port in inputs:
        parts.append(_tensor("input", port.name, port.kind, f"[ {port.columns} ]"))
    # A scalar for each row: behind the batch there is no dimension, which Triton writes as a reshape of one.
    for output in OUTPUTS:
        parts.append(_tensor("output", output, "float32", "[ 1 ]", "reshape: { shape: [ ] }"))
    parts.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}")
    return "\n".join(parts) + "\n"


def _tensor(role: str, name: str, kind: str, dims: str, more: str = "") -> str:
    inner = [
        f"name: {json.dumps(name, ensure_ascii=False)}",
        f"data_type: {TYPES[kind]}",
        f"dims: {dims}",
        *([more] if more else []),
    ]
    return f"{role} [ {{ {', '.join(inner)} }} ]"


def write_repository(directory: Path, name: str, inputs: Sequence[Port], program: Path) -> None:
    """Make the repository in ``directory``; ``program`` is copied into it."""
    model = directory / repository_name(name)
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(config(model.name, inputs))
    shutil.copyfile(program, model / "1" / "model.onnx")


def repository_name(name: str) -> str:
    """A model's name as Triton takes it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
