"""The rows of one group of a prepared data set, as a prepared data set of their own.

``write_group`` gives what training of the group needs: the same fields, so the same fingerprint, and shards that
hold the group's rows in stored order. The vocabulary stays where it is; ``provenance["group"]`` in schema.json
names that place. A group that has no rows in a split has ``rows[split]`` 0 and no shards of it, which no
``BatchStream`` opens: look at the schema before opening one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from embsearch_dist.data.prepare.partial import whole_directory
from embsearch_dist.data.store import manifest
from embsearch_dist.data.store.bags import Bags
from embsearch_dist.data.store.shards import LeftOut, RowGroup, Rows, Shards, ShardWriter, column_types, read_groups
from embsearch_dist.errors import UserError
from embsearch_dist.files import digest, read_json
from embsearch_dist.schema import SPLITS, Schema

GROUP = "group"
HASHED_ROWS = 1 << 20


def write_group(
    prepared: Path | str,
    schema: Schema,
    assignment: Mapping[str, np.ndarray],
    group: int,
    out: Path | str,
    left_out: Mapping[str, Sequence[LeftOut]] | None = None,
    tick: Callable[[int], object] = lambda rows: None,
) -> Schema:
    """Write the rows of ``prepared`` whose assignment is ``group`` into directory ``out``; gives its schema.

    Reads row group by row group and holds a few at a time. The same source and assignment give the same
    bytes. ``out`` appears only when it is whole; what :func:`is_written` finds whole is not written again, and
    another group written there before is replaced. One process at a time may write an ``out``.

    Args:
        prepared: the source, a prepared data set.
        schema: its schema.
        assignment: split -> ``[N]`` integers, the group of every row of the split in stored order (without the
            rows of ``left_out``). Splits that are not in it are not written and have no entry in ``rows``.
        group: the number to look for.
        left_out: split -> its row groups that cannot be read: they are passed over.
        tick: called with the rows of each row group of the source that is done.

    Raises:
        UserError: an assignment that does not fit, a source that cannot be read, ``out`` is something else, or
            :class:`embsearch_dist.data.prepare.team.Stopped` for a full disk and the like. Nothing half-written
            remains.
    """
    prepared, out = Path(prepared), Path(out)
    shards, options = _job(prepared, schema, assignment, group, left_out or {})
    if _is_whole(out, schema, options):
        return Schema.load(out)
    _check_replaced(prepared, out)
    with whole_directory(out, overwrite=True) as partial:
        rows, labels = dict.fromkeys(shards, 0), dict.fromkeys(shards, 0.0)
        files: dict[str, dict] = {}
        for split, source in shards.items():
            writer = _GroupWriter(partial, schema, source, options)
            try:
                labels[split] = _copy_rows(source, schema, assignment[split], group, writer, tick)
            finally:
                writer.close()
            rows[split] = writer.rows
            files |= {name: {"rows": n, **digest(partial / name)} for name, n in writer.files.items()}
        provenance = schema.provenance | {
            "files": schema.provenance.get("files", []),
            "row_group_rows": options["row_group_rows"],
            "label_mean": {split: round(labels[split] / n, 6) for split, n in rows.items() if n},
            GROUP: {"of": str(prepared), "number": options["group"], "assignment": options["assignment"]},
        }
        made = Schema(schema.dataset, schema.fields, schema.dense, rows, provenance, schema.data)
        manifest.write(partial, made, files, options)
        made.save(partial)
    return made


def _copy_rows(
    source: Shards,
    schema: Schema,
    assignment: np.ndarray,
    group: int,
    writer: _GroupWriter,
    tick: Callable[[int], object],
) -> float:
    """Write the rows of a group of one split; the sum of their labels."""
    clicks, start = 0.0, 0
    for piece in source.groups:
        inside = np.flatnonzero(np.asarray(assignment[start : start + piece.rows]) == group)
        if len(inside):
            found = read_groups(schema, [piece]).take(inside)
            clicks += float(found.label.sum(dtype=np.float64))
            writer.write(found)
        start += piece.rows
        tick(piece.rows)
    return clicks


def is_written(
    prepared: Path | str,
    schema: Schema,
    assignment: Mapping[str, np.ndarray],
    group: int,
    out: Path | str,
    left_out: Mapping[str, Sequence[LeftOut]] | None = None,
) -> bool:
    """Whether ``out`` is what :func:`write_group` would write, whole: made from the same assignment and source,
    every file with its SHA-256. Reads all files of ``out`` if so.

    Raises:
        UserError: an assignment that does not fit, or a source that cannot be read.
    """
    return _is_whole(Path(out), schema, _job(Path(prepared), schema, assignment, group, left_out or {})[1])


def _job(
    prepared: Path,
    schema: Schema,
    assignment: Mapping[str, np.ndarray],
    group: int,
    left_out: Mapping[str, Sequence[LeftOut]],
) -> tuple[dict[str, Shards], dict]:
    """The shards of each split to read, and all that decides the result (in JSON); the arguments checked."""
    if not assignment:
        raise UserError(f"no split of {prepared} is assigned to groups. Give an assignment of at least one")
    unknown = sorted(set(assignment) - set(SPLITS))
    if unknown:
        raise UserError(f"assignment of an unknown split {unknown[0]!r}. Use {', '.join(SPLITS)}")
    shards = {s: Shards(prepared, schema, s, left_out.get(s, ())) for s in SPLITS if s in assignment}
    for split, source in shards.items():
        given = np.asarray(assignment[split])
        if given.ndim != 1 or len(given) != source.rows:
            raise UserError(
                f"split {split!r} of {prepared} has {source.rows:,} rows, its assignment has "
                f"{'x'.join(f'{n:,}' for n in given.shape) or 'no'} entries. Give one for every row, in stored order"
            )
        if not np.issubdtype(given.dtype, np.integer):
            raise UserError(f"the assignment of split {split!r} has type {given.dtype}. Give integers")
    groups = [piece for source in shards.values() for piece in source.groups]
    told = schema.provenance.get("row_group_rows")
    row_group_rows = told if isinstance(told, int) else max(piece.rows for piece in groups)
    options = {
        "row_group_rows": row_group_rows,
        "rows_per_shard": -(-_largest(groups) // row_group_rows) * row_group_rows,
        "group": int(group),
        "assignment": {split: _checksum(assignment[split]) for split in shards},
        "source": {split: _seen(source, left_out.get(split, ())) for split, source in shards.items()},
    }
    return shards, options


def _largest(groups: Sequence[RowGroup]) -> int:
    """Rows of the largest file."""
    rows: dict[Path, int] = {}
    for piece in groups:
        rows[piece.path] = rows.get(piece.path, 0) + piece.rows
    return max(rows.values())


def _checksum(assignment: np.ndarray) -> str:
    """SHA-256 of the numbers, whatever integers hold them."""
    found = hashlib.sha256()
    for start in range(0, len(assignment), HASHED_ROWS):
        found.update(np.asarray(assignment[start : start + HASHED_ROWS]).astype("<i8").tobytes())
    return found.hexdigest()


def _seen(source: Shards, left_out: Sequence[LeftOut]) -> str:
    """SHA-256 of what is known of a split without reading it: checksums in its manifest, else the files' sizes."""
    known, _ = manifest.shards_of(source.directory.parent, source.split)
    files = {piece.path.name: piece.path.stat().st_size for piece in source.groups}
    seen = {name: known[name]["sha256"] if name in known else size for name, size in files.items()}
    text = json.dumps([seen, sorted([e.name, -1 if e.group is None else e.group] for e in left_out)])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_whole(out: Path, schema: Schema, options: dict) -> bool:
    try:
        body = read_json(out / manifest.MANIFEST)
        if body.get("options") != options or body.get("fingerprint") != schema.fingerprint:
            return False
        manifest.verify(out)
    except (UserError, OSError):
        return False
    return True


def _check_replaced(prepared: Path, out: Path) -> None:
    """Only another group may be replaced."""
    if prepared.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds {prepared}, which is to be read. Write the group elsewhere")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = GROUP in Schema.load(out).provenance
    except (UserError, OSError):
        ours = False
    if not ours:
        raise UserError(f"{out} is in the way and no group of a data set. Remove it, or write the group elsewhere")


class _GroupWriter:
    """Writes rows to the shards of one split, a new file after every ``rows_per_shard``; none for no rows.

    ``files``: path inside the directory -> rows.
    """

    def __init__(self, directory: Path, schema: Schema, source: Shards, options: dict) -> None:
        self.directory, self.split, self.rows = directory, source.split, 0
        self.row_group_rows, self.rows_per_shard = options["row_group_rows"], options["rows_per_shard"]
        self.files: dict[str, int] = {}
        self._fields = schema.fields
        types = column_types(schema.fields, schema.dense)
        self._schema = pa.schema([pa.field(n, t, nullable=False) for n, t in types.items()])
        self._file: ShardWriter | None = None

    def write(self, rows: Rows) -> None:
        start = 0
        while start < len(rows):
            if self._file is None:
                self._open()
            assert self._file is not None
            n = min(len(rows) - start, self.rows_per_shard - self._file.rows)
            whole = n == len(rows)
            self._file.write(self._columns(rows if whole else rows.take(slice(start, start + n))))
            start, self.rows = start + n, self.rows + n
            if self._file.rows == self.rows_per_shard:
                self.close()

    def close(self) -> None:
        """End the file that is open, if any."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
            self.files[self._name] = file.rows

    def _open(self) -> None:
        self._name = f"{self.split}/part-{len(self.files):05d}.parquet"
        (self.directory / self.split).mkdir(exist_ok=True)
        self._file = ShardWriter(self.directory / self._name, self._schema, self.row_group_rows)

    def _columns(self, rows: Rows) -> list[np.ndarray | Bags]:
        """In the order of a shard: label, fields, dense."""
        single, several = iter(rows.ids), iter(rows.bags)
        fields = [next(several) if f.is_list else next(single) for f in self._fields]
        return [rows.label, *fields, *rows.dense.T]
