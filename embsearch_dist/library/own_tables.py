"""A user's own tables as a search sees them: what each may be, and what it is called in TorchRec."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.widths import check_candidates
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Field, Schema

Tables: TypeAlias = "Sequence[EmbeddingBagConfig] | EmbeddingBagCollection"
Widths: TypeAlias = "torch.Tensor | Mapping[str, int] | Allocation"


@dataclass(frozen=True)
class OwnTables:
    """F tables with a width each to be found. A table that several features share has one width.

    Attributes:
        configs: as the user has them; ``embedding_dim`` is the widest that a table may be.
        candidates: every width that some table may have, ascending: T of them.
        allowed: ``[F, T]`` bool: the given candidates up to a table's own width, and that width.
        schema: a field for each table, by the table's name.
    """

    configs: tuple[EmbeddingBagConfig, ...]
    candidates: list[int]
    allowed: torch.Tensor
    schema: Schema

    @classmethod
    def of(cls, tables: Tables, candidates: Sequence[int]) -> OwnTables:
        """Raises:
        UserError: no table, one without a name or with the name of another, or candidates that do not ascend.
        """
        given = check_candidates(candidates, "candidates")
        configs = configs_of(tables)
        names = [c.name for c in configs]
        wrong = next((n for n in names if not n or names.count(n) > 1), None)
        if not configs or wrong is not None:
            told = "there is no table" if not configs else f"{names.count(wrong)} tables are called {wrong!r}"
            raise UserError(f"{told}: give an EmbeddingBagConfig with a name of its own for each")
        own = {c.embedding_dim for c in configs}
        every = sorted({*(d for d in given if d <= max(own)), *own})
        allowed = [[d == c.embedding_dim or (d in given and d <= c.embedding_dim) for d in every] for c in configs]
        fields = [Field(c.name, c.num_embeddings, "mean" if c.pooling == PoolingType.MEAN else "sum") for c in configs]
        return cls(tuple(configs), every, torch.tensor(allowed), Schema("tables", tuple(fields)))

    @property
    def names(self) -> list[str]:
        return self.schema.names

    @property
    def widest(self) -> list[int]:
        return [c.embedding_dim for c in self.configs]

    def widths(self, given: Widths) -> torch.Tensor:
        """``[F]`` int64 widths, checked, unless they are a tensor already.

        Raises:
            UserError: a table is missing or unknown, or its width is above its own.
        """
        if isinstance(given, torch.Tensor):
            return given
        by_name = given.widths if isinstance(given, Allocation) else given
        if set(by_name) != set(self.names):
            name = sorted(set(by_name) ^ set(self.names))[0]
            raise UserError(f"widths: table {name!r} is in only one of them and the supernet's tables")
        for name, own in zip(self.names, self.widest, strict=True):
            if not 0 <= by_name[name] <= own:
                raise UserError(f"widths: table {name!r} has {own} columns, width {by_name[name]} was asked for")
        return torch.tensor([by_name[n] for n in self.names])

    def allocation(self, widths: Sequence[int], provenance: dict[str, object]) -> Allocation:
        """Widths with what they belong to; tables whose features are called otherwise are noted."""
        features = {c.name: list(c.feature_names) for c in self.configs if list(c.feature_names) != [c.name]}
        return Allocation(self.schema, dict(zip(self.names, widths, strict=True)), provenance, features=features)

    def narrowed(self, widths: Widths) -> list[EmbeddingBagConfig]:
        """The user's configs at these widths, all else as it was; those of width 0 are left out."""
        pairs = zip(self.configs, self.widths(widths).tolist(), strict=True)
        return [dataclasses.replace(c, embedding_dim=w) for c, w in pairs if w]


def configs_of(tables: Tables) -> list[EmbeddingBagConfig]:
    """The configs of a collection, or those given; a table without feature names has its own name."""
    given = tables.embedding_bag_configs() if isinstance(tables, EmbeddingBagCollection) else list(tables)
    for config in given:
        if not isinstance(config, EmbeddingBagConfig):
            raise UserError(f"{type(config).__name__} is no EmbeddingBagConfig")
    return [dataclasses.replace(c, feature_names=list(c.feature_names) or [c.name]) for c in given]


def keys_of(configs: Sequence[EmbeddingBagConfig]) -> dict[tuple[str, str], str]:
    """(table, feature) -> the key of its pooled embedding in TorchRec's output, in the order of an unsharded one."""
    named = zip(configs, get_embedding_names_by_table(list(configs)), strict=True)
    return {(c.name, feature): key for c, keys in named for feature, key in zip(c.feature_names, keys, strict=True)}


def weight_of(collection: nn.Module, table: str) -> torch.Tensor:
    """The whole weight of a table ``[rows, columns]``.

    Raises:
        UserError: the tables were sharded, so that no process has them whole.
    """
    if not isinstance(collection, EmbeddingBagCollection):
        raise UserError(
            f"table {table!r} lies in {type(collection).__name__}: sharded tables cannot be read as a whole. Use "
            'sampling="random" while training on shards, and load a gathered state_dict before you cut'
        )
    return collection.embedding_bags[table].weight.detach()
