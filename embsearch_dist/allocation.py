"""The result of a dimension search: field -> width. A small JSON file a person can read.

Widths are *nominal* (what the method counts, 0 = the field is dropped). FBGEMM needs local widths
divisible by 4, so a table is stored at the *physical* width: the next multiple of 4. Both are counted.
Where every value has a first-order weight of its own (``model.first_order value``), its column is counted too.
A search may keep rows for some of a field's values alone: its table then has these rows, see
:mod:`embsearch_dist.kept_values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.precision import MIXED, PRECISIONS, SERVED, row_bytes, served
from embsearch_dist.schema import Field, Schema, differs

if TYPE_CHECKING:
    from torch.nn import EmbeddingBag
    from torchrec.modules.embedding_configs import EmbeddingBagConfig

FORMAT = 1
REFERENCE_WIDTH = 32  # P-R and "%" budgets are relative to UES-32
BYTES_PER_PARAMETER = 4
RESOURCES = ("widths", "parameters", "bytes", *SERVED)


def physical_width(width: int) -> int:
    """Columns that are allocated for a nominal width: the next multiple of 4, 0 for a dropped field."""
    return (width + 3) // 4 * 4


def cost(resource: str, cardinality: int, width: int, extra: int = 0) -> int:
    """What one table costs: its ``widths`` (columns of the embedding), nominal ``parameters``, physical ``bytes`` of
    training, or ``served_fp32``, ``served_fp16``, ``served_int8``, ``served_int4``: bytes as it is served.

    ``extra``: columns beside the width, which a dropped field lacks; all but widths count them.
    """
    columns = width + extra if width else 0
    if resource == "widths":
        return width
    if resource == "parameters":
        return cardinality * columns
    if resource == "bytes":
        return cardinality * physical_width(columns) * BYTES_PER_PARAMETER
    if resource in SERVED:
        return cardinality * row_bytes(columns, resource.removeprefix("served_"))
    raise UserError(f"resource {resource!r} is none of {', '.join(RESOURCES)}")


@dataclass(frozen=True)
class Allocation:
    """Widths per field for one schema, with where they came from.

    Attributes:
        schema: the schema the widths belong to.
        widths: field name -> nominal width >= 0, for every field of the schema.
        provenance: method, seed, budget, score, ...: anything JSON can hold.
        extra: columns that each kept field's table has beside its width; the config that a model is built with says
            how many (``ModelConfig.extra``), see :meth:`counted`.
        precisions: field -> the precision that its table is to be served at, where the search has chosen one.
        features: table -> the features that look up in it, where they are not called as the table (tables of a user's
            own model, see :func:`embsearch_dist.library.widths.search_widths`).
        values: field -> the values that have a row of their own, where that is not all of them.
    """

    schema: Schema
    widths: dict[str, int]
    provenance: dict[str, object] = field(default_factory=dict)
    extra: int = 0
    precisions: dict[str, str] = field(default_factory=dict)
    features: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, KeptValues] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = set(self.schema.names)
        for name, precision in self.precisions.items():
            if name not in known or precision not in PRECISIONS:
                options = ", ".join(PRECISIONS)
                raise UserError(f"allocation, field {name!r}: precision must be one of {options}, got {precision!r}")
        for name in self.features:
            if name not in known:
                raise UserError(f"allocation: features of {name!r}, which is no field of it")
        cardinality = {f.name: f.cardinality for f in self.schema.fields}
        for name, kept in self.values.items():
            if cardinality.get(name) != kept.cardinality:
                raise UserError(
                    f"allocation: kept values of {name!r}, a field of {kept.cardinality:,} values; the data have "
                    f"{cardinality.get(name, 0):,} of it. Search again on these data"
                )
        for name, width in self.widths.items():
            if name not in known:
                raise UserError(f"allocation names field {name!r}, which data set {self.schema.dataset!r} lacks")
            if not isinstance(width, int) or isinstance(width, bool) or width < 0:
                raise UserError(f"allocation, field {name!r}: width must be a whole number >= 0, got {width!r}")
        missing = [n for n in self.schema.names if n not in self.widths]
        if missing:
            raise UserError(f"allocation lacks a width for field {missing[0]!r} (write 0 to drop a field)")
        if not any(self.widths.values()):
            raise UserError("allocation drops every field: at least one width must be above 0")

    @classmethod
    def uniform(cls, schema: Schema, width: int) -> Allocation:
        """UES: the same width for every field, the baseline of every report."""
        return cls(schema, dict.fromkeys(schema.names, width), {"method": "ues", "name": f"ues-{width}"})

    def counted(self, extra: int) -> Allocation:
        """The same widths, counted with ``extra`` columns beside them."""
        return replace(self, extra=extra)

    def columns(self, name: str) -> int:
        """Physical columns of a field's table; 0 where it is dropped."""
        return physical_width(self.widths[name] + self.extra) if self.widths[name] else 0

    def rows(self, name: str) -> int:
        """Rows of a field's table: its values, or those of them that are kept."""
        if name in self.values:
            return self.values[name].rows
        return next(f.cardinality for f in self.schema.fields if f.name == name)

    @property
    def kept(self) -> list[str]:
        """Names of the fields with a width above 0, in schema order."""
        return [n for n in self.schema.names if self.widths[n]]

    def precision_of(self, name: str, precision: str) -> str:
        """The precision of a field's table where all are served at ``precision``: its own if that is ``mixed``."""
        return self.precisions.get(name, "int8") if precision == MIXED else precision

    def total(self, resource: str) -> int:
        """Sum over fields of one of :data:`RESOURCES`; see :func:`cost`. Bytes as served count a bit for each value of
        a field of which not all are kept."""
        own = dict.fromkeys(self.schema.names, resource)
        if resource == served(MIXED) and self.precisions:
            own = {n: served(self.precision_of(n, MIXED)) for n in self.schema.names}
        rows = {f.name: f.cardinality for f in self.schema.fields} | {n: k.rows for n, k in self.values.items()}
        found = sum(cost(own[n], rows[n], self.widths[n], self.extra) for n in self.schema.names)
        return found + sum(k.mask_bytes for n, k in self.values.items() if own[n] in SERVED and self.widths[n])

    def reduction(self, reference_width: int = REFERENCE_WIDTH) -> float:
        """P-R: share of nominal embedding parameters saved against the uniform reference width."""
        return 1 - self.total("parameters") / ((reference_width + self.extra) * sum(self.schema.cardinalities))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """TorchRec's configuration of each kept field's table, at its nominal width, named as the field. Where a field
        is among :attr:`values`, ids are rows only behind its ``values[NAME].row_of``.

        >>> from torchrec import EmbeddingBagCollection
        >>> configs = Allocation.load("runs/my/allocation.json").embedding_bag_configs()
        >>> tables = EmbeddingBagCollection(tables=configs)
        """
        from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

        return [
            EmbeddingBagConfig(
                name=f.name,
                embedding_dim=self.widths[f.name],
                num_embeddings=self.rows(f.name),
                feature_names=list(self.features.get(f.name, [f.name])),
                pooling=PoolingType.MEAN if f.pooling == "mean" else PoolingType.SUM,
            )
            for f in self.schema.fields
            if self.widths[f.name]
        ]

    def to_torch(self) -> dict[str, EmbeddingBag]:
        """A plain ``torch.nn.EmbeddingBag`` of each kept field, ``[rows, width]``, new and untrained; rows are its
        values, or those of them that are kept (:attr:`values`).

        >>> from torch.nn import ModuleDict
        >>> tables = ModuleDict(Allocation.load("runs/my/allocation.json").to_torch())
        """
        from torch.nn import EmbeddingBag

        fields = [f for f in self.schema.fields if self.widths[f.name]]
        return {f.name: EmbeddingBag(self.rows(f.name), self.widths[f.name], mode=f.pooling or "sum") for f in fields}

    def save(self, path: Path) -> None:
        """Write the allocation as JSON, sizes included for the reader's eye."""
        write_sealed(
            Path(path),
            {
                "format": FORMAT,
                "dataset": self.schema.dataset,
                "schema": self.schema.fingerprint,
                **({"data": self.schema.data} if self.schema.data else {}),
                "fields": [f.to_dict() for f in self.schema.fields],
                "dense": list(self.schema.dense),
                "widths": {n: self.widths[n] for n in self.schema.names},
                "extra_columns": self.extra,
                **({"precisions": self.precisions} if self.precisions else {}),
                **({"features": self.features} if self.features else {}),
                **({"values": {n: k.to_dict() for n, k in self.values.items()}} if self.values else {}),
                "sizes": {r: self.total(r) for r in RESOURCES} | {"P-R": round(self.reduction(), 4)},
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, path: Path | str, schema: Schema | None = None) -> Allocation:
        """Read an allocation and check that it belongs to ``schema``.

        Args:
            schema: None: the one that the file itself tells, for use away from the data.

        Raises:
            UserError: missing, broken or changed file, or an allocation made for another schema or from other data.
        """
        body = read_sealed(Path(path))
        widths = body.get("widths")
        if not isinstance(widths, Mapping):
            raise UserError(f'{path}: not an allocation: key "widths" (field -> width) is missing')
        schema = schema or _own_schema(Path(path), body)
        if body.get("schema") != schema.fingerprint:
            different = sorted(set(widths) ^ set(schema.names))
            detail = f"field {different[0]!r} is in only one of them" if different else "the cardinalities differ"
            raise UserError(
                f"{path} was made for data set {body.get('dataset')!r} (schema {body.get('schema')}), not for "
                f"{schema.dataset!r} (schema {schema.fingerprint}): {detail}. Search again on this data, "
                "or point --data.path to the data set the allocation was made for"
            )
        check_data(Path(path), body, schema)
        try:
            extra, precisions = int(body.get("extra_columns", 0)), dict(body.get("precisions", {}))
            features = {str(name): [str(f) for f in own] for name, own in dict(body.get("features", {})).items()}
            values = _values(body.get("values", {}), schema)
            return cls(schema, dict(widths), dict(body.get("provenance", {})), extra, precisions, features, values)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e
        except (TypeError, ValueError, OverflowError) as e:
            raise UserError(f"{path}: not an allocation ({e}). Run search.py again") from e


def _values(body: Mapping, schema: Schema) -> dict[str, KeptValues]:
    """The kept values that an allocation file tells."""
    cardinality = {f.name: f.cardinality for f in schema.fields}
    return {name: KeptValues.from_dict(own, cardinality.get(name, 0)) for name, own in dict(body).items()}


def _own_schema(path: Path, body: Mapping) -> Schema:
    """What an allocation file says of the fields it is for."""
    try:
        fields = tuple(Field(**f) for f in body["fields"])
        return Schema(str(body["dataset"]), fields, tuple(body["dense"]), data=str(body.get("data", "")))
    except (KeyError, TypeError) as e:
        raise UserError(
            f"{path} does not say how many values its fields have ({e!r}): an older version wrote it. Give the schema "
            "beside it: Allocation.load(PATH, Schema.load(RUN))"
        ) from e


def check_data(path: Path, body: Mapping, schema: Schema) -> None:
    """Refuse widths that were found on other data than ``schema`` is of, where both are known."""
    if differs(str(body.get("data", "")), schema.data):
        raise UserError(
            f"{path} was made from data {body['data']}, this is {schema.data}: the same fields, but other rows or ids. "
            'Search again, or take the lines "data" and "sha256" out of the file to use its widths here all the same'
        )
