"""What is settled about the rows to be predicted before any is read: which files they are, that no scores are among
them, and which columns are kept, in what types.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.data.formats import parquet
from embsearch_dist.data.formats.described import Description
from embsearch_dist.data.formats.inputs import shown
from embsearch_dist.data.formats.opening import PARQUET, packing
from embsearch_dist.errors import UserError
from embsearch_dist.files import states

MARK = b"embsearch_dist.scores"
ONCE_MORE = "Start again once the input is whole"


def holds_scores(path: Path) -> bool:
    """Whether predict has written a file."""
    try:
        return path.is_file() and MARK in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def check_apart(input: Path, out: Path) -> None:
    """The next call on the same input must not find the scores of this one among its rows.

    Args:
        input: a file, a folder or a pattern.
        out: the file to be written.

    Raises:
        UserError: ``out`` is the input, lies in it, or fits the pattern.
    """
    again = "the next call would read the scores as rows"
    place = out.parent.resolve() / out.name
    if input.is_dir():
        if input.resolve() in place.parents:
            raise UserError(f"--out {out} lies in the folder {input} of --input: {again}. Give an --out outside of it")
    elif input.exists():
        if out.exists() and out.samefile(input):
            raise UserError(f"--out {out} is the --input itself. Give another --out")
    elif glob.has_magic(str(input)) and any(_fits(file, input) for file in (place, out.absolute())):
        raise UserError(f"--out {out} fits the pattern of --input: {again}. Give an --out that does not fit it")


def _fits(file: Path, pattern: Path) -> bool:
    """Whether a pattern would find a file. Only what is behind the last folder without ``*`` and the like counts as a
    pattern: the folder that a user works in may have any name."""
    first = next(k for k, part in enumerate(pattern.parts) if glob.has_magic(part))
    folder = Path(*pattern.parts[:first])
    return any(
        file.is_relative_to(start) and shown(pattern.parts[first:], file.relative_to(start).parts)
        for start in (folder.resolve(), folder.absolute())
    )


def refuse_scores(source: Description, input: Path, format: str) -> None:
    """A folder or a pattern may hold what an earlier call has written; a file that is named itself is meant.

    Raises:
        UserError: one of its files holds scores.
    """
    if format == "table" and not input.is_file():
        for file in source.files(input):
            if holds_scores(file):
                raise UserError(f"--input {input}: {file} holds scores of an earlier call, not rows. Move it elsewhere")


def states_of(files: Sequence[Path]) -> dict[str, list[int]]:
    """:func:`files.states` of the input.

    Raises:
        UserError: one is gone.
    """
    try:
        return states(files)
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be looked at ({e.strerror}). {ONCE_MORE}") from e


def check_unchanged(input: Path, before: Mapping[str, list[int]], files: Sequence[Path]) -> None:
    """Processes cut the input each for itself, and a row that is still being written would count as a whole one.

    Args:
        before: :func:`states_of` the files at first.
        files: those that are there now.

    Raises:
        UserError: they are others than before, or were written to.
    """
    now = states_of(files)
    if other := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        raise UserError(f"--input {input}: {other[0]} was changed while it was read. {ONCE_MORE}")


def kept_names(words: Sequence[str], there: Callable[[str], bool]) -> tuple[str, ...]:
    """The columns that ``words`` name, each once: one word may name several with commas between them, but a column may
    have a comma in its name.

    Args:
        there: whether the rows have a column of that whole name.
    """
    split = (word.split(",") if "," in word and not there(word) else [word] for word in words)
    return tuple(dict.fromkeys(name for names in split for name in names if name))


def kept_types(files: Sequence[Path], names: Sequence[str]) -> dict[str, pa.DataType]:
    """Of each kept column whose types differ over Parquet files, the type that holds the values of all, if there is
    one: that of the first file may be narrower than another's."""
    if not names or len(files) < 2:
        return {}
    schemas = [schema_of(file) for file in files if packing(file) == PARQUET]
    found = {}
    for name in names:
        types = dict.fromkeys(parquet.plain(schema.field(name).type) for schema in schemas)
        if len(types) > 1:
            try:
                wide = pa.unify_schemas([pa.schema([(name, t)]) for t in types], promote_options="permissive")
            except pa.ArrowException:
                continue  # whether the values fit the first file's type is seen when they are there
            found[name] = pl.DataFrame(pl.from_arrow(wide.empty_table())).to_arrow().field(name).type
    return found


def schema_of(file: Path) -> pa.Schema:
    """The columns of a Parquet file.

    Raises:
        UserError: it cannot be read.
    """
    with parquet.opened(file) as found:
        return found.schema_arrow


def fitting(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the types of ``schema``.

    Raises:
        UserError: a value would not be the same in that type.
    """
    pairs = ((table[field.name], field) for field in schema)
    columns = [given if given.type == field.type else _cast(given, field) for given, field in pairs]
    return pa.table(columns, schema=schema)


def _cast(given: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """Arrow's own check of a cast lets digits of floats and zeros before numbers go."""
    try:
        found = given.cast(field.type)
        empty = pa.types.is_null(given.type)  # which no type can be cast back to
        same = empty or pl.Series(given).equals(pl.Series(found.cast(given.type)), null_equal=True)
    except (pa.ArrowException, ValueError):
        same = False
    if not same:
        raise UserError(
            f"--keep {field.name}: its type differs from file to file, and not all of its {given.type} are the same as "
            f"{field.type}. Write all files with one type, or leave it out of --keep"
        )
    return found
