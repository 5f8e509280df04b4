"""A run: its config, its data, its place among the ranks; and how its data are opened."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from embsearch_dist.config.sections import Config, S
from embsearch_dist.data.load.classes import Classes, count_classes
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.store.manifest import MANIFEST, compare_ends, identity
from embsearch_dist.data.store.shards import LeftOut, SplitRows
from embsearch_dist.data.store.unreadable import refuse_others
from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import Context
from embsearch_dist.ranks.same_data import agree_on_left_out, check_same, seen_in_schema, seen_in_shards
from embsearch_dist.schema import Schema
from embsearch_dist.stores.places import bring_data


@dataclass(frozen=True)
class Run(Generic[S]):
    """One run: its config, its data and its place among the ranks."""

    config: Config[S]
    schema: Schema
    context: Context

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    def stream(self, split: str, batch_size: int, shuffle: bool, seed: int | None = None) -> BatchStream:
        """Batches of a split for this rank; opening it fails on all ranks or on none.

        Raises:
            UserError: the split cannot be read (but for ``data.skip_unreadable`` row groups), or ranks see
                different data.
        """
        data, context = self.config.data, self.context
        check_same(context, data.place, seen_in_schema(self.schema))
        if data.source:
            from embsearch_dist.data.sources.registry import open_split

            with context.together(f"opening the {split} split"):
                return self._batches(open_split(data, self.schema, split), split, batch_size, shuffle, seed)
        left_out = agree_on_left_out(
            context, data.path, self.schema, split, data.skip_unreadable, self.dir, training=shuffle
        )
        with context.together(f"opening the {split} split"):
            stream = self._batches(data.path, split, batch_size, shuffle, seed, left_out)
        check_same(context, data.path, seen_in_shards(stream.shards))
        if not data.skip_unreadable:  # else their SHA-256 were compared, and what differs was named
            with context.together(f"comparing the {split} split with its manifest"):
                refuse_others(data.path, self.schema, split)
        return stream

    def _batches(
        self,
        rows_of: str | SplitRows,
        split: str,
        batch_size: int,
        shuffle: bool,
        seed: int | None,
        left_out: Sequence[LeftOut] = (),
    ) -> BatchStream:
        return BatchStream(
            rows_of,
            self.schema,
            split,
            global_batch=batch_size,
            rank=self.context.rank,
            world_size=self.context.world_size,
            shuffle=shuffle,
            seed=self.config.run.seed if seed is None else seed,
            window_rows=self.config.data.window_rows,
            left_out=left_out,
            device=self.context.device,
        )


def open_data(config: Config, context: Context) -> Schema:
    """The schema of the run's data; fetches them where ``data.path`` is a URL, and makes the synthetic data on rank 0
    when the config asks for it. Of a data source it has the source's rows and identity.

    Raises:
        UserError: there is no such data set or source, or it is not whole; on all ranks.
    """
    if config.data.source:
        from embsearch_dist.data.sources.registry import open_source, schema_of

        with context.together("opening the data source"):
            return schema_of(open_source(config.data))
    bring_data(config, context)
    path = Path(config.data.path)
    if config.data.make == "synthetic":
        from embsearch_dist.data.planted.synthetic import make_synthetic

        def make() -> None:
            if not (path / "schema.json").exists():
                make_synthetic(path, config.data.rows, 0)

        context.first("making synthetic data", make)
    with context.together("reading the schema"):
        schema = Schema.load(path)
        if (path / "vocabulary").is_dir():
            compare_ends(path, "vocabulary")
        if context.rank == 0 and not (path / MANIFEST).exists():
            print(f"{path / MANIFEST} is missing: the files there are compared with nothing", file=sys.stderr)
        found = identity(path, schema)
    return dataclasses.replace(schema, data=found)


def check_classes(run: Run, needed: str = "", splits: Sequence[str] = ("validation",)) -> None:
    """Say, before anything is trained, what becomes of AUC in splits that have one class only.

    Args:
        needed: :meth:`Method.needs_classes` of a search. It is refused: no other reward is put in the place of AUC
            unasked, because rows of one class reward whatever answers that class to everything.

    Raises:
        UserError: the validation split has one class, and both are ``needed``.
    """
    found: list[Classes] = []
    with run.context.together("counting the clicks"):
        if run.context.rank == 0:
            found = [_classes(run, split) for split in splits]
    for classes in (c for c in run.context.share(found) if c.one and c.rows):
        if classes.split == "validation" and needed:
            spread = run.schema.provenance.get("split") == "random"
            cure = "more rows" if spread else "another --split (random spreads the clicks)"
            raise UserError(
                f"{classes.said}: AUC is undefined, and {needed}. Prepare the data again with {cure}", everywhere=True
            )
        then = "logloss selects the best checkpoint" if classes.split == "validation" else "it is written as null"
        if run.context.rank == 0:
            print(f"{classes.said}: AUC is undefined; {then}", flush=True)


def _classes(run: Run, split: str) -> Classes:
    data = run.config.data
    if not data.source:
        return count_classes(data.path, split)
    from embsearch_dist.data.sources.registry import open_split

    return open_split(data, run.schema, split).classes()
