"""Which row groups of a prepared data set cannot be read: found before training, because batches are cut from
all rows of a window and nothing can be passed over in the middle of it.

A shard file that has the SHA-256 of the manifest is whole. Of every other one each row group is decoded and
checked as training does it. The answer is a list of :class:`~embsearch_dist.data.store.shards.LeftOut`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from embsearch_dist.data.store.manifest import OtherFile, compare_ends, shards_of
from embsearch_dist.data.store.shards import LeftOut, read_groups, row_groups
from embsearch_dist.errors import UserError
from embsearch_dist.files import is_whole
from embsearch_dist.schema import Schema


def names_of(prepared_dir: Path | str, split: str) -> list[str]:
    """The shard files of a split: those that are there, and those that the manifest names."""
    there = {path.name for path in (Path(prepared_dir) / split).glob("part-*.parquet")}
    return sorted(there | set(shards_of(prepared_dir, split)[0]))


def find(
    prepared_dir: Path | str,
    schema: Schema,
    split: str,
    names: Sequence[str],
    tick: Callable[[int], object] = lambda size: None,
) -> tuple[list[LeftOut], list[str]]:
    """What of the named shard files cannot be read; and the files that can, but are not those of the manifest.

    ``tick`` is called with the bytes of each file once it was looked at.
    """
    known, size = shards_of(prepared_dir, split)
    found: list[LeftOut] = []
    changed = []
    for name in names:
        path, entry = Path(prepared_dir) / split / name, known.get(name)
        if entry is None or not is_whole(path, entry):
            bad = _look(path, schema, entry, size)
            found += bad
            if not bad and known:
                changed.append(name)
        tick(size_of(path))
    return found, changed


def refuse_others(prepared_dir: Path | str, schema: Schema, split: str) -> None:
    """Refuse shards that are not those of the manifest; where one cannot be read, say which row group.

    Raises:
        UserError: names the file, and what is wrong in it or that it is another one.
    """
    try:
        compare_ends(prepared_dir, split)
    except OtherFile as e:
        read_groups(schema, row_groups(e.file, schema))
        raise


def size_of(path: Path) -> int:
    """Bytes of a file; 0 for one that is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _look(path: Path, schema: Schema, entry: dict | None, group_rows: int) -> list[LeftOut]:
    """Decode every row group of a file."""
    try:
        groups = row_groups(path, schema)
    except UserError as e:
        # Its row groups are known from nowhere: they are counted by what the manifest says.
        rows = None if entry is None else int(entry["rows"])
        count = max(1, -(-rows // group_rows)) if rows and group_rows else 1
        return [LeftOut(path.name, None, rows, count, _reason(e, path))]
    bad = []
    for group in groups:
        try:
            read_groups(schema, [group])
        except UserError as e:
            bad.append(LeftOut(path.name, group.index, group.rows, 1, _reason(e, path)))
    return bad


def _reason(e: UserError, path: Path) -> str:
    """The error without the place, which stands beside it, and without the advice."""
    text = str(e).removeprefix(str(path)).split(": ", 1)[-1]
    text = "".join(c if c.isprintable() else "?" for c in text)  # it may quote the damaged bytes
    return text.removesuffix(". Prepare the data again").removesuffix(". Prepare again")


def merge(*lists: Iterable[LeftOut]) -> list[LeftOut]:
    """What any of the lists leaves out, each row group once, in the order of the files."""
    found = {(entry.name, entry.group): entry for entries in reversed(lists) for entry in entries}
    whole = {name for name, group in found if group is None}
    kept = [e for e in found.values() if e.group is None or e.name not in whole]
    return sorted(kept, key=lambda e: (e.name, e.group or 0))


def total(found: Sequence[LeftOut]) -> int:
    """How many row groups that is."""
    return sum(entry.count for entry in found)


def counted(n: int) -> str:
    return f"{n:,} row group" + ("" if n == 1 else "s")


def describe(split: str, entry: LeftOut) -> str:
    """One of them in words."""
    what = f"{split}/{entry.name}, " + (f"row group {entry.group}" if entry.group is not None else "all of it")
    if entry.count > 1:
        what += f" ({counted(entry.count)})"
    return f"{what}: {entry.why}" + (f", {entry.rows:,} rows" if entry.rows is not None else "")
