"""Files with ids become a prepared data set: linked where training can read them as they are, else written anew.

Every row is read and checked once. There is no vocabulary: which value an id stands for, only its maker knows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.data.formats.columns import Bag
from embsearch_dist.data.formats.source_file import LONGEST
from embsearch_dist.data.ids.reading import Columns, open_file, read, types_of
from embsearch_dist.data.ids.source import IdField, IdSource, read_id_source
from embsearch_dist.data.prepare import advice
from embsearch_dist.data.prepare.partial import whole_directory
from embsearch_dist.data.prepare.progress import Progress, on_threads
from embsearch_dist.data.prepare.scratch import load_record, save_record
from embsearch_dist.data.prepare.team import Team
from embsearch_dist.data.store import manifest
from embsearch_dist.data.store.bags import Bags
from embsearch_dist.data.store.shards import ShardWriter, column_types
from embsearch_dist.errors import UserError
from embsearch_dist.files import digest, is_whole, states
from embsearch_dist.schema import SPLITS, Field, Schema

STAGE = "stage"
LARGEST_GROUP = 1 << 20
"""Rows of a row group that training can read as one piece; larger ones are written anew."""


@dataclass(frozen=True)
class Job:
    """One file of the input, and where its rows go: the k-th shard of its split (or of each of them)."""

    file: Path
    split: str
    k: int

    def shard(self, split: str) -> str:
        return f"{split}/part-{self.k:05d}.parquet"

    @property
    def record(self) -> str:
        return f"{self.split or 'all'}-{self.k:05d}.json"


def take_over(
    paths: Callable[[], Sequence[Path | str]],
    out: Path | str,
    *,
    team: Team | None = None,
    row_group_rows: int,
    overwrite: bool = False,
    quiet: bool = False,
) -> Schema:
    """Make the prepared data set ``out`` of Parquet files with ids. Processes of a team share the files.

    Args:
        paths: gives the source file, or the folder with an ids.yaml in it.
        row_group_rows: of files that are written anew.

    Raises:
        UserError: anything wrong with the source file or a row; nothing half-written remains.
    """
    team = team or Team()
    with team.together():
        named = paths()
        if len(named) != 1:
            raise UserError(f"format ids takes one --input, a source file or its folder, not {len(named)}")
        source = read_id_source(Path(named[0]))
        inside = [f for f in source.every_file if f.resolve().is_relative_to(Path(out).resolve())]
        if inside:
            raise UserError(f"{inside[0]} lies in {out}, which would be replaced. Give another --out")
        job = _describe(source, row_group_rows)
        with whole_directory(Path(out), overwrite, job, team, quiet) as partial:
            schema = _fill(partial, source, row_group_rows, team, quiet)
            if _describe(source, row_group_rows) != job:
                raise UserError(f"{source.name}: the input was changed while it was read. Start again")
        return schema


def _describe(source: IdSource, row_group_rows: int) -> dict:
    """All that decides the result: work left by the same job may be continued."""
    return {
        "format": "ids",
        "versions": {"pyarrow": pa.__version__},
        "source": repr((source.label, source.fields, source.dense, source.split_column, source.splits)),
        "files": states(source.every_file),
        "order": [str(f.resolve()) for f in source.every_file],
        "options": {"--row-group-rows": row_group_rows},
    }


def _fill(directory: Path, source: IdSource, row_group_rows: int, team: Team, quiet: bool) -> Schema:
    fields = tuple(Field(f.name, f.cardinality, f.pooling, bool(f.weights)) for f in source.fields)
    schema = Schema(source.name, fields, tuple(source.dense))
    jobs = [Job(file, split, k) for split, files in source.files.items() for k, file in enumerate(files)]
    stage = directory / STAGE
    if team.rank == 0:
        _check_alike(source, jobs)
        for folder in (stage, *(directory / split for split in SPLITS)):
            folder.mkdir(exist_ok=True)
    team.barrier("folders are there")
    size = sum(job.file.stat().st_size for job in jobs)
    bar = Progress("check", size, "bytes", quiet, team)

    def work(job: Job) -> None:
        note = load_record(stage / job.record)
        done = note is not None and all(is_whole(directory / n, f) for n, f in note["files"].items())
        if not done:
            save_record(stage / job.record, _take(directory, source, schema, job, row_group_rows))
        bar.add(job.file.stat().st_size, found=done)

    on_threads(team, bar, jobs, work)
    records = [r for job in jobs if (r := load_record(stage / job.record)) is not None]
    schema = _schema(source, schema, records, row_group_rows)
    team.barrier("all is read")  # what follows removes it
    if team.rank == 0:
        files = {name: facts for record in records for name, facts in record["files"].items()}
        told = {"split": "as given", "row_group_rows": schema.provenance["row_group_rows"]}
        manifest.write(directory, schema, files, told)
        schema.save(directory)
        shutil.rmtree(stage)
    return schema


def _check_alike(source: IdSource, jobs: Sequence[Job]) -> None:
    """Raise ``UserError`` unless the wanted columns have one type in all files."""
    first: dict[str, pa.DataType] = {}
    for job in jobs:
        with open_file(job.file) as file:
            own = types_of(source, job.file, file.schema_arrow)
        first = first or own
        for name, kind in own.items():
            if kind != first[name]:
                raise UserError(
                    f"{job.file}: column {name!r} is {kind}, but {first[name]} in {jobs[0].file}. Write all files "
                    "with one schema"
                )


def _take(directory: Path, source: IdSource, schema: Schema, job: Job, row_group_rows: int) -> dict:
    """Check a file, and link it or write its rows into the directory; a record of what came of it."""
    wanted = pa.schema(list(column_types(schema.fields, schema.dense).items()))
    with open_file(job.file) as file:
        in_place = not source.split_column and _fits(source, file, wanted)
        found: dict[str, dict] = {s: {"rows": 0, "clicks": 0, "values": {}} for s in SPLITS}
        writers: dict[str, ShardWriter] = {}
        try:
            for columns in read(source, job.file, file):
                for split, rows in _by_split(source, job, columns):
                    _count(found[split], columns, rows)
                    if not in_place:
                        if split not in writers:
                            target = directory / job.shard(split)
                            writers[split] = ShardWriter(target, wanted, row_group_rows)
                        writers[split].write(_in_order(schema, columns, rows))
        finally:
            for writer in writers.values():
                writer.close()
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] if in_place else []
    if in_place and found[job.split]["rows"]:
        _link(job.file, directory / job.shard(job.split))
    names = {split: job.shard(split) for split in SPLITS if found[split]["rows"]}
    files = {name: {"rows": found[split]["rows"], **digest(directory / name)} for split, name in names.items()}
    return {"files": files, "found": found, "in_place": in_place, "largest_group": max(groups, default=0)}


def _fits(source: IdSource, file: pq.ParquetFile, wanted: pa.Schema) -> bool:
    """Whether training can read the file as it is: names and types of the columns, and not too many rows at once."""
    renamed = [f for f in source.fields if f.column != f.name or (f.weights and f.weights != f"{f.name} weights")]
    if source.label != "label" or renamed or any(name != column for name, column in source.dense.items()):
        return False
    own = {f.name: f.type for f in file.schema_arrow}
    groups = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    return all(own.get(f.name) == f.type for f in wanted) and max(groups, default=0) <= LARGEST_GROUP


def _by_split(source: IdSource, job: Job, columns: Columns) -> list[tuple[str, np.ndarray | slice]]:
    if not source.split_column:
        return [(job.split, slice(None))] if len(columns.label) else []
    found: list[tuple[str, np.ndarray | slice]] = []
    for split in SPLITS:
        rows = np.flatnonzero(np.isin(columns.split, [value for value, s in source.splits if s == split]))
        if len(rows):
            found.append((split, rows))
    return found


def _count(total: dict, columns: Columns, rows: np.ndarray | slice) -> None:
    label = columns.label[rows]
    total["rows"] += len(label)
    total["clicks"] += int(label.sum(dtype=np.float64))
    for name, ids in columns.ids.items():
        if isinstance(ids, Bags):
            total["values"][name] = total["values"].get(name, 0) + int(ids.lengths[rows].sum())


def _in_order(schema: Schema, columns: Columns, rows: np.ndarray | slice) -> list[np.ndarray | Bags]:
    """The columns of a shard; ids and weights of a list are one."""
    found: list[np.ndarray | Bags] = [columns.label[rows]]
    for f in schema.fields:
        ids = columns.ids[f.name]
        found.append(ids.take(rows) if isinstance(ids, Bags) else ids[rows])
    return [*found, *(columns.dense[name][rows] for name in schema.dense)]


def _link(source: Path, target: Path) -> None:
    """The same file on the disk where it allows; a later change of it is noticed by its checksum."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _schema(source: IdSource, plain: Schema, records: Sequence[dict], row_group_rows: int) -> Schema:
    """The schema with what was counted in all files."""
    rows = {s: sum(r["found"][s]["rows"] for r in records) for s in SPLITS}
    clicks = {s: sum(r["found"][s]["clicks"] for r in records) for s in SPLITS}
    for split, n in rows.items():
        if n == 0:
            raise UserError(f"{source.path}: the {split} split has no rows. Give it some")
    fields = []
    for f in plain.fields:
        values = sum(r["found"]["train"]["values"].get(f.name, 0) for r in records)
        mean = round(values / rows["train"], 4) if f.is_list else 1.0
        fields.append(Field(f.name, f.cardinality, f.pooling, f.weighted, mean))
    columns = [_column(f) for f in source.fields]
    columns += [{"name": name, "kind": "dense", "column": column} for name, column in source.dense.items()]
    provenance: dict[str, object] = {
        "files": [{"name": f.name, "bytes": f.stat().st_size} for f in source.every_file],
        "rows_read": sum(rows.values()),
        "notes": [f"{sum(r['in_place'] for r in records)} of {len(records)} files are used as they are"],
        "source": {"format": "table", "columns": columns, "given_ids": True},
        "split": f"column {source.split_column}" if source.split_column else "folders",
        "row_group_rows": max([r["largest_group"] for r in records] + [0]) or row_group_rows,
        "label_mean": {s: round(clicks[s] / n, 6) for s, n in rows.items()},
        "warnings": advice.of_splits(rows, clicks),
        "dense": {name: {"mean": 0.0, "std": 1.0} for name in source.dense},
    }
    return Schema(source.name, tuple(fields), plain.dense, rows, provenance)


def _column(f: IdField) -> dict[str, object]:
    """How ids of a field are read in rows that are to be predicted: as whole numbers, under the column's name."""
    body: dict[str, object] = {"name": f.name, "kind": "categorical", "column": f.column, "whole": True}
    if f.pooling:
        body |= {"kind": "list", "bag": asdict(Bag(pooling=f.pooling, max_length=LONGEST, weights=f.weights))}
    return body


def summary(schema: Schema) -> str:
    """A table for people: fields with cardinality, then rows and label mean of each split."""
    width = max(len("field"), *(len(n) for n in [*schema.names, *schema.dense]))
    lines = [f"{'field':<{width}} {'cardinality':>12}"]
    for f in schema.fields:
        kind = f"  list: {f.mean_length:.4g} values a training row, {f.pooling}" if f.is_list else ""
        lines.append(f"{f.name:<{width}} {f.cardinality:>12,}{kind}")
    lines += [f"{n:<{width}} {'dense':>12}" for n in schema.dense]
    means, notes = schema.provenance["label_mean"], schema.provenance["notes"]
    assert isinstance(means, dict) and isinstance(notes, list)
    lines.append(f"{'split':<{width}} {'rows':>12} {'label mean':>12}")
    lines += [f"{n:<{width}} {schema.rows[n]:>12,} {means[n]:>12.4f}" for n in SPLITS]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])
