"""Files of unfinished work: arrays by name, records of what is done, and proof that a file is whole."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embsearch_dist.files import read_json, temporary, write_json


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, object]:
    """Write arrays one after the other; gives the record that :class:`Arrays` needs to read them."""
    found, offset, places = hashlib.sha256(), 0, {}
    with temporary(path).open("wb") as file:
        for name, array in arrays.items():
            data = np.ascontiguousarray(array).view(np.uint8).data
            file.write(data)
            found.update(data)
            places[name] = [array.dtype.str, offset, len(array)]
            offset += array.nbytes
    temporary(path).rename(path)
    return {"bytes": offset, "sha256": found.hexdigest(), "arrays": places}


@dataclass(frozen=True)
class Arrays:
    """Arrays in a file, read one at a time."""

    path: Path
    record: dict

    def get(self, name: str) -> np.ndarray | None:
        """An array, if there is one of that name."""
        return self[name] if name in self.record["arrays"] else None

    def __getitem__(self, name: str) -> np.ndarray:
        return self.slice(name, 0, self.record["arrays"][name][2])

    def slice(self, name: str, start: int, stop: int) -> np.ndarray:
        """Some elements of an array; only they are read."""
        dtype, offset, _ = self.record["arrays"][name]
        return np.fromfile(self.path, dtype, stop - start, offset=offset + start * np.dtype(dtype).itemsize)


def save_record(path: Path, body: dict) -> None:
    """Note that something is done: written after the thing itself, whole or not at all."""
    write_json(path, body)


def load_record(path: Path) -> dict | None:
    """The note, or ``None`` when there is none."""
    return read_json(path) if path.exists() else None
