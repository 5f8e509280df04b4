"""A supernet around a user's own tables: every width of a table is its leading columns, the rest is zero.

The masks act on what TorchRec has looked up and pooled, not on the tables. So a collection that is sharded later
(DistributedModelParallel replaces it inside this module) works alike, and the user's optimizer, his fused one too,
updates his tables. A column that a step does not read has a gradient of zero; SGD and Adagrad leave it alone, Adam's
moments move it on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor

from embsearch_dist.config.options import check_section
from embsearch_dist.errors import UserError, nearest
from embsearch_dist.library.own_tables import OwnTables, Tables, Widths, keys_of, weight_of
from embsearch_dist.methods.adass.config import SamplingConfig
from embsearch_dist.methods.adass.sampling import Sampler, candidate_variance, column_variance, own_columns


class Supernet(nn.Module):
    """Tables of one's own at any of their widths; what comes out has the keys and widths of the whole tables.

    >>> net = Supernet([EmbeddingBagConfig(name="user", embedding_dim=8, num_embeddings=5)], candidates=[0, 4, 8])
    >>> optimizer = torch.optim.Adagrad(net.parameters())
    >>> features = KeyedJaggedTensor(keys=["user"], values=torch.tensor([3, 1]), lengths=torch.tensor([1, 1]))
    >>> for step in range(3):
    ...     loss = net(features, net.sample(step)).values().square().sum()  # in the place of the user's model and loss
    ...     loss.backward()
    ...     optimizer.step()
    ...     net.adapt(step)
    >>> net(features, {"user": 4})["user"].shape
    torch.Size([2, 8])

    Attributes:
        tables: TorchRec's collection, with the user's weights.
        own: what may be chosen.
        sampler: draws widths (AdaS&S Eq. 4-6); ``sampler.state()`` and ``sampler.load_state(...)`` belong into a
            checkpoint of the user's loop.
    """

    def __init__(
        self,
        tables: Tables,
        candidates: Sequence[int] = (0, 4, 8, 16),
        *,
        sampling: str | Mapping[str, Any] = "adaptive",
        seed: int = 0,
        warmup_steps: int = 0,
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            tables: configs, of which a collection is made, or a collection. Their widths are the widest there will be.
            candidates: widths to choose from, ascending; a leading 0 may drop tables. A table has those up to its own.
            sampling: ``adaptive``, ``random`` (alike), ``vanilla_uniform`` (by width, nothing dropped) or
                ``weighted_uniform``; or keys of ``search.sampling`` (``{"mode": "adaptive", "update_every": 20}``).
            seed: of the draws.
            warmup_steps: until then the whole tables are drawn, ever more rarely.
            is_weighted, device: of the collection, where configs are given.

        Raises:
            UserError: what :meth:`OwnTables.of` finds; an unknown way or key of sampling.
        """
        super().__init__()
        self.own = OwnTables.of(tables, candidates)
        if not isinstance(tables, EmbeddingBagCollection):
            tables = EmbeddingBagCollection(tables=list(self.own.configs), is_weighted=is_weighted, device=device)
        self.tables: nn.Module = tables
        self._weighted = tables.is_weighted()
        config = _sampling(sampling, len(self.own.candidates))
        self.sampler = Sampler(
            config, self.own.schema, self.own.candidates, seed, warmup_steps, distinct=self.own.allowed
        )
        self._owners = {key: self.own.names.index(table) for (table, _), key in keys_of(self.own.configs).items()}
        self._places: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._watched = False
        self._kept: torch.Tensor | None = None
        self._seen: dict[str, torch.Tensor] = {}

    def sample(self, step: int, rank: int = 0) -> torch.Tensor:
        """The widths of a step, ``[F]`` int64 in the order of the tables; the same for the same seed and step.

        A table that may be dropped is, by the sampler's keep probability, or where candidate 0 is drawn.

        Args:
            rank: of this process, where each is to draw for itself (``sampling={"same_subnet": False}``).
        """
        choice, keep = self.sampler.draw(step, rank)
        widths = torch.tensor(self.own.candidates)[choice]
        if self.own.candidates[0] == 0:
            widths = widths * (keep | ~self.own.allowed[:, 0])
        if self.sampler.by_growth and self.sampler.initial is None:
            self.sampler.start(self._variance())
        self._watched, self._seen = self.sampler.due(step), {}
        return widths

    def forward(self, features: KeyedJaggedTensor, widths: Widths | None = None) -> KeyedTensor:
        """Pooled embeddings of the leading columns, zeros behind them.

        Args:
            widths: of :meth:`sample`, table -> width, or an allocation; None: the whole tables.

        Returns:
            With the keys and widths of the whole tables, so that a model behind them needs no change. Sharding may put
            the keys in another order: read them by name.
        """
        pooled = self.tables(features)
        if widths is None:
            return pooled
        own = self.own.widths(widths)
        keys, lengths, values = pooled.keys(), pooled.length_per_key(), pooled.values()
        owner, place = self._columns(tuple(keys), tuple(lengths), values.device)
        mask = place < own.to(values.device)[owner]
        if self._watched and values.requires_grad and isinstance(widths, torch.Tensor):
            self._watch(values, own, owner.cpu(), mask)
        return KeyedTensor(keys=keys, length_per_key=lengths, values=values * mask.to(values.dtype))

    def adapt(self, step: int) -> None:
        """After a step's backward pass: let the next draws follow what was learned (Eq. 5 and 6), where it is time.

        With several ranks all call it; their gradients are averaged.

        Raises:
            UserError: the tables are sharded, which Eq. 5 would have to read as a whole.
        """
        if not self.sampler.due(step) or not self._seen:
            return
        if "gradient" not in self._seen:
            raise UserError("adapt(step) comes after loss.backward() of the step that sample(step) was called for")
        both = torch.stack([self._seen["gradient"], self._seen["size"]])
        if dist.is_initialized() and dist.get_world_size() > 1:
            device = next(self.parameters()).device
            both = both.to(device)
            dist.all_reduce(both)
            both = both.cpu() / dist.get_world_size()
        self.sampler.update(self._variance(), both[0], both[1])
        self._watched, self._seen = False, {}

    def cut(self, widths: Widths, *, fresh: bool = False) -> NarrowTables:
        """Tables at these widths alone, in the place of the supernet in the user's model.

        Args:
            fresh: new initial values; else the leading columns of these tables.

        Raises:
            UserError: see :meth:`OwnTables.widths`; the tables are sharded.
        """
        device = next(self.parameters()).device
        narrow = NarrowTables(self.own, widths, is_weighted=self._weighted, device=device)
        if not fresh:
            with torch.no_grad():
                for name, bag in narrow.tables.embedding_bags.items():
                    bag.weight.copy_(weight_of(self.tables, name)[:, : bag.weight.shape[1]])
        return narrow

    def _columns(
        self, keys: tuple[str, ...], lengths: tuple[int, ...], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each pooled column the number of its table, and its place in it."""
        known = self._places.get((keys, lengths, device))
        if known is None:
            owner = [self._owners[key] for key, n in zip(keys, lengths, strict=True) for _ in range(n)]
            place = [k for n in lengths for k in range(n)]
            known = torch.tensor(owner, device=device), torch.tensor(place, device=device)
            self._places[keys, lengths, device] = known
        return known

    def _watch(self, values: torch.Tensor, widths: torch.Tensor, owner: torch.Tensor, mask: torch.Tensor) -> None:
        """Note the mean magnitudes of E, and of dL/dE in the backward pass, of each table's columns in use."""
        count = torch.zeros(len(widths)).index_add_(0, owner, mask.cpu().float())
        seen: dict[str, torch.Tensor] = {}
        self._seen = seen

        def mean(of: torch.Tensor) -> torch.Tensor:
            per_column = (of.detach().abs().mean(0) * mask).float().cpu()
            return torch.zeros(len(widths)).index_add_(0, owner, per_column) / count.clamp(min=1)

        def hook(gradient: torch.Tensor) -> None:
            found, kept = mean(gradient), widths > 0
            # A dropped table has no gradient; counting it as zero would keep it dropped.
            seen["gradient"] = torch.where(kept, found, found[kept].mean() if kept.any() else found.mean())

        seen["size"] = mean(values)
        values.register_hook(hook)

    @torch.no_grad()
    def _variance(self) -> torch.Tensor:
        """What Eq. 5 compares, ``[F, T]``."""
        sums = torch.zeros(len(self.own.configs), max(self.own.widest), 3, dtype=torch.float64)
        for of_table, config in zip(sums, self.own.configs, strict=True):
            weight = weight_of(self.tables, config.name).double()
            parts = [weight.sum(0), weight.square().sum(0), weight.abs().sum(0)]
            of_table[: config.embedding_dim] = torch.stack(parts, 1).cpu()
        rows = torch.tensor([float(c.num_embeddings) for c in self.own.configs], dtype=torch.float64)
        columns = [(0, d) for d in self.own.candidates]
        if self.sampler.by_growth:
            return column_variance(sums, rows, own_columns(columns))
        return candidate_variance(sums, rows, columns)


class NarrowTables(nn.Module):
    """Tables of found widths whose output is filled up with zeros to the whole ones, as :class:`Supernet` gives it.

    Attributes:
        tables: TorchRec's collection of the kept tables.
    """

    def __init__(
        self, own: OwnTables, widths: Widths, *, is_weighted: bool = False, device: torch.device | None = None
    ) -> None:
        """
        Raises:
            UserError: every table is dropped, or a width is none of the table's.
        """
        super().__init__()
        configs = own.narrowed(widths)
        if not configs:
            raise UserError("widths: every table is dropped; at least one must be above 0")
        self.tables = EmbeddingBagCollection(tables=configs, is_weighted=is_weighted, device=device)
        whole, columns = keys_of(own.configs), dict(zip(own.names, own.widest, strict=True))
        self._lengths = {key: columns[table] for (table, _), key in whole.items()}
        # TorchRec calls a feature FEATURE@TABLE where several tables have it, so a key may be another one by now.
        kept = keys_of(configs)
        self._source = {key: kept.get(pair) for pair, key in whole.items()}

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Keys and widths of the whole tables; zeros for what was cut off or dropped."""
        found = self.tables(features).to_dict()
        like = next(iter(found.values()))
        parts = []
        for key, length in self._lengths.items():
            source = self._source[key]
            values = like.new_zeros(len(like), 0) if source is None else found[source]
            parts.append(pad(values, (0, length - values.shape[1])))
        return KeyedTensor(
            keys=list(self._lengths), length_per_key=list(self._lengths.values()), values=torch.cat(parts, 1)
        )


def _sampling(given: str | Mapping[str, Any], candidates: int) -> SamplingConfig:
    body = {"mode": given} if isinstance(given, str) else dict(given)
    known = list(vars(SamplingConfig()))
    for key in body:
        if key not in known:
            raise UserError(f"sampling: there is no key {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    config = SamplingConfig(**body)
    check_section(config, "search.sampling")
    if config.subnets != 1:
        raise UserError("sampling: subnets must be 1; call the supernet with several widths in a step instead")
    config.check_floors(candidates)
    return config
