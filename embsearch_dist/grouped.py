"""The result of an instance-wise search: rows fall into groups, and each group has an allocation of its own.

``groups.json`` in a run directory; beside it ``groups/group-K`` holds the rows of group K as a prepared data set.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from embsearch_dist.allocation import RESOURCES, Allocation, check_data
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.schema import Schema

FORMAT = 1
GROUPS = "groups.json"


@dataclass(frozen=True)
class GroupedAllocation:
    """One allocation per group, for one schema.

    Attributes:
        schema: of the whole data set.
        allocations: of group 0, 1, ...; at least two.
        rows: of each group, by split.
        provenance: method, seed, ...: anything JSON can hold.
    """

    schema: Schema
    allocations: tuple[Allocation, ...]
    rows: tuple[dict[str, int], ...]
    provenance: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.allocations) < 2:
            raise UserError(f"a grouped allocation has at least two groups, got {len(self.allocations)}")
        if len(self.rows) != len(self.allocations):
            raise UserError(f"{len(self.allocations)} groups, but rows of {len(self.rows)}")

    def counted(self, extra: int) -> GroupedAllocation:
        """The same widths, counted with ``extra`` columns beside them."""
        return replace(self, allocations=tuple(a.counted(extra) for a in self.allocations))

    def total(self, resource: str) -> int:
        """Sum over groups of :meth:`Allocation.total`; what routes the rows is not in it."""
        return sum(a.total(resource) for a in self.allocations)

    def share(self, group: int, split: str = "train") -> float:
        """Share of a split's rows that are in a group; 0 when the split has none."""
        return self.rows[group].get(split, 0) / max(1, sum(r.get(split, 0) for r in self.rows))

    def save(self, path: Path) -> None:
        """Write it as JSON that a person can read."""
        groups = [
            {
                "rows": rows,
                "widths": {n: a.widths[n] for n in self.schema.names},
                "extra_columns": a.extra,
                "sizes": {r: a.total(r) for r in RESOURCES},
            }
            for a, rows in zip(self.allocations, self.rows, strict=True)
        ]
        head = {"format": FORMAT, "kind": "grouped", "dataset": self.schema.dataset, "schema": self.schema.fingerprint}
        head |= {"data": self.schema.data} if self.schema.data else {}
        write_sealed(Path(path), {**head, "groups": groups, "provenance": self.provenance})

    @classmethod
    def load(cls, path: Path | str, schema: Schema) -> GroupedAllocation:
        """Read one and check that it belongs to ``schema``.

        Raises:
            UserError: missing or broken file, or one made for another schema.
        """
        body = read_sealed(Path(path))
        try:
            if body["kind"] != "grouped":
                raise KeyError("kind")
            if body["schema"] != schema.fingerprint:
                raise UserError(
                    f"{path} was made for data set {body['dataset']!r} (schema {body['schema']}), not for "
                    f"{schema.dataset!r} (schema {schema.fingerprint}). Search again on this data, or point "
                    "--data.path to the data set it was made for"
                )
            check_data(Path(path), body, schema)
            provenance = dict(body.get("provenance", {}))
            found = tuple(
                Allocation(schema, dict(g["widths"]), provenance, int(g.get("extra_columns", 0)))
                for g in body["groups"]
            )
            rows = tuple({str(k): int(v) for k, v in g["rows"].items()} for g in body["groups"])
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{path}: not a grouped allocation ({e!r}). Run search.py again") from e
        return cls(schema, found, rows, provenance)


def group_dir(run_dir: Path, group: int) -> Path:
    """The rows of a group, as a prepared data set."""
    return Path(run_dir) / "groups" / f"group-{group}"
