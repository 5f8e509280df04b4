"""A router without base tables: which group a row belongs to, guessed from a few of its raw fields.

Not of the paper, whose router (:mod:`embsearch_dist.methods.ihas.router_by_centres`) needs the search's tables at
inference. This one is naive Bayes on what that router said of the training rows. A chosen field has a table
``[cardinality, K]`` of ``log P(group | id) - log P(group)``; a row goes to the group for which ``log P(group)`` and
its fields' entries add up to most. Shares of ids that are rare or unseen are drawn to P(group) by ``PSEUDO_ROWS``
made-up rows.

Fields are chosen one at a time, each time the one with which most validation rows go where the paper's router sends
them. List fields are no candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embsearch_dist import written
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.store.shards import SplitRows
from embsearch_dist.errors import UserError
from embsearch_dist.files import digest, is_whole, read_sealed, temporary, write_sealed
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema

FIELD_ROUTER = "groups/field_router.json"
FORMAT = 1
FIELDS = 3
PSEUDO_ROWS = 1.0
COMPARED_ROWS = 1 << 20  # validation rows on which fields are compared, about


class FieldRouter:
    """Table look-ups and a sum. It needs no other rank: :meth:`assign` calls no collectives.

    Attributes:
        prior: ``[K]`` float32, log P(group).
        tables: field name -> ``[cardinality, K]`` float32.
    """

    def __init__(self, schema: Schema, prior: torch.Tensor, tables: dict[str, torch.Tensor]) -> None:
        self.prior, self.tables = prior, tables
        self._places = [schema.names.index(name) for name in tables]

    @property
    def groups(self) -> int:
        return len(self.prior)

    @torch.no_grad()
    def assign(self, batch: Batch) -> torch.Tensor:
        """Group of each row, ``[B]`` int64."""
        starts, ids = batch.sparse.offset_per_key(), batch.sparse.values()
        score = self.prior.expand(batch.size, -1)
        for place, table in zip(self._places, self.tables.values(), strict=True):
            score = score + table.index_select(0, ids[starts[place] : starts[place + 1]])
        return score.argmax(1)

    def parameters(self) -> int:
        """Numbers that must be loaded to route."""
        return len(self.prior) + sum(t.numel() for t in self.tables.values())

    def flops_per_sample(self) -> float:
        """Additions; there are no products."""
        return float(len(self.tables) * self.groups)


def can_route(schema: Schema) -> bool:
    """Whether there is a field to choose."""
    return any(not f.is_list for f in schema.fields)


def load_field_router(run: Run) -> FieldRouter:
    """The router that :func:`fit_field_router` has left in a search's run directory.

    Raises:
        UserError: it is missing, damaged, or was made for another schema.
    """
    path = run.dir / FIELD_ROUTER
    with run.context.together("reading the router of fields"):
        if not path.exists():
            raise UserError(f"{path} is missing. Give the command of retrain.py again: it makes one at the end")
        return _read(path, run)
    raise AssertionError("unreachable")


def fit_field_router(run: Run, groups: int, fields: int = FIELDS) -> FieldRouter:
    """Fit the router to the groups of the search in ``run.dir``, and leave it there; what is there already is read.

    One pass over the training rows and about ``COMPARED_ROWS`` of validation, divided among the ranks; any number
    of ranks finds the same router. Fields beyond the first that lets no more rows agree are not taken: where one
    group has nearly all rows, there may be none, and every row goes to it.

    Args:
        run: the search; its data must be those it was made from.
        groups: K.
        fields: how many to choose at most.

    Raises:
        UserError: there are only list fields, or the assignment does not fit the data.
    """
    context, path = run.context, run.dir / FIELD_ROUTER
    if not can_route(run.schema):
        raise UserError(f"data set {run.schema.dataset!r} has only list fields; the router of fields looks at others")

    def made_from() -> dict[str, Any]:
        said = {split: read_assignment(run.dir, split) for split in ("train", "validation")}
        marks = {split: hashlib.sha256(found.tobytes()).hexdigest() for split, found in said.items()}
        return {"assignment": marks, "fields": fields, "pseudo_rows": PSEUDO_ROWS, "rows": COMPARED_ROWS}

    source = context.share(context.first("looking at the groups", made_from))
    assert source is not None
    if context.share(context.first("looking for the router of fields", lambda: _is_whole(path, source))):
        return load_field_router(run)
    prior, tables = _tables(run, groups)
    chosen, hits, rows = _choose(run, prior, tables, fields)
    kept = {name: tables[name] for name in chosen}
    context.first("writing the router of fields", lambda: _write(path, run, prior, kept, source, hits / max(1, rows)))
    return load_field_router(run)


def assignment_file(run_dir: Path, split: str) -> Path:
    """``[rows]`` uint8, the group of every row of a split in stored order, as the search said."""
    return run_dir / "groups" / "assignment" / f"{split}.npy"


def read_assignment(run_dir: Path, split: str) -> np.ndarray:
    """What :func:`assignment_file` names.

    Raises:
        UserError: it is missing or damaged.
    """
    path = assignment_file(run_dir, split)
    try:
        written.check_file(path, "Run search.py again")
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} cannot be read ({e}). Run search.py again") from e
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype != np.uint8:
        raise UserError(f"{path} holds no groups of rows. Run search.py again")
    return found


def evidence(counts: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """``log P(group | id) - log P(group)`` for training rows ``counts [ids, K]`` and shares ``prior [K]``, float32."""
    share = (counts + PSEUDO_ROWS * prior) / (counts.sum(1, keepdim=True) + PSEUDO_ROWS)
    return (share.log() - prior.log()).float()


def _tables(run: Run, groups: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Shares of the groups ``[K]`` float64, and the table of every field that can be chosen; on CPU."""
    shards = _open(run, "train")
    fields = [f for f in run.schema.fields if not f.is_list]
    counts = [torch.zeros(f.cardinality * groups, dtype=torch.int64) for f in fields]
    total = torch.zeros(groups, dtype=torch.int64)
    with run.context.together("counting the groups of every id"):
        for ids, said in _parts(run, shards, "train", groups):
            total += torch.bincount(said, minlength=groups)
            one = torch.ones_like(said)
            for own, row in zip(counts, ids, strict=True):
                own.index_add_(0, row.long() * groups + said, one)
    run.context.sum(total)
    for own in counts:
        run.context.sum(own)
    prior = (total + 1).double() / (total.sum() + groups)
    tables = {}
    for f in fields:
        tables[f.name] = evidence(counts.pop(0).view(f.cardinality, groups), prior)
    return prior, tables


def _choose(run: Run, prior: torch.Tensor, tables: dict[str, torch.Tensor], fields: int) -> tuple[list[str], int, int]:
    """Names of the fields taken, and how many of how many validation rows then agree."""
    context, names = run.context, list(tables)
    shards = _open(run, "validation")
    step = max(1, -(-shards.rows // COMPARED_ROWS))
    with context.together("reading validation rows"):
        parts = list(_parts(run, shards, "validation", len(prior), step))
        ids = torch.cat([p[0] for p in parts], 1) if parts else torch.zeros(len(names), 0, dtype=torch.int32)
        said = torch.cat([p[1] for p in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    score = prior.log().float().expand(len(said), -1)
    start = context.sum(torch.stack([(score.argmax(1) == said).sum(), torch.tensor(len(said))]))
    best, rows = int(start[0]), int(start[1])
    chosen: list[str] = []
    while len(chosen) < min(fields, len(names)):
        hits = torch.full((len(names),), -1, dtype=torch.int64)
        for i, name in enumerate(names):
            if name not in chosen:
                hits[i] = ((score + tables[name].index_select(0, ids[i])).argmax(1) == said).sum()
        context.sum(hits)
        # Of equals the one with the smaller table.
        i = max(range(len(names)), key=lambda i: (int(hits[i]), -len(tables[names[i]]), -i))
        if int(hits[i]) <= best:
            break
        best = int(hits[i])
        chosen.append(names[i])
        score = score + tables[names[i]].index_select(0, ids[i])
    return chosen, best, rows


def _open(run: Run, split: str) -> SplitRows:
    return run.stream(split, run.config.train.eval_batch_size, shuffle=False).shards


def _parts(
    run: Run, shards: SplitRows, split: str, groups: int, step: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's row groups, of every ``step``-th: ids ``[fields without lists, n]`` int32, groups ``[n]`` int64."""
    said = read_assignment(run.dir, split)
    if len(said) != shards.rows or int(said.max(initial=0)) >= groups:
        raise UserError(
            f"{assignment_file(run.dir, split)} is of {len(said):,} rows in {int(said.max(initial=0)) + 1} groups, "
            f"{shards.directory} has {shards.rows:,} rows and {groups} groups. Give the data of the search"
        )
    ends = np.cumsum([piece.rows for piece in shards.groups])
    for i in range(run.context.rank * step, len(shards.groups), run.context.world_size * step):
        piece = shards.groups[i]
        own = said[ends[i] - piece.rows : ends[i]].astype(np.int64)
        yield torch.from_numpy(shards.read([piece]).ids), torch.from_numpy(own)


def _write(
    path: Path, run: Run, prior: torch.Tensor, tables: dict[str, torch.Tensor], source: dict[str, Any], agreement: float
) -> None:
    """Tables first: a kill in between leaves a JSON whose checksums do not fit, or none."""
    fields = []
    for i, (name, table) in enumerate(tables.items()):
        own = path.with_name(f"field_router-{i}.npy")
        with temporary(own).open("wb") as file:
            np.save(file, table.numpy(), allow_pickle=False)
        temporary(own).replace(own)
        fields.append({"name": name, "file": own.name, **digest(own)})
    head = {"format": FORMAT, "schema": run.schema.fingerprint, "agreement": agreement, "made_from": source}
    write_sealed(path, {**head, "prior": prior.log().tolist(), "fields": fields})


def _is_whole(path: Path, source: dict[str, Any]) -> bool:
    """Whether a router made from just this is there to the byte."""
    try:
        body = read_sealed(path)
        return body["made_from"] == source and all(_table_is_whole(path, entry) for entry in body["fields"])
    except (UserError, KeyError, TypeError):
        return False


def _table_is_whole(path: Path, entry: dict[str, Any]) -> bool:
    return is_whole(path.with_name(entry["file"]), entry)


def _read(path: Path, run: Run) -> FieldRouter:
    again = f"Delete {path} and give the command of retrain.py again: it makes one at the end"
    body = read_sealed(path)
    try:
        if body["schema"] != run.schema.fingerprint:
            raise UserError(f"{path} was made for data with another schema. Give the data of the search")
        prior = torch.tensor(body["prior"], dtype=torch.float32, device=run.context.device)
        tables: dict[str, torch.Tensor] = {}
        for entry in body["fields"]:
            field = next(f for f in run.schema.fields if f.name == entry["name"] and not f.is_list)
            tables[field.name] = _read_table(path, entry, [field.cardinality, len(prior)]).to(run.context.device)
    except (KeyError, TypeError, ValueError, StopIteration) as e:
        raise UserError(f"{path}: not a router of fields ({e!r}). {again}") from e
    return FieldRouter(run.schema, prior, tables)


def _read_table(path: Path, entry: dict[str, Any], shape: Sequence[int]) -> torch.Tensor:
    own = path.with_name(entry["file"])
    if not _table_is_whole(path, entry):
        raise UserError(f"{own} is missing or damaged. Delete {path} and give the command of retrain.py again")
    table = np.load(own, allow_pickle=False)
    if list(table.shape) != list(shape) or table.dtype != np.float32:
        raise ValueError(f"{own.name} is {table.dtype} {list(table.shape)}")
    return torch.from_numpy(table)
