"""The model directory: everything that a model needs to answer, and nothing else.

    model.json             kind, widths or groups, settings of the model, precision, figures, versions
    schema.json            fields, cardinalities, dense columns
    source.json            how raw rows are read; mean and deviation of the dense columns
    vocabulary/FIELD.parquet    value, id, count of the fields that the model looks at
    tables.safetensors     embedding tables, at the precision of the export
    dense.safetensors      everything else, float32
    allocation.json, groups.json, architecture.json, evaluation.json    as the training left them, where it did
    model.pt2, model.onnx, model.aoti.pt2, triton/    programs, as many as were asked for
    README.md              the model card
    checksums.json         size and SHA-256 of every other file; the mark by which the directory is known as ours

It appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from embsearch_dist.data.formats.described import Description
from embsearch_dist.data.prepare.partial import whole_directory
from embsearch_dist.data.prepare.vocabulary import VOCABULARY, file_name
from embsearch_dist.errors import UserError
from embsearch_dist.files import digest, read_json, read_sealed, write_sealed
from embsearch_dist.schema import Schema
from embsearch_dist.serving.model import build, fill

FORMAT = 1
MODEL, SOURCE, CHECKSUMS = "model.json", "source.json", "checksums.json"
TABLES, DENSE = "tables.safetensors", "dense.safetensors"
MARK = "embsearch_dist model"
AGAIN = "Copy the directory again, or export the model again"
PROGRAMS = ("model.pt2", "model.onnx", "model.aoti.pt2", "triton")


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory whose files were compared with their checksums.

    Attributes:
        path: of the directory.
        body: ``model.json``.
        schema: fields and dense columns.
        source: how raw rows are read.
        scale: mean and standard deviation of each dense column.
        seal: checksum of its list of checksums, which no other model has.
    """

    path: Path
    body: Mapping[str, Any]
    schema: Schema
    source: Description
    scale: Mapping[str, tuple[float, float]]
    seal: str

    def check_seal(self, wanted: str = "") -> None:
        """Whether the directory still holds the model that it held when it was opened, and ``wanted``, if that is
        given: files that are read one after the other must not be of two exports.

        Raises:
            UserError: it holds another one.
        """
        if not _seal_of(self.path) == self.seal == (wanted or self.seal):
            raise UserError(f"{self.path}: another model was put there while it was read. Start again")

    @property
    def batch_rows(self) -> int:
        """Rows of a batch in evaluation; with others the last digits may differ."""
        return int(self.body["batch_rows"])

    @property
    def fields(self) -> list[str]:
        """Names of the fields that the model looks at, in schema order."""
        return list(self.body["fields"])

    @property
    def columns(self) -> frozenset[str]:
        """Names of all columns that are read: those fields, and the dense columns."""
        return frozenset([*self.fields, *self.schema.dense])

    def model(self) -> Any:
        """The model with its weights, on the CPU.

        Raises:
            UserError: the files do not fit together.
        """
        try:
            made = build(self.body, self.schema, self.path)
            filled = fill(made, self.body, load_arrays(self.path / TABLES), load_arrays(self.path / DENSE))
            self.check_seal()
            return filled
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
            self.check_seal()
            told = " ".join(str(e).split())[:200]
            raise UserError(f"{self.path}: its files do not fit together ({type(e).__name__}: {told}). {AGAIN}") from e

    def vocabulary(self, field: str) -> pl.Series:
        """The values of a field with ids 1, 2, ... in their order."""
        path = self.path / VOCABULARY / file_name(field)
        try:
            found = pl.read_parquet(path, columns=["value"])["value"].rechunk()
            self.check_seal()
            return found
        except (OSError, pl.exceptions.PolarsError) as e:
            raise UserError(f"{path}: cannot be read ({' '.join(str(e).split())[:100]}). {AGAIN}") from e


def open_directory(path: Path | str, checked: bool = False) -> ModelDirectory:
    """Read a model directory.

    Args:
        checked: its files were compared with the checksums just now, by another process.

    Raises:
        UserError: it is none, a file is missing, damaged or too many, or it is of a later version.
    """
    path = Path(path)
    if not (path / CHECKSUMS).is_file():
        raise UserError(f"{path}: not a model directory ({CHECKSUMS} is missing). Make one: launch/export.py --help")
    seal = _seal_of(path)
    if not checked:
        verify(path)
    body, described = read_json(path / MODEL), read_json(path / SOURCE)
    try:
        if body["format"] > FORMAT:
            raise UserError(
                f"{path}: a model directory of format {body['format']}, this version reads {FORMAT}. Update"
            )
        scale = {str(n): (float(s["mean"]), float(s["std"])) for n, s in described["dense"].items()}
        source = Description.of(described, str(path / SOURCE))
        missing = [key for key in ("kind", "precision", "name", "batch_rows", "model") if key not in body]
        unknown = [n for n in (*body["fields"], *scale) if n not in {c.name for c in source.columns}]
        if missing or unknown:
            raise KeyError((missing + unknown)[0])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: not a model directory of format {FORMAT} ({e!r}). {AGAIN}") from e
    found = ModelDirectory(path, body, Schema.load(path), source, scale, seal)
    found.check_seal()
    return found


def _seal_of(path: Path) -> str:
    return str(read_json(path / CHECKSUMS).get("sha256", ""))


def is_ours(path: Path) -> bool:
    """Whether an export made this directory."""
    try:
        return read_json(path / CHECKSUMS).get("kind") == MARK
    except UserError:
        return False


@contextmanager
def new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which becomes ``out`` with its checksums when the block ends without an error.

    Raises:
        UserError: ``out`` exists and may not be replaced, or is not ours.
    """
    if out.exists() or out.is_symlink():
        empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
        if not empty and (out.is_symlink() or not is_ours(out)):
            raise UserError(f"--out {out} exists and is not a model directory: it is left alone. Give another --out")
        if not empty and not overwrite:
            raise UserError(f"--out {out} exists. Give another --out, or --overwrite to replace the model in it")
    with whole_directory(out, overwrite=True, other=lambda directory: None) as partial:
        yield partial
        write_checksums(partial)


def write_checksums(directory: Path) -> None:
    """Leave ``checksums.json`` over all files below."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in (CHECKSUMS, "PREPARING"))
    found = {str(p.relative_to(directory)): digest(p) for p in files}
    write_sealed(directory / CHECKSUMS, {"kind": MARK, "format": FORMAT, "files": found})


def verify(directory: Path) -> int:
    """Compare every file with ``checksums.json``; gives their number.

    Raises:
        UserError: names the first one that is missing, damaged or unknown.
    """
    body = read_sealed(directory / CHECKSUMS, AGAIN)
    try:
        known = dict(body["files"])
        for name, entry in known.items():
            file = directory / name
            try:
                found = digest(file) if file.stat().st_size == entry["bytes"] else {}
            except OSError as e:
                raise UserError(f"{file}: cannot be read ({e.strerror}). {AGAIN}") from e
            if found.get("sha256") != entry["sha256"]:
                raise UserError(f"{file}: damaged: it is not the file that {CHECKSUMS} describes. {AGAIN}")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{directory / CHECKSUMS}: not a list of checksums ({e!r}). {AGAIN}") from e
    more = next((p for p in sorted(directory.rglob("*")) if _is_foreign(p, directory, known)), None)
    if more is not None:
        raise UserError(f"{more}: not in {CHECKSUMS}, so it is no part of the model. Remove it")
    return len(known)


def _is_foreign(path: Path, directory: Path, known: Mapping[str, Any]) -> bool:
    name = str(path.relative_to(directory))
    return path.is_file() and name != CHECKSUMS and name not in known


def save_arrays(path: Path, arrays: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        UserError: the package is missing, or the file cannot be written.
    """
    module = _safetensors()
    path.touch()
    mode = path.stat().st_mode  # what the user's umask gives; the package leaves files that only their owner can read
    try:
        module.save_file({name: x.detach().contiguous() for name, x in arrays.items()}, str(path))
    except Exception as e:  # the package has an error type of its own, which is no OSError
        raise UserError(f"{path.name} cannot be written ({' '.join(str(e).split())[:120]}). Check disk and path") from e
    path.chmod(mode)


def load_arrays(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; pages are shared with other processes that read it.

    Raises:
        ValueError: it cannot be read. UserError: the package is missing.
    """
    module = _safetensors()
    try:
        return dict(module.load_file(str(path)))
    except Exception as e:  # the package has an error type of its own, which is no ValueError
        raise ValueError(f"{path.name}: {e}") from e


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as e:
        raise UserError("the package safetensors is missing. Install it: pip install 'embsearch_dist[serve]'") from e
    return safetensors.torch
