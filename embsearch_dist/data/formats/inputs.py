"""The data files that a source file names: files, folders of parts and patterns, each file once."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Collection, Sequence
from pathlib import Path

from embsearch_dist.data.formats.clicks import by_name, by_path
from embsearch_dist.data.formats.opening import PARQUET, packing
from embsearch_dist.errors import UserError

PLAIN = (".csv", ".tsv", ".tab")  # .txt may be either
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "tsv", ".parquet": "parquet", ".pq": "parquet"}
PACKED = (".gz", ".gzip", ".zst", ".zstd")


def expand(source: Path, named: Sequence[str], any_name: bool) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files behind what ``files`` of a source file lists, in that order, and notes of what a folder holds else.

    A folder or pattern gives its files in the order of their names, part-2 before part-10, without those that begin
    with ``.`` or ``_`` (marks such as ``_SUCCESS``), or lie in such a folder, unless the pattern begins like
    that. A folder that fits a pattern gives its files, too.

    Args:
        source: the source file; paths are relative to it.
        named: paths of files or folders, or patterns with ``*``, ``?``, ``[...]`` or ``**``.
        any_name: whether all files of a folder are data, not only those named like data.

    Raises:
        UserError: nothing there, or a file that is named twice, by whatever path.
    """
    files: list[Path] = []
    notes: list[str] = []
    for name in named:
        path = source.parent / name
        try:
            if path.is_dir():
                found, other = _folder(source, path, any_name)
                files += found
                notes += other
            elif path.is_file():
                files.append(path)
            else:
                found, other = _pattern(source, name, path, any_name)
                files += found
                notes += other
        except OSError as e:
            raise UserError(f"{source}: files: {name!r} cannot be looked at ({e.strerror}). Check the path") from e
    seen: dict[tuple[int, int], Path] = {}
    for file in files:
        entry = file.stat()
        before = seen.setdefault((entry.st_dev, entry.st_ino), file)
        if before is not file:
            also = "" if str(before) == str(file) else f" (also as {before})"
            raise UserError(f"{source}: files: {file} is named twice{also}. Remove one")
    return tuple(files), tuple(notes)


def _folder(source: Path, folder: Path, any_name: bool) -> tuple[list[Path], list[str]]:
    entries = sorted((p for p in folder.iterdir() if p.name[0] not in "._"), key=by_name)
    inner = [p for p in entries if p.is_dir()]
    if inner:
        raise UserError(
            f"{source}: files: {folder} holds folders ({inner[0].name}, ...). Name the files by a pattern, "
            f"such as {folder.name}/*/*.parquet"
        )
    entries = [p for p in entries if p.is_file()]
    data = [p for p in entries if any_name or _is_data(p)]
    if not data:
        raise UserError(f"{source}: files: the folder {folder} holds no data files ({', '.join(sorted(SUFFIXES))})")
    return data, [f"{folder.name}/{p.name} was not read" for p in entries if p not in data]


def _is_data(path: Path) -> bool:
    return _bare(path).suffix.lower() in (*SUFFIXES, "") or packing(path) == PARQUET


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def _pattern(source: Path, name: str, path: Path, any_name: bool) -> tuple[list[Path], list[str]]:
    if not glob.has_magic(name):
        raise UserError(f"{source}: files: {path} does not exist. Paths are relative to the source file")
    wanted = Path(name).parts
    fitting = {Path(p) for p in glob.glob(name, root_dir=source.parent, recursive=True)}
    found = {source.parent / p for p in fitting if shown(wanted, p.parts)}
    files = {p for p in found if p.is_file()}
    folders = [] if wanted[-1] == "**" else _to_be_read(found, files)
    if not files and not folders:
        raise UserError(f"{source}: files: no file fits the pattern {name!r}. Patterns are relative to the source file")
    read: list[Path] = []
    notes: list[str] = []
    for entry in sorted([*files, *folders], key=by_path):
        inside, other = ([entry], []) if entry in files else _folder(source, entry, any_name)
        read += inside
        notes += other
    return read, notes


def shown(wanted: Sequence[str], found: Sequence[str]) -> bool:
    """Whether a path fits a pattern, part by part, so that parts begin with . or _ only where the pattern's do.

    >>> shown(("**", "*.csv"), ("days", "1.csv")), shown(("**", "*.csv"), ("_old", "1.csv"))
    (True, False)
    """
    if not wanted or not found:
        return not found and all(part == "**" for part in wanted)
    seen = found[0][0] not in "._" or found[0][0] == wanted[0][0]
    if wanted[0] == "**":
        return shown(wanted[1:], found) or (seen and shown(wanted, found[1:]))
    fits = seen and fnmatch.fnmatch(found[0], wanted[0]) if glob.has_magic(wanted[0]) else found[0] == wanted[0]
    return fits and shown(wanted[1:], found[1:])


def _to_be_read(found: Collection[Path], files: Collection[Path]) -> list[Path]:
    """Of what fits a pattern the folders that hold something, but nothing that fits it itself."""
    read = {folder for file in files for folder in file.parents}
    folders = [p for p in found if p.is_dir() and p not in read]
    outer = [p for p in folders if not any(q in folders for q in p.parents)]
    return [p for p in outer if any(inner.name[0] not in "._" for inner in p.iterdir())]


def format_of(source: Path, files: Sequence[Path], likely: str = "") -> str:
    """``csv``, ``tsv`` or ``parquet``: what all files are, by their first bytes, else their names.

    Args:
        likely: what files are whose names do not tell; empty: .txt is tsv, and others cannot be told.

    Raises:
        UserError: one that cannot be told, or two that differ.
    """
    formats = []
    for file in files:
        kind = packing(file)
        suffix = _bare(file).suffix.lower()
        if kind == PARQUET:
            formats.append(PARQUET)
        elif likely in ("csv", "tsv") and suffix not in PLAIN:
            formats.append(likely)
        elif suffix in SUFFIXES:
            formats.append(SUFFIXES[suffix])
        else:
            raise UserError(
                f"{source}: cannot tell the format of {file.name!r}. Name it .csv, .tsv or .parquet, or add "
                "`format: csv`, tsv or parquet to the source file"
            )
    differs = next((k for k, f in enumerate(formats) if f != formats[0]), None)
    if differs is not None:
        raise UserError(
            f"{source}: files: {files[0].name} is {formats[0]}, but {files[differs].name} is {formats[differs]}. "
            "Give files of one format, or say `format:`"
        )
    return formats[0]
