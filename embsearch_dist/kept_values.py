"""Which values of a field have a row of their own in its table: a bit a value, and the row that each id looks up.

All other values share row 0 with the rare and unseen ones, so that a table has as many rows as values are kept, id 0
among them. In an allocation file a field's bits are text: packed, deflated, base64.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from embsearch_dist.errors import UserError


@dataclass(frozen=True)
class KeptValues:
    """The values of one field that are kept.

    Attributes:
        cardinality: ids of the field.
        bits: ``ceil(cardinality / 8)`` bytes; bit ``v % 8`` of byte ``v // 8``, lowest first, is 1 where id v is kept.
    """

    cardinality: int
    bits: bytes

    def __post_init__(self) -> None:
        if len(self.bits) != self.mask_bytes:
            raise UserError(f"{len(self.bits)} bytes of bits for {self.cardinality} values. Search again")
        if not self.bits or not self.bits[0] & 1 or self.bits[-1] >> ((self.cardinality - 1) % 8 + 1):
            raise UserError("bits that leave id 0 out, or name ids that the field lacks. Search again")

    @classmethod
    def of(cls, mask: np.ndarray) -> KeptValues:
        """From ``mask [cardinality]`` bool; id 0 is kept whatever it says."""
        kept = mask.astype(bool)
        kept[:1] = True
        return cls(len(kept), np.packbits(kept, bitorder="little").tobytes())

    @property
    def mask_bytes(self) -> int:
        """Bytes that a bit for each value takes."""
        return -(-self.cardinality // 8)

    @cached_property
    def mask(self) -> np.ndarray:
        """``[cardinality]`` bool."""
        packed = np.frombuffer(self.bits, np.uint8)
        return np.unpackbits(packed, count=self.cardinality, bitorder="little").astype(bool)

    @cached_property
    def rows(self) -> int:
        """Rows of the table: values that are kept, id 0 included."""
        return int(self.mask.sum())

    @property
    def ids(self) -> np.ndarray:
        """``[rows]`` int64: the id whose row each is; ascending, 0 first."""
        return np.flatnonzero(self.mask)

    @property
    def row_of(self) -> np.ndarray:
        """``[cardinality]`` int32: the row that each id looks up; 0 for those that are not kept."""
        return np.where(self.mask, np.cumsum(self.mask) - 1, 0).astype(np.int32)

    @property
    def digest(self) -> str:
        """Short hash, by which two choices are told apart."""
        return hashlib.sha256(self.bits).hexdigest()[:16]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"rows": self.rows, "bits": base64.b64encode(zlib.compress(self.bits, 9)).decode("ascii")}

    @classmethod
    def from_dict(cls, body: Mapping, cardinality: int) -> KeptValues:
        """What :meth:`to_dict` gave.

        Raises:
            UserError: it is not of a field of so many values.
        """
        try:
            # Never more than the field can need, whatever the text claims to hold.
            bits = zlib.decompressobj().decompress(base64.b64decode(body["bits"], validate=True), cardinality // 8 + 2)
        except (KeyError, TypeError, ValueError, zlib.error) as e:
            raise UserError(f"no bits of kept values ({e!r}). Search again") from e
        found = cls(cardinality, bits)
        if found.rows != body.get("rows"):
            raise UserError(f"{body.get('rows')} rows are told and {found.rows} are in the bits. Search again")
        return found
