"""What a data source is: rows of three splits that can be read by number."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from embsearch_dist.schema import Schema


@runtime_checkable
class DataSource(Protocol):
    """Rows of one's own: a table in memory, a client of a feature store, files of another form.

    Order, shuffling, batches, shares of ranks and resuming are not a source's task: they follow from row numbers, as
    they do for prepared shards. So a source has no state but its fingerprint, and it must be able to read any range of
    rows again. Rows that can only be iterated are read once: into memory by
    :class:`~embsearch_dist.data.sources.arrays.ArraySource`, or into files by ``launch/prepare.py``.

    With several ranks every rank opens the source and reads the same ranges; it trains on its share of each batch.

    Attributes:
        schema: fields with their numbers of ids, and the dense columns. Its ``rows`` and ``data`` are filled in.
        fingerprint: a short text that is another one whenever rows have changed (a version, a snapshot's name, a hash).
            A run that was begun with other rows is refused by it.
    """

    @property
    def schema(self) -> Schema: ...

    @property
    def fingerprint(self) -> str: ...

    def rows(self, split: str) -> int:
        """Rows of ``train``, ``validation`` or ``test``; at least one each."""
        ...

    def read(self, split: str, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop - 1`` of a split, always the same ones in the same order.

        Returns:
            A mapping, a pandas or polars frame, or a pyarrow table of ``stop - start`` rows: ``label`` (0 or 1), every
            field (whole numbers, ``0 <= id < cardinality``; of a list field a list a row, and its weights in
            ``"NAME weights"``), every dense column (finite numbers). More columns may be there.
        """
        ...
