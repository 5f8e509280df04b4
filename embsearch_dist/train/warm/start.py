"""An earlier training as a start: opened, compared with what is to be trained, and recorded.

``start.json`` in the directory of a training that began so says with what, how every field was moved, and the figures
on the validation split before the first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.grouped import GROUPS
from embsearch_dist.ranks.context import Context
from embsearch_dist.rundir import check_text
from embsearch_dist.schema import Schema
from embsearch_dist.train import manifest
from embsearch_dist.train.warm.dense import DenseMove, Layout
from embsearch_dist.train.warm.fill import HEAD, Saved, fill_head, fill_tables, rotations
from embsearch_dist.train.warm.ids import Data, IdMap, check_values, id_map, shares
from embsearch_dist.train.warm.means import cut_means, fold, foldable
from embsearch_dist.train.warm.widths import FieldMove, turning

RECORD = "start.json"
DONE = ("fields", "dense", "means", "validation")  # in the record, beside the facts of the start
DEFAULT_STAGE = "retrain"
SAME = ("model.backbone", "model.transform", "model.first_order", "model.architecture")
OPTIMIZERS = ("optim.embedding", "optim.dense")


@dataclass(frozen=True)
class Start:
    """A finished training that another one begins with.

    Attributes:
        directory: ``RUN/retrain/NAME``.
        data: what it was trained on.
        allocation: its widths.
        step: of its best checkpoint.
        manifest: of that checkpoint.
        optimizer: the optimizers' state is taken along.
    """

    directory: Path
    data: Data
    allocation: Allocation
    step: int
    manifest: Mapping[str, Any]
    optimizer: bool

    @classmethod
    def open(cls, directory: Path | str, optimizer: bool = False) -> Start:
        """Read what a training has left; no tensor yet.

        Raises:
            UserError: nothing was trained there, or not to its end; groups of models; a file is damaged.
        """
        directory = Path(directory)
        if (directory / GROUPS).exists():
            raise UserError(f"--from {directory} holds groups of models: a training begins with one. Give its group-K")
        root = directory / "checkpoints" / DEFAULT_STAGE
        missing = [n for n in ("allocation.json", "schema.json", "config.yaml") if not (directory / n).exists()]
        if missing or not (root / "best.json").exists():
            what = missing[0] if missing else "a checkpoint"
            raise UserError(f"--from {directory} holds no trained model ({what} is missing). Give RUN/retrain/NAME")
        if not (directory / "training.json").exists():
            raise UserError(f"--from {directory}: its training has not ended. Give its command again, then this one")
        check_text(directory / "config.yaml")
        schema = Schema.load(directory)
        step = int(read_sealed(root / "best.json", "Train it again")["step"])
        told = manifest.read_manifest(root / f"step-{step}")
        path = Path(str(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))["data"]["path"]))
        allocation = Allocation.load(directory / "allocation.json", schema)
        return cls(directory, Data(path, schema), allocation, step, told, optimizer)

    @property
    def checkpoint(self) -> Path:
        """Of the best weights."""
        return self.directory / "checkpoints" / DEFAULT_STAGE / f"step-{self.step}"

    def facts(self) -> dict[str, Any]:
        """For the record; another ``weights`` or ``optimizer`` is another training."""
        text = repr(sorted((n, e["sha256"]) for n, e in self.manifest["files"].items()))
        return {
            "from": str(self.directory),
            "step": self.step,
            "weights": hashlib.sha256(text.encode()).hexdigest()[:16],
            "optimizer": self.optimizer,
            **({"data": self.data.schema.data} if self.data.schema.data else {}),
        }

    def check(self, settings: Mapping[str, Any], new: Data, allocation: Allocation) -> None:
        """Compare with a model that is to begin so.

        Args:
            settings: flat, of that model and its training.

        Raises:
            UserError: another backbone, transform or kind of field; ids that cannot be compared; a state of the
                optimizers that is asked for and is of others.
        """
        if self.allocation.values or allocation.values:
            raise UserError(
                f"--from {self.directory}: one of the two models has rows for some values alone, which are not "
                "carried over. Leave --from out"
            )
        old = self.manifest.get("settings", {})
        for key in (*SAME, *(OPTIMIZERS if self.optimizer else ())):
            if old.get(key, settings.get(key)) != settings.get(key):
                told = f"{key} {old[key]!r} there, {settings.get(key)!r} here"
                cure = "give --from-optimizer false, or " if key in OPTIMIZERS else ""
                raise UserError(f"--from {self.directory} is of another model: {told}. Put that back, {cure}train anew")
        there = {f.name: f for f in self.data.schema.fields}
        for field in new.schema.fields:
            before = there.get(field.name)
            if before is not None and (before.pooling, before.weighted) != (field.pooling, field.weighted):
                raise UserError(
                    f"--from {self.directory}: field {field.name!r} was {_kind(before)} there and is {_kind(field)} "
                    "here. Prepare both alike, or train anew"
                )
        if not set(self.allocation.kept) & set(allocation.kept):
            raise UserError(f"--from {self.directory}: it keeps no field that is kept here. Train anew")
        check_values(self.data, new)


def _kind(field: Any) -> str:
    return f"a list ({field.pooling}{', weighted' if field.weighted else ''})" if field.is_list else "a single value"


def begin(
    start: Start,
    task: Any,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    new: Data,
    allocation: Allocation,
    context: Context,
    turn: bool = True,
    keep_means: bool = True,
) -> dict[str, Any]:
    """Set the weights of a task, and with ``start.optimizer`` the state of its optimizers; returns what was done.

    Args:
        task: a :class:`embsearch_dist.train.retrain.SubnetTask`.
        optimizer: of the dense part.
        settings: flat, of the model and its training.
        new: what is trained on.
        turn: False cuts columns as they are, to compare.
        keep_means: False leaves out what is cut, to compare; else its mean stays, where the head can hold it.

    Raises:
        UserError: what :meth:`Start.check` finds; a damaged checkpoint.
    """
    settings = json.loads(json.dumps(settings))  # as a manifest has them
    with context.together("comparing with the earlier model"):
        start.check(settings, new, allocation)
    context.first("checking the earlier checkpoint", lambda: manifest.verify(start.checkpoint))
    with context.together("reading the earlier checkpoint"):
        saved = Saved(start.checkpoint)
    head, model = task.model.bare_head, {k.removeprefix("model."): v for k, v in settings.items()}
    before = {"unify": "always", **{k.removeprefix("model."): v for k, v in start.manifest["settings"].items()}}
    layouts = [
        Layout.of(m, a.kept, [a.widths[f] for f in a.kept], s.dense, _scales(s))
        for m, a, s in ((before, start.allocation, start.data.schema), (model, allocation, new.schema))
    ]
    maps = layouts[0].maps, layouts[1].maps
    folds = keep_means and foldable(head, model["norm"], maps)
    both = [f for f in new.schema.names if start.allocation.widths.get(f) and (allocation.widths[f] or folds)]
    moves = {f: FieldMove(start.allocation.widths[f], allocation.widths[f]) for f in both}
    with context.together("reading the earlier checkpoint"):
        ids = {f: id_map(start.data, new, f) for f in both}
    how = turning(head, model["norm"], model["transform"] == "field", maps, moves) if turn else ""
    losing = how or any(m.new < m.old for m in moves.values())
    weights = {f: _earlier_shares(start, new, f, ids[f]) for f in both} if losing and context.rank == 0 else {}
    # Of values with weights of their own in each row no mean is known.
    meant = [f.name for f in new.schema.fields if folds and f.name in both and not f.weighted]
    moves = rotations(saved, how, moves, weights, meant, context)
    extra = min(start.allocation.extra, allocation.extra)
    means = cut_means(saved, {f: moves[f] for f in meant}, weights, extra, context)
    kept = {f: m for f, m in moves.items() if m.new}
    products = folds and head.backbone.fm and head.backbone.values and bool(means.columns)
    with context.together("reading the earlier checkpoint"):
        beside = {f: means.beside(f, m.kept) for f, m in kept.items()} if products else None
        fill_tables(saved, task.model, kept, ids, extra, start.optimizer, beside)
        dense = DenseMove(head, layouts[0], layouts[1], kept, str(model["transform"]))
        found = fill_head(saved, task.model, dense, optimizer if start.optimizer else None)
        if means.columns:
            fold(means, head, saved.all(HEAD), layouts[0], layouts[1], moves)
    fields = {f: {"width": [m.old, m.new], "how": m.how, "new_values": ids[f].new} for f, m in kept.items()}
    return {"fields": fields, "dense": found} | ({"means": sorted(means.columns)} if means.columns else {})


def _scales(schema: Schema) -> Mapping[str, Mapping[str, float]]:
    """How the dense columns of prepared data were standardised, as far as it was noted."""
    found = schema.provenance.get("dense")
    return found if isinstance(found, Mapping) else {}


def _earlier_shares(start: Start, new: Data, field: str, ids: IdMap) -> torch.Tensor:
    """How often each earlier row is looked up in a training row of today on average, ``[earlier rows]`` float64. A
    value without an earlier row begins with that of id 0."""
    found = torch.zeros(start.data.cardinality(field), dtype=torch.float64)
    return found.index_add(0, ids.rows.clamp(min=0), shares(new, field))


def check_same_start(directory: Path, start: Start | None) -> None:
    """Refuse to go on with a training that began otherwise.

    Raises:
        UserError: says how it began.
    """
    record = directory / RECORD
    before = read_sealed(record) if record.exists() else {}
    facts = start.facts() if start is not None else {}
    if all(before.get(key) == facts.get(key) for key in ("weights", "optimizer")):
        return
    how = "it began without --from"
    if before:
        state = "with" if before["optimizer"] else "without"
        how = f"it began with {before['from']}, step {before['step']}, {state} the state of the optimizers"
        if before["weights"] != facts.get("weights", before["weights"]) and before["from"] == facts["from"]:
            how += ", and there are other weights by now"
    raise UserError(f"{directory} holds another training: {how}. Give --name, or --run.overwrite true to replace it")


def write_record(directory: Path, body: Mapping[str, Any]) -> None:
    """Leave ``start.json``."""
    write_sealed(directory / RECORD, dict(body))


def read_record(directory: Path) -> dict[str, Any]:
    """What ``start.json`` says; nothing where the training began with fresh weights."""
    path = directory / RECORD
    return read_sealed(path) if path.exists() else {}
