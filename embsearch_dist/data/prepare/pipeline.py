"""Raw files -> a prepared data set: staged once, counted on the training split, encoded to shards.

Memory does not grow with the rows but with a few blocks of input and the distinct values of a field that
are looked at in one pass: Criteo's 45.8M rows pass within 6 GiB. Every row is handled by vectorised polars
or numpy, or by pyarrow.

Each stage leaves its results with their checksums in ``OUT.partial``: a later start of the same job uses
what is whole. All work is divided into pieces of input, fields and shards that do not depend on who does
them, so threads and processes may share it in any way and the bytes are the same.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.data.formats import Source, blocks, open_source
from embsearch_dist.data.formats.columns import Bag
from embsearch_dist.data.prepare import advice
from embsearch_dist.data.prepare.earlier import HOW_NEW, Earlier
from embsearch_dist.data.prepare.encode import Encoder, Shard, cut, encode, scales
from embsearch_dist.data.prepare.partial import whole_directory
from embsearch_dist.data.prepare.progress import Progress
from embsearch_dist.data.prepare.splits import HOW_TO_SPLIT, split_parts
from embsearch_dist.data.prepare.staging import Part, stage
from embsearch_dist.data.prepare.team import Team
from embsearch_dist.data.prepare.vocabulary import NOTHING_KEPT, VOCABULARY, Ids, build_all, file_name, load_values
from embsearch_dist.data.store import manifest
from embsearch_dist.errors import UserError
from embsearch_dist.files import states
from embsearch_dist.schema import SPLITS, Field, Schema

__all__ = ["HOW_TO_SPLIT", "Options", "Progress", "prepare", "prepare_into", "summary", "whole_directory"]

STAGE = "stage"
STAGING_FORMAT = 3
ROW_GROUP_ROWS = 65_536
ROWS_PER_SHARD = 4_194_304


@dataclass
class Options:
    """How to prepare.

    Attributes:
        split: ``random`` (a seeded hash of the row number) or ``time``; both 8:1:1.
        seed: of the random split.
        min_count: training rows a value needs for an id of its own; ``None``: the format's default.
        rows_per_shard: rows of one Parquet file, rounded up to whole row groups.
        row_group_rows: rows of one row group: the unit in which training reads.
        overwrite: replace an earlier prepared data set.
        quiet: no progress.
        genres: of MovieLens: ``one`` value for the combination of a movie's genres, or a ``list`` of them.
        numbers: of Criteo: I1 to I13 as ``bucketed`` fields, or as ``dense`` columns.
        vocabulary: earlier prepared data whose ids, means and deviations are kept, see :class:`Earlier`.
        vocabulary_new: ``extend`` gives new values that reach ``min_count`` the next ids, ``freeze`` none.
    """

    split: str = "random"
    seed: int = 0
    min_count: int | None = None
    rows_per_shard: int = ROWS_PER_SHARD
    row_group_rows: int = ROW_GROUP_ROWS
    overwrite: bool = False
    quiet: bool = False
    genres: str = "one"
    numbers: str = "bucketed"
    vocabulary: Path | str | None = None
    vocabulary_new: str = "extend"

    def __post_init__(self) -> None:
        if self.split not in HOW_TO_SPLIT:
            raise UserError(f"--split {self.split!r} is none of {', '.join(HOW_TO_SPLIT)}. Write one of them")
        if self.vocabulary_new not in HOW_NEW:
            known = ", ".join(HOW_NEW)
            raise UserError(f"--vocabulary-new {self.vocabulary_new!r} is none of {known}. Write one of them")
        if self.vocabulary is None and self.vocabulary_new != "extend":
            raise UserError("--vocabulary-new says what becomes of values that --vocabulary lacks. Give both")
        if self.seed < 0:
            raise UserError(f"--seed must be at least 0, got {self.seed}. Give another")
        for name in ("min_count", "rows_per_shard", "row_group_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}. Give another")


def prepare(
    format: str,
    input: Path | str | Sequence[Path | str] | Callable[[], Sequence[Path | str]],
    out: Path | str,
    *,
    team: Team | None = None,
    **options: Any,
) -> Schema:
    """Prepare raw data of a named format into directory ``out`` (layout: :mod:`embsearch_dist.schema`).

    ``input`` may be a function that gives the paths, for work that comes before them and takes long.
    ``options`` are the attributes of :class:`Options`. The same input and options give the same bytes,
    whatever the number of threads and of processes (every one of a ``team`` calls this). Interrupted or
    killed work is continued by the next call with the same arguments.

    Raises:
        UserError: anything wrong with the input or the options; nothing half-written remains. Or
            :class:`embsearch_dist.data.prepare.team.Stopped`, for what is not their fault; then work can go on.
    """
    team = team or Team()
    with team.together():
        checked = Options(**options)
        paths = input() if callable(input) else input
        source = open_source(format, paths, checked.genres, checked.numbers)
        inside = [f for f in source.files if f.resolve().is_relative_to(Path(out).resolve())]
        if inside:
            raise UserError(f"{inside[0]} lies in {out}, which would be replaced. Give another --out")
        if checked.vocabulary is not None and Path(checked.vocabulary).resolve() == Path(out).resolve():
            raise UserError(f"--vocabulary {checked.vocabulary} would be replaced. Give another --out")
        job = describe(source, checked)
        with whole_directory(Path(out), checked.overwrite, job, team, checked.quiet) as partial:
            schema = prepare_into(partial, source, checked, team)
            if describe(source, checked) != job:
                raise UserError(f"{source.dataset}: the input was changed while it was read. Start again")
        return schema


def describe(source: Source, options: Options) -> dict:
    """All that decides the bytes of the result: work left by the same job may be continued."""
    return {
        "staging": STAGING_FORMAT,
        "versions": {"polars": pl.__version__, "pyarrow": pa.__version__, "numpy": np.__version__},
        "dataset": source.dataset,
        "recipe": hashlib.sha256(repr((source.columns, source.recipe)).encode()).hexdigest(),
        "files": states(source.files),
        "order": [str(f.resolve()) for f in source.files],
        "block_bytes": blocks.BLOCK_BYTES,
        "options": {f"--{name.replace('_', '-')}": value for name, value in _told(source, options).items()},
    }


def _told(source: Source, options: Options) -> dict[str, object]:
    """The options that the result depends on, defaults resolved."""
    return {
        "split": options.split,
        "seed": options.seed,
        "min_count": options.min_count or source.min_count,
        "rows_per_shard": options.rows_per_shard,
        "row_group_rows": options.row_group_rows,
        **_told_of_earlier(source, options),
    }


def _told_of_earlier(source: Source, options: Options) -> dict[str, object]:
    """By what they are and not where they lie, so that a copy of them will do."""
    earlier = _earlier(source, options)
    return {} if earlier is None else {"vocabulary": earlier.data, "vocabulary_new": earlier.new}


def _earlier(source: Source, options: Options) -> Earlier | None:
    if options.vocabulary is None:
        return None
    return Earlier.open(options.vocabulary, options.vocabulary_new, source.columns)


def prepare_into(directory: Path, source: Source, options: Options, team: Team | None = None) -> Schema:
    """The work of :func:`prepare` in a directory that is empty or holds what an earlier start of it left.

    Writes ``manifest.json`` and then, when all is there, ``schema.json``.
    """
    team = team or Team()
    if options.split == "time" and source.no_time is not None:
        raise UserError(f"a chronological split is not possible: {source.no_time}")
    if team.share("finished", lambda: _finished(directory)):
        return Schema.load(directory)
    folder = directory / STAGE
    parts = stage(source, folder, options.split == "time", team, options.quiet)
    counts = split_parts(parts, options.split, options.seed, team)
    rows = _rows_of_splits(source, counts)
    fields = [c.name for c in source.columns if c.kind != "dense"]
    dense = [c.name for c in source.columns if c.kind == "dense"]
    told, earlier = _told(source, options), _earlier(source, options)
    min_count = options.min_count or source.min_count
    before = earlier.kept if earlier is not None else lambda name: NOTHING_KEPT
    books = build_all(parts, fields, directory / VOCABULARY, folder, min_count, team, options.quiet, before)
    bags = {c.name: c.bag for c in source.columns if c.bag is not None}
    known = tuple(_field(name, book, bags.get(name)) for name, book in zip(fields, books, strict=True))
    scale = earlier.scale() if earlier is not None else team.share("scales", lambda: scales(parts, dense))
    ids = Ids(parts, fields, folder)
    encoder = Encoder(parts, counts, ids, known, scale)
    shards = cut(rows, options.rows_per_shard, options.row_group_rows)
    done = encode(encoder, shards, directory, folder, options.row_group_rows, team, options.quiet)
    rows_read = _check_rows(source, parts, directory, shards)
    clicks = _clicks(shards, done)
    told_of = team.share("warnings", lambda: _warnings(source, directory, parts, known, books, ids, rows, clicks))
    if earlier is not None:
        told_of += team.share("constants", lambda: advice.of_constants(parts, scale))
    schema = Schema(
        dataset=source.dataset,
        fields=known,
        dense=tuple(dense),
        rows=rows,
        provenance={
            "files": [{"name": f.name, "bytes": f.stat().st_size} for f in source.files],
            "rows_read": rows_read,
            "notes": list(source.notes),
            "source": dict(source.description),
            "split": options.split,
            "seed": options.seed,
            "min_count": min_count,
            "row_group_rows": options.row_group_rows,
            "label_mean": {name: round(clicks[name] / n, 6) for name, n in rows.items()},
            "warnings": told_of,
            "fields": _field_provenance(parts, fields, books, bags, earlier),
            "dense": {n: {"mean": m, "std": s} for n, (m, s) in scale.items()},
            **({"vocabulary": earlier.provenance()} if earlier is not None else {}),
        },
    )
    team.barrier("all is read")  # what follows removes it
    if team.rank == 0:
        files = {f"{VOCABULARY}/{file_name(name)}": book["file"] for name, book in zip(fields, books, strict=True)}
        files |= {shard.name: record["file"] for shard, record in zip(shards, done, strict=True)}
        manifest.write(directory, schema, files, told)
        schema.save(directory)
        shutil.rmtree(folder)
    return schema


def _rows_of_splits(source: Source, counts: np.ndarray) -> dict[str, int]:
    rows = {name: int(n) for name, n in zip(SPLITS, counts.sum(axis=0), strict=True)}
    if empty := [name for name, n in rows.items() if n == 0]:
        total = sum(rows.values())
        raise UserError(f"{source.dataset}: the {empty[0]} split is empty ({total} rows). Give more rows")
    return rows


def _field_provenance(
    parts: list[Part], fields: list[str], books: list[dict], bags: dict[str, Bag], earlier: Earlier | None
) -> dict[str, dict[str, object]]:
    """What the schema says of how each field was counted."""
    keys = ("distinct", "rare_share", "missing_share", *(("new",) if earlier is not None else ()))
    return {
        name: {key: book[key] for key in keys} | ({} if name not in bags else _list_provenance(parts, name, bags[name]))
        for name, book in zip(fields, books, strict=True)
    }


def _field(name: str, book: dict, bag: Bag | None) -> Field:
    if bag is None:
        return Field(name, book["cardinality"])
    return Field(name, book["cardinality"], bag.pooling, bag.weighted, book["mean_length"])


def _list_provenance(parts: Sequence[Part], name: str, bag: Bag) -> dict[str, int]:
    """How many values of a row are kept, and the rows, of all splits, that have more."""
    return {"max_length": bag.max_length, "shortened_rows": sum(part.shortened(name) for part in parts)}


def _finished(directory: Path) -> bool:
    """Whether an earlier start wrote everything and was ended before it could rename the directory."""
    if not (directory / "schema.json").exists():
        return False
    try:
        manifest.verify(directory)
    except UserError:
        (directory / "schema.json").unlink()
        return False
    shutil.rmtree(directory / STAGE, ignore_errors=True)
    return True


def _clicks(shards: list[Shard], done: list[dict]) -> dict[str, int]:
    positive = dict.fromkeys(SPLITS, 0)
    for shard, record in zip(shards, done, strict=True):
        positive[shard.split] += record["labels"]
    return positive


def _check_rows(source: Source, parts: Sequence[Part], directory: Path, shards: list[Shard]) -> int:
    """How many rows were read; the footers of all shards count as many.

    Each row read was counted twice: by the line ends of its block
    (:func:`embsearch_dist.data.formats.blocks.parse`) or the footer of its file, and in the frame that it came in.

    Raises:
        UserError: rows were lost or doubled.
    """
    read = sum(part.rows for part in parts)
    written = sum(pq.read_metadata(directory / shard.name).num_rows for shard in shards)
    if read != written:
        raise UserError(f"{source.dataset}: {read:,} rows were read but {written:,} written. Delete it and start again")
    return read


def _warnings(
    source: Source,
    directory: Path,
    parts: Sequence[Part],
    fields: Sequence[Field],
    books: Sequence[dict],
    ids: Ids,
    rows: dict[str, int],
    clicks: dict[str, int],
) -> list[str]:
    dense = [c.name for c in source.columns if c.kind == "dense"]
    found: list[str | None] = [*advice.of_splits(rows, clicks), *advice.of_leaks(parts, fields, ids, dense)]
    for f, book in zip(fields, books, strict=True):
        found.append(advice.of_rare(f.name, f.cardinality, book["distinct"]))
        if not f.is_list:
            cells = round(rows["train"] * (1 - book["missing_share"]))
            found.append(advice.of_identity(f.name, book["distinct"], cells))
    for f in fields:
        values = load_values(directory, f.name)["value"]
        found.append(advice.of_spellings(f.name, values, source.spelling, f.is_list))
        found.append(advice.of_floats(f.name, values, source.coarse[f.name]) if f.name in source.coarse else None)
    return [text for text in found if text is not None]


def summary(schema: Schema) -> str:
    """A table for people: fields with cardinality and shares, then rows and label mean of each split."""
    seen = schema.provenance["fields"]
    assert isinstance(seen, dict)
    width = max(len("field"), *(len(n) for n in [*schema.names, *schema.dense]))
    lines = [f"{'field':<{width}} {'cardinality':>12} {'distinct':>12} {'rare':>7} {'missing':>7}"]
    for f in schema.fields:
        s = seen[f.name]
        lines.append(
            f"{f.name:<{width}} {f.cardinality:>12,} {s['distinct']:>12,} "
            f"{s['rare_share']:>7.2%} {s['missing_share']:>7.2%}"
        )
    lines += [f"{n:<{width}} {'dense':>12}" for n in schema.dense]
    for f in schema.fields:
        if f.is_list:
            s, how = seen[f.name], "weighted sum" if f.weighted else f.pooling
            cut = f", {s['shortened_rows']:,} rows cut to {s['max_length']}" if s["shortened_rows"] else ""
            lines.append(f"{f.name:<{width}} list: {f.mean_length:.4g} values a training row, {how}{cut}")
    means = schema.provenance["label_mean"]
    assert isinstance(means, dict)
    lines.append(f"{'split':<{width}} {'rows':>12} {'label mean':>12}")
    lines += [f"{n:<{width}} {schema.rows[n]:>12,} {means[n]:>12.4f}" for n in SPLITS]
    if earlier := schema.provenance.get("vocabulary"):
        new = sum(s["new"] for s in seen.values())
        lines.append(f"ids of {earlier['keeps'][0]} kept, {new:,} values got new ids ({earlier['new']})")
    files, notes = schema.provenance["files"], schema.provenance["notes"]
    assert isinstance(files, list) and isinstance(notes, list)
    read, total = schema.provenance["rows_read"], sum(schema.rows.values())
    lines.append(f"{read:,} rows read from {len(files)} file{'' if len(files) == 1 else 's'}, {total:,} written")
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)
