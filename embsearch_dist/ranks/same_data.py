"""All ranks read the same data, or none does: compared before a split is read, and what cannot be read is agreed on.

Ranks that saw other rows, or left out others, would train on batches that do not belong together, or wait for
batches that never come. Ranks may read copies of the data on their own machines, so each copy is looked at.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embsearch_dist.config.settings import fingerprint
from embsearch_dist.data.store.manifest import shards_of
from embsearch_dist.data.store.shards import LeftOut, Shards, SplitRows
from embsearch_dist.data.store.unreadable import counted, describe, find, merge, names_of, size_of, total
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema

RECORD = "unreadable.json"
SHOWN = 3


def check_same(context: Context, prepared_dir: Path | str, seen: dict[str, str]) -> None:
    """Raise on all ranks when one of them has ``seen`` something else: key -> value, both for people.

    Raises:
        UserError: names the first rank that differs from rank 0, and what differs.
    """
    digests = context.every(fingerprint(seen))
    if len(set(digests)) == 1:
        return
    every = context.every((f"{socket.gethostname()}, {prepared_dir}", seen))
    rank = next(r for r, digest in enumerate(digests) if digest != digests[0])
    (_, ours), (where, theirs) = every[0], every[rank]
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    told = [f"{k}: {theirs.get(k, 'none')} there, {ours.get(k, 'none')} on rank 0" for k in keys[:SHOWN]]
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    raise _everywhere(
        f"rank {rank} ({where}) sees other data than rank 0: {'; '.join(told)}{more}. "
        "Every rank must read the same prepared data: copy it again, or use a folder that all share"
    )


def seen_in_schema(schema: Schema) -> dict[str, str]:
    """What ranks must agree on of ``schema.json``."""
    fields = {}
    for field in schema.fields:
        told = [f"{key} {value}" for key, value in dataclasses.asdict(field).items() if key != "name"]
        fields[f"field {field.name!r}"] = ", ".join(told)
    rows = {f"rows of the {split} split": f"{n:,}" for split, n in schema.rows.items()}
    order = {"order of the fields": ", ".join(schema.names), "dense columns": ", ".join(schema.dense)}
    return {"data set": schema.dataset} | fields | rows | order | {"identity": schema.data}


def seen_in_shards(shards: SplitRows) -> dict[str, str]:
    """What ranks must agree on of the shards of a split: their row groups, and their checksums or sizes. The rows of a
    data source are in the schema's identity."""
    if not isinstance(shards, Shards):
        return {}
    known, _ = shards_of(shards.directory.parent, shards.split)
    sizes: dict[Path, list[int]] = {}
    for group in shards.groups:
        sizes.setdefault(group.path, []).append(group.rows)
    found = {}
    for path, rows in sizes.items():
        if path.name in known:
            mark = f"SHA-256 {known[path.name]['sha256'][:12]} in manifest.json"
        else:
            mark = f"{size_of(path):,} bytes"
        text = f"{sum(rows):,} rows in {counted(len(rows))} ({fingerprint(rows)[:6]}), {mark}"
        found[f"{shards.split}/{path.name}"] = text
    return found


def agree_on_left_out(
    context: Context, prepared_dir: Path | str, schema: Schema, split: str, limit: int, run_dir: Path, training: bool
) -> list[LeftOut]:
    """The row groups of a split that no rank shall read; the same list on every rank.

    What a run has left out before (``unreadable.json`` in its directory) stays left out, whether it can be read
    again or not, since the order of samples depends on it. With ``limit`` 0 nothing is looked for.

    Args:
        limit: ``data.skip_unreadable``: at most so many row groups, in all splits of the run.
        training: the order of this split matters.

    Raises:
        UserError: there are more than that; or what the run left out before was of other data.
    """
    with context.together(f"reading {RECORD}"):
        record = _read_record(run_dir, schema, training) if context.rank == 0 else None
    record = context.share(record)
    assert record is not None
    saved = [LeftOut(**entry) for entry in record["splits"].get(split, [])]
    found, changed = _find(context, prepared_dir, schema, split) if limit else ([], [])
    both = merge(saved, found)
    others = sum(entry["count"] for name, entries in record["splits"].items() if name != split for entry in entries)
    if both and total(both) + others > limit:
        told = "; ".join(describe(split, entry) for entry in both[:SHOWN])
        more = f" and {len(both) - SHOWN} more" if len(both) > SHOWN else ""
        before = f" {run_dir / RECORD} lists what this run has left out so far." if record["splits"] else ""
        other = f" and {others} of other splits" if others else ""
        raise _everywhere(
            f"{prepared_dir}: {counted(total(both))}{other} cannot be read, data.skip_unreadable allows {limit}: "
            f"{told}{more}.{before} Prepare the data again, or raise data.skip_unreadable"
        )
    if limit:
        context.first(f"writing {RECORD}", lambda: _settle(split, schema, run_dir, record, both, found, changed))
    return both


def _find(context: Context, prepared_dir: Path | str, schema: Schema, split: str) -> tuple[list[LeftOut], list[str]]:
    """What cannot be read in any rank's copy of a split, and the files that are not those of the manifest.

    Ranks that see the same folder share the work.
    """
    folder = Path(prepared_dir) / split
    host = socket.gethostname()
    place = [host, *_identity(folder, context.rank)]
    places = context.every(place)
    mates = [r for r, other in enumerate(places) if other == place]
    from embsearch_dist.data.prepare.progress import Progress  # it needs polars, which a training does not

    found: list[LeftOut] = []
    changed: list[str] = []
    with context.together(f"looking for unreadable row groups of the {split} split"):
        names = names_of(prepared_dir, split)[mates.index(context.rank) :: len(mates)]
        size = sum(size_of(folder / name) for name in names)
        with Progress(f"checking the {split} shards", size, "bytes", quiet=context.rank > 0) as bar:
            found, changed = find(prepared_dir, schema, split, names, bar.add)
        if len(mates) < len(places):
            where = f" on {host} in {prepared_dir}"
            found = [dataclasses.replace(entry, why=entry.why + where) for entry in found]
    every = context.every(([dataclasses.asdict(entry) for entry in found], changed))
    lists = [[LeftOut(**entry) for entry in entries] for entries, _ in every]
    return merge(*lists), sorted({name for _, names in every for name in names})


def _identity(folder: Path, rank: int) -> list[int]:
    """The same for two paths of one machine that lead to one folder."""
    try:
        return [folder.stat().st_dev, folder.stat().st_ino]
    except OSError:
        return [rank]  # it is not there: no other rank can look in its place


def _read_record(run_dir: Path, schema: Schema, training: bool) -> dict[str, Any]:
    plain = dataclasses.asdict(schema)
    del plain["data"]  # older versions did not know it
    path, data = run_dir / RECORD, fingerprint(plain)
    fresh = {"data": data, "splits": {}, "foreign": False}
    if not path.exists():
        return fresh
    body = read_sealed(path)
    try:
        splits = {k: [dataclasses.asdict(LeftOut(**e)) for e in entries] for k, entries in body["splits"].items()}
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not as it was written ({e!r}). Delete it; the order of samples may change") from e
    if body.get("data") == data:
        return fresh | {"splits": splits}
    if training:
        raise UserError(f"{path} was written for other data. Use another run directory, or the data it was begun with")
    return fresh | {"foreign": True}  # a model measured on other data: what was left out there says nothing here


def _settle(
    split: str,
    schema: Schema,
    run_dir: Path,
    record: dict[str, Any],
    both: Sequence[LeftOut],
    found: Sequence[LeftOut],
    changed: Sequence[str],
) -> None:
    """Say what is left out and note it in the run directory. Rank 0 calls this."""
    saved = [LeftOut(**entry) for entry in record["splits"].get(split, [])]
    for name in changed:
        print(f"{split}/{name} is not the file of manifest.json, but all of it can be read: used", flush=True)
    if not both:
        return
    rows = [entry.rows for entry in both]
    lost = f"{sum(n or 0 for n in rows):,}{' or more' if None in rows else ''} of {schema.rows[split]:,} rows"
    print(f"{split} split: left out because it cannot be read: {counted(total(both))}, {lost}", flush=True)
    now = {(entry.name, entry.group) for entry in found} | {(entry.name, None) for entry in found}
    for entry in both:
        print(f"  {describe(split, entry)}", flush=True)
        if (entry.name, entry.group) not in now:
            print("    it can be read again, but stays left out, so that the order of samples stays as it was")
    before = {(entry.name, entry.group) for entry in saved}
    if before != {(entry.name, entry.group) for entry in both} and any(run_dir.glob("checkpoints/*/step-*")):
        print(
            f"  NOTE: this run has trained before with another list. From here on the {split} split is read in another "
            "order and has fewer rows: of the epoch that is continued, some rows may come twice and others not at all, "
            "and metrics before and after are of different rows",
            flush=True,
        )
    if not record["foreign"]:
        splits = record["splits"] | {split: [dataclasses.asdict(entry) for entry in both]}
        write_sealed(run_dir / RECORD, {"data": record["data"], "splits": splits})


def _everywhere(text: str) -> UserError:
    """An error that every rank finds by itself, from the same figures."""
    return UserError(text, everywhere=True)
