"""A supernet around a user's own tables in his own loop, and widths by his own score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType

import embsearch_dist as es
from embsearch_dist.errors import UserError
from tests.factories import one_rank

ROWS, VALUES, RANK = 6000, 24, 6
NAMES = ["item", "idle", "user"]


def tables(width: int = 8) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=f"t_{n}", embedding_dim=width, num_embeddings=VALUES, feature_names=[n]) for n in NAMES
    ]


def jagged(ids: torch.Tensor, names: list[str] = NAMES) -> KeyedJaggedTensor:
    """``[F, B]`` ids, one a row."""
    return KeyedJaggedTensor(keys=names, values=ids.reshape(-1), lengths=torch.ones(ids.numel(), dtype=torch.int32))


def bags(net: nn.Module) -> Any:
    """Tables by name."""
    return net.tables.embedding_bags  # type: ignore[union-attr]


@dataclasses.dataclass
class Planted:
    """Clicks in which an item answers to six numbers each in its own way, a user has one liking, and ``idle`` none."""

    ids: torch.Tensor
    x: torch.Tensor
    label: torch.Tensor

    @classmethod
    def make(cls) -> Planted:
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(VALUES, (3, ROWS), generator=g)
        x = torch.randn(ROWS, RANK, generator=g)
        taste, liking = torch.randn(VALUES, RANK, generator=g), torch.randn(VALUES, generator=g)
        logit = 1.5 * (taste[ids[0]] * x).sum(1) + liking[ids[2]]
        return cls(ids, x, (torch.rand(ROWS, generator=g) < logit.sigmoid()).float())


class Own(nn.Module):
    """A model that knows nothing of widths."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.linear = nn.Linear(RANK, width), nn.Linear(3 * width, 1)

    def forward(self, pooled: KeyedTensor, x: torch.Tensor) -> torch.Tensor:
        every = torch.cat([pooled[n] for n in NAMES], 1)
        return (pooled["item"] * self.query(x)).sum(1) + self.linear(every)[:, 0]


def trained(sampling: str | dict[str, object], steps: int = 500) -> tuple[es.Supernet, Own, Planted]:
    """The loop of a user: his model, his optimizer, his batches."""
    torch.manual_seed(0)
    data, net, model = Planted.make(), es.Supernet(tables(), [0, 2, 4, 8], sampling=sampling), Own()
    optimizer = torch.optim.Adagrad([*net.parameters(), *model.parameters()], lr=0.1)
    for step in range(steps):
        rows = torch.arange(step * 256, (step + 1) * 256) % 4800
        logits = model(net(jagged(data.ids[:, rows]), net.sample(step)), data.x[rows])
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits, data.label[rows]).backward()
        optimizer.step()
        net.adapt(step)
    return net, model, data


@pytest.fixture(scope="module")
def loop() -> tuple[es.Supernet, Own, Planted, Callable[[dict[str, int]], torch.Tensor]]:
    net, model, data = trained({"mode": "adaptive", "update_every": 20, "floor_e": 0.1})
    held = slice(4800, ROWS)

    @torch.no_grad()
    def logits(widths: dict[str, int]) -> torch.Tensor:
        return model(net(jagged(data.ids[:, held]), widths), data.x[held])

    return net, model, data, logits


def test_the_table_that_needs_its_width_keeps_it_and_the_budget_holds(loop: tuple) -> None:
    net, _, data, logits = loop
    found = es.search_widths(logits, net, budget="45%", labels=data.label[4800:])
    assert found.total("parameters") <= 0.45 * 3 * 8 * VALUES
    assert found.widths["t_item"] == 8 and found.widths["t_idle"] == 0 and found.widths["t_user"] <= 4
    assert _auc(logits, data, found.widths) > _auc(logits, data, dict.fromkeys(found.widths, 2)) + 0.05


def _auc(logits: Callable[[dict[str, int]], torch.Tensor], data: Planted, widths: dict[str, int]) -> float:
    from embsearch_dist.train.metrics import auc

    return auc(logits(widths).numpy(), data.label[4800:].numpy())


@pytest.mark.parametrize("finder", ["sweeps", "policy"])
def test_a_plain_number_is_a_score_too(loop: tuple, finder: str) -> None:
    net, _, data, logits = loop
    asked: list[dict[str, int]] = []

    def score(widths: dict[str, int]) -> float:
        asked.append(widths)
        return _auc(logits, data, widths)

    found = es.search_widths(score, net, budget="45%", policy={"finder": finder, "steps": 40, "batch": 8})
    assert found.widths["t_item"] == 8 and found.total("parameters") <= 0.45 * 3 * 8 * VALUES
    assert len({tuple(w.values()) for w in asked}) == len(asked), "nothing is asked for twice"
    assert all(any(w.values()) for w in asked), "a model without tables is none"
    assert found == es.search_widths(score, net, budget="45%", policy={"finder": finder, "steps": 40, "batch": 8})


def test_draws_follow_what_was_learned(loop: tuple) -> None:
    net = loop[0]
    _, keep = net.sampler.probabilities()
    kept = dict(zip(net.own.names, keep.tolist(), strict=True))
    assert kept["t_item"] > kept["t_idle"] + 0.05


def test_what_is_cut_computes_what_the_supernet_does_at_these_widths(loop: tuple, tmp_path: Path) -> None:
    net, model, data, _ = loop
    found = es.search_widths(lambda w: -sum(w.values()), net)  # narrow is all it asks for
    assert sum(found.widths.values()) == 2
    found = dataclasses.replace(found, widths={"t_item": 4, "t_idle": 0, "t_user": 2})
    found.save(tmp_path / "found.json")
    read = es.Allocation.load(tmp_path / "found.json")
    shapes = [(c.name, c.embedding_dim, c.feature_names) for c in read.embedding_bag_configs()]
    assert read == found and shapes == [("t_item", 4, ["item"]), ("t_user", 2, ["user"])]
    narrow, features = net.cut(read), jagged(data.ids[:, :50])
    assert sum(p.numel() for p in narrow.parameters()) == 6 * VALUES
    whole, cut = net(features, read), narrow(features)
    assert whole.keys() == cut.keys() and torch.equal(whole.values(), cut.values())
    assert torch.equal(model(whole, data.x[:50]), model(cut, data.x[:50]))
    assert torch.equal(net(features).values(), net.tables(features).values())
    assert not torch.equal(net.cut(read, fresh=True)(features).values(), cut.values())


def test_only_the_columns_of_a_step_have_a_gradient() -> None:
    net = es.Supernet(tables(), [0, 2, 4, 8], sampling="random")
    net(jagged(torch.zeros(3, 4, dtype=torch.int64)), {"t_item": 4, "t_idle": 0, "t_user": 8}).values().sum().backward()
    used = {n: b.weight.grad[0].count_nonzero().item() for n, b in bags(net).items()}
    assert used == {"t_item": 4, "t_idle": 0, "t_user": 8}


def test_tables_of_several_widths_features_and_poolings(tmp_path: Path) -> None:
    """A feature of two tables and a table of two features: one width a table, TorchRec's names for what comes out."""
    configs = [
        EmbeddingBagConfig(name="a", embedding_dim=6, num_embeddings=5, feature_names=["x", "y"]),
        EmbeddingBagConfig(name="b", embedding_dim=4, num_embeddings=5, feature_names=["x"], pooling=PoolingType.MEAN),
    ]
    net = es.Supernet(EmbeddingBagCollection(tables=configs), [0, 2, 4, 8], sampling="vanilla_uniform")
    assert net.own.candidates == [0, 2, 4, 6] and net.own.allowed.tolist() == [[True] * 4, [True] * 3 + [False]]
    drawn = torch.stack([net.sample(step) for step in range(60)])
    assert set(drawn[:, 0].tolist()) <= {0, 2, 4, 6} and set(drawn[:, 1].tolist()) <= {0, 2, 4}
    assert torch.equal(drawn[7], net.sample(7))
    features = KeyedJaggedTensor(
        keys=["x", "y"], values=torch.tensor([1, 2, 3, 4, 0]), lengths=torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    )
    for widths in ({"a": 2, "b": 4}, {"a": 6, "b": 0}, {"a": 0, "b": 2}):
        out, cut = net(features, widths), net.cut(widths)(features)
        assert out.keys() == ["x@a", "y", "x@b"] == cut.keys() and out.length_per_key() == [6, 6, 4]
        assert torch.equal(out.values(), cut.values())
        of = {"x@a": "a", "y": "a", "x@b": "b"}
        assert all(not out[key][:, widths[table] :].any() for key, table in of.items())
    found = es.search_widths(lambda w: w["a"], net, budget="ues-4")
    assert found.widths["a"] == 6 and found.total("parameters") <= 40
    configs = es.Allocation.load(_saved(found, tmp_path)).embedding_bag_configs()
    assert configs[0].feature_names == ["x", "y"]


def _saved(found: es.Allocation, folder: Path) -> Path:
    found.save(folder / "found.json")
    return folder / "found.json"


def test_sharded_in_a_model_it_computes_the_same() -> None:
    """DistributedModelParallel replaces the collection inside; the masks are on what it gives."""
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

    one_rank()
    torch.manual_seed(0)
    net = es.Supernet(tables(), [0, 2, 4, 8], sampling="random")
    features, widths = jagged(torch.randint(VALUES, (3, 40))), net.sample(3)
    expected = net(features, widths).to_dict()
    weights = {n: b.weight.detach().clone() for n, b in bags(net).items()}
    sharded = DistributedModelParallel(net, device=torch.device("cpu"))
    inside = sharded.module
    assert isinstance(inside.tables, ShardedEmbeddingBagCollection)
    for name, bag in bags(inside).items():
        bag.weight.data.copy_(weights[name])
    found = sharded(features, widths).to_dict()
    assert set(found) == set(expected)
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values)
    with pytest.raises(UserError, match="sharded tables cannot be read as a whole"):
        inside.cut(dict.fromkeys(net.own.names, 4))


def labelled(labels: torch.Tensor, **more: Any) -> es.Allocation:
    return es.search_widths(lambda w: torch.zeros(len(labels)), tables(), labels=labels, **more)


def test_labels_of_one_class_do_where_logloss_tells_subnets_apart() -> None:
    assert labelled(torch.zeros(9), policy={"metric": "logloss", "steps": 2}).total("parameters") > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: es.Supernet([]), "there is no table"),
        (lambda: es.Supernet([*tables(), *tables()]), "2 tables are called 't_item'"),
        (lambda: es.Supernet(tables(), [4, 2]), "widths must ascend"),
        (lambda: es.Supernet(tables(), sampling={"flor_e": 1}), "no key 'flor_e' .did you mean 'floor_e'"),
        (lambda: es.Supernet(tables(), sampling="best"), "'best' is none of adaptive"),
        (lambda: es.Supernet(tables()).cut({"t_item": 4}), "table 't_idle' is in only one"),
        (lambda: es.Supernet(tables()).cut(dict.fromkeys(["t_item", "t_idle", "t_user"], 0)), "every table is dropped"),
        (lambda: es.Supernet(tables()).cut({"t_item": 9, "t_idle": 0, "t_user": 0}), "has 8 columns, width 9"),
        (lambda: es.search_widths(lambda w: 1.0, tables(), budget="1%"), "narrowest tables need 96. Raise"),
        (lambda: es.search_widths(lambda w: 1.0, tables(), budget="half"), "'half' is not a budget"),
        (lambda: es.search_widths(lambda w: float("nan"), tables()), "must be a finite number"),
        (lambda: es.search_widths(lambda w: torch.zeros(3), tables()), r"with labels=...., got shape \[3\]"),
        (
            lambda: es.search_widths(lambda w: torch.zeros(3), tables(), labels=torch.arange(2)),
            r"the finite logits of 2 rows with labels, got the shape \[3\]",
        ),
        (lambda: labelled(torch.full((9,), 2.0)), "labels must be 0 or 1, got 2.0 in row 0"),
        (lambda: labelled(torch.tensor([0.0, 1.0, math.nan])), "labels must be 0 or 1, got nan in row 2"),
        (lambda: labelled(torch.zeros(9)), "all 9 are 0, so there is no AUC. Give more rows, or policy="),
        (lambda: labelled(torch.zeros(0)), r"one per logit, got the shape \[0\]"),
        (lambda: labelled(torch.zeros(3, 2)), r"one per logit, got the shape \[3, 2\]"),
        (lambda: es.search_widths(lambda w: 1.0, tables(), policy={"evidence": 1}), "let score give logits"),
        (lambda: es.search_widths(lambda w: 1.0, tables(), policy={"step": 1}), "no key 'step' .did you mean 'steps'"),
    ],
)
def test_what_cannot_be_is_said(call: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()
