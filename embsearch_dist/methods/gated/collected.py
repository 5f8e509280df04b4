"""A searched model with its selector, taken apart for serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embsearch_dist.methods.collected import Collected, existing, model_of, take_tables
from embsearch_dist.methods.gated.task import GatedTask


def is_gated(directory: Path) -> bool:
    """Whether the searched model itself was measured there: nothing was trained of what it found."""
    return (directory / "evaluation.json").exists() and not (directory / "allocation.json").exists()


def search_of(directory: Path) -> Path:
    """The run directory whose searched model was measured in ``directory``; its checkpoints and schema lie there."""
    return directory.resolve().parents[1]


def collect_gated(task: GatedTask, directory: Path) -> Collected:
    """The searched model itself, which was measured in ``directory``."""
    found = of_gated(task)
    found.files = existing(directory, ("evaluation.json",))
    return found


def of_gated(task: GatedTask) -> Collected:
    """A searched model with its selector, of one rank."""
    task.model.eval()
    found = Collected(gated_body(task) | {"kind": "gated", "model": model_of(task.run.config.model)}, task.predict)
    take_gated(found, task, "")
    return found


def gated_body(task: GatedTask) -> dict[str, Any]:
    """What a description says of the selector."""
    return {"width": task.model.width, "selection": task.selection()}


def take_gated(found: Collected, task: GatedTask, prefix: str) -> None:
    """Tables, head and selector."""
    model = task.model
    take_tables(found, model.sharded, dict.fromkeys(task.run.schema.names, model.width), prefix)
    for name, tensor in model.bare_head.state_dict().items():
        part = "selector." if name.startswith("norm.") else "head."  # AdaFS's norm stands in front of the selector
        found.dense[f"{prefix}{part}{name}"] = tensor.cpu()
    for name, tensor in model.bare_selector.state_dict().items():
        found.dense[f"{prefix}selector.{task.part}.{name}"] = tensor.cpu()
