"""NASRec on two ranks: one supernet whether ranks train one architecture or each its own, and one search."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.methods.nasrec.method import NASRec
from embsearch_dist.methods.nasrec.supernet_stage import SupernetTask, load_supernet
from embsearch_dist.methods.stages import run_stages
from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.sampling import training_architecture
from tests.factories import one_rank, open_run, prepared, rank_context, recorded, small_config, whole_tables
from tests.ranks import run_ranks
from tests.unit.test_nasrec_scoring import NASREC, SPACE, OnlySupernet
from tools.bench.masked import MaskedNetwork

# What a search does before its first generation must not depend on ranks, either.
START = ["search.prefilter.proxies=[snip,zico,jacob_cov]", "search.prefilter.sample=8", "search.prefilter.rows=64"]
STEPS = 12
OWN_STEPS = 8
SPREAD = ["dist.sharding=row_wise", "dist.tables.left=table_wise"]
ATOL = 1e-4  # where tables move by 0.02 and more; orders of summation make a difference of 1e-6
# Adagrad's first step is as long as the rate, also where the gradient is only what rounding left: its sign then depends
# on the order of summation, and so on the processor. SGD's goes with the gradient. At these rates last bits stay last.
RATES = ["optim.embedding=sgd", "optim.embedding_lr=0.1", "optim.dense_lr=0.003"]
CASES = {
    "one": [*RATES, "search.sampling.same_network=true"],
    "own": [
        *RATES,
        "search.sampling.same_network=false",
        "search.supernet.schedule=constant",
        f"search.supernet.steps={OWN_STEPS}",
        "search.sampling.warmup=0.5",
        "optim.clip_norm=2.3",
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared(tmp_path_factory))


def digest(task: SupernetTask) -> str:
    """Of every weight of the supernet, to the bit."""
    found = hashlib.sha256()
    for name, weight in sorted(task.model.head.state_dict().items()):
        found.update(name.encode())
        found.update(weight.numpy().tobytes())
    return found.hexdigest()


def train_and_search(rank: int, world_size: int, data: str, folder: str) -> dict[str, Any]:
    """Both cases of the supernet, and a search of the one that a single rank has trained."""
    context, found = rank_context(rank, world_size), {}
    for case, overrides in CASES.items():
        config = small_config(data, f"{folder}/two/{case}", *NASREC, *SPREAD, *overrides, method="nasrec")
        run = open_run(config, context)
        kept: list[SupernetTask] = []
        init = SupernetTask.__init__

        def spy(self: SupernetTask, *args: Any, init: Any = init, kept: Any = kept) -> None:
            init(self, *args)
            kept.append(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SupernetTask, "__init__", spy)
            run_stages(OnlySupernet(), run)
        own = digest(kept[0])  # as training left it on this rank, before anything is loaded
        found[case] = {"trained": own, "kinds": kept[0].model.sharded.kinds, "loaded": digest(load_supernet(run))}
    config = small_config(data, f"{folder}/searched-by-two", *NASREC, *START, *CASES["one"], method="nasrec")
    run_stages(NASRec(), open_run(config, context))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, data: str) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("nasrec")
    config = small_config(data, folder / "one", *NASREC, *CASES["one"], method="nasrec")
    run_stages(OnlySupernet(), open_run(config, one_rank()))
    for name in ("searched-by-one", "searched-by-two"):
        shutil.copytree(folder / "one", folder / name)
    return folder, run_ranks(train_and_search, 2, folder, data, str(folder), timeout=240)


def weights(data: str, directory: Path, case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a run directory's supernet holds: tables and the rest."""
    config = small_config(data, directory, *NASREC, *CASES[case], method="nasrec")
    model = load_supernet(open_run(config, one_rank())).model
    return whole_tables(model.sharded), dict(model.head.state_dict())


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    far = {n: float((value - expected[n]).abs().max()) for n, value in found.items()}
    assert not {n: gap for n, gap in far.items() if not gap <= ATOL}


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_with_the_same_bits(both: tuple[Path, list[Any]], case: str) -> None:
    ranks = [r[case] for r in both[1]]
    assert ranks[0] == ranks[1]
    assert ranks[0]["trained"] == ranks[0]["loaded"]
    assert {ranks[0]["kinds"][n] for n in ("big", "left")} == {"row_wise", "table_wise"}


def test_two_ranks_train_the_supernet_of_one(both: tuple[Path, list[Any]], data: str) -> None:
    folder = both[0]
    losses = [recorded(folder / n, "supernet", "loss") for n in ("one", "two/one")]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    (tables, head), (expected_tables, expected) = (weights(data, folder / n, "one") for n in ("two/one", "one"))
    assert_close(head, expected)
    assert_close(tables, expected_tables)


def by_hand(
    data: str, directory: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float], list[bool]]:
    """One process that computes the gradients of both ranks, each with its architecture, and averages them: on whole
    weights, without slices. Tables, weights, the mean losses, and where the gradient was clipped."""
    config = small_config(data, directory, *NASREC, *CASES["own"], method="nasrec")
    run = open_run(config, one_rank())
    task, optim, search = SupernetTask(run, OWN_STEPS), config.optim, config.search
    network = task.model.head
    masked, parameters = MaskedNetwork(network), list(network.weights.values())
    optimizer = torch.optim.Adagrad(parameters, lr=optim.dense_lr, eps=optim.dense_eps)
    losses, clipped, first = [], [], whole_tables(task.model.sharded)
    batches = run.stream("train", search.supernet.batch_size, shuffle=True).epoch(0)
    for step, batch in enumerate(itertools.islice(batches, OWN_STEPS)):
        u = task.model.embed(batch)
        half, gradients, total = batch.size // 2, [], 0.0
        for rank in range(2):
            drawn = training_architecture(SPACE, search.sampling.scheme, config.run.seed, step, rank, OWN_STEPS // 2)
            part = slice(rank * half, (rank + 1) * half)
            logits = masked(prune(drawn), batch.dense[part], u[part])
            loss = binary_cross_entropy_with_logits(logits, batch.label[part])
            total += float(loss.detach()) / 2
            found = torch.autograd.grad(loss, [*parameters, u], retain_graph=True, allow_unused=True)
            gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip([*parameters, u], found)])
        *own, of_u = [(a + b) / 2 for a, b in zip(*gradients, strict=True)]
        norm = float(torch.cat([g.reshape(-1) for g in own]).norm())
        for p, g in zip(parameters, own, strict=True):
            p.grad = g * min(1.0, optim.clip_norm / norm)
        optimizer.step()
        u.backward(of_u)  # the tables' optimizer runs in it
        losses.append(total)
        clipped.append(norm > optim.clip_norm)
    tables = whole_tables(task.model.sharded)
    assert min(float((tables[n] - first[n]).abs().max()) for n in tables) > 100 * ATOL
    return tables, dict(network.state_dict()), losses, clipped


def test_ranks_with_architectures_of_their_own_average_their_gradients(
    both: tuple[Path, list[Any]], data: str, tmp_path: Path
) -> None:
    folder = both[0]
    tables, head, losses, clipped = by_hand(data, tmp_path)
    assert set(clipped) == {False, True}
    assert len(losses) == OWN_STEPS
    np.testing.assert_allclose(recorded(folder / "two" / "own", "supernet", "loss"), losses, rtol=1e-4)
    found_tables, found = weights(data, folder / "two" / "own", "own")
    assert_close(found, head)
    assert_close(found_tables, tables)


def test_two_ranks_search_as_one(both: tuple[Path, list[Any]], data: str) -> None:
    folder = both[0]
    config = small_config(data, folder / "searched-by-one", *NASREC, *START, *CASES["one"], method="nasrec")
    run_stages(NASRec(), open_run(config, one_rank()))
    one, two = (json.loads((folder / f"searched-by-{n}" / "evolution.json").read_text()) for n in ("one", "two"))
    assert [c["key"] for c in two["seen"]] == [c["key"] for c in one["seen"]]
    assert len(one["seen"]) == 14
    for a, b in zip(one["seen"], two["seen"], strict=True):
        assert b["logloss"] == pytest.approx(a["logloss"], abs=1e-5)
        assert {k: a[k] for k in ("blocks", "flops", "parameters", "generation")} == {
            k: b[k] for k in ("blocks", "flops", "parameters", "generation")
        }
    assert (one["population"], one["generation"]) == (two["population"], two["generation"])
    files = [json.loads((folder / f"searched-by-{n}" / "architecture.json").read_text()) for n in ("one", "two")]
    assert files[0]["blocks"] == files[1]["blocks"]
    kept = [json.loads((folder / f"searched-by-{n}" / "prefilter.json").read_text())["kept"] for n in ("one", "two")]
    assert [c["key"] for c in kept[0]] == [c["key"] for c in kept[1]] == [c["key"] for c in one["seen"][:2]]


def search_without_dense_columns(rank: int, world_size: int, data: str, directory: str) -> list[float]:
    overrides = [*NASREC, "search.supernet.steps=2", "search.evolution.generations=1"]
    run = open_run(small_config(data, directory, *overrides, method="nasrec"), rank_context(rank, world_size))
    run_stages(NASRec(), run)
    return [c["logloss"] for c in json.loads(Path(directory, "evolution.json").read_text())["seen"]]


def test_data_without_dense_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 2000), rng.integers(0, 5, 2000)
    pl.DataFrame({"y": (rng.random(2000) < 0.2 + 0.6 * (a % 2)).astype(int), "a": a, "b": b}).write_csv(
        tmp_path / "c.csv"
    )
    (tmp_path / "c.yaml").write_text("files: c.csv\nlabel: y\nfields: {a: categorical, b: categorical}\n")
    prepare("table", tmp_path / "c.yaml", tmp_path / "out", quiet=True, row_group_rows=500)
    found = run_ranks(search_without_dense_columns, 2, tmp_path, str(tmp_path / "out"), str(tmp_path / "two"))
    assert found[0] == found[1] and len(found[0]) == 8
    config = small_config(tmp_path / "out", tmp_path / "one", *NASREC, method="nasrec")
    config.search.supernet.steps, config.search.evolution.generations = 2, 1
    run_stages(NASRec(), open_run(config, one_rank()))
    alone = json.loads((tmp_path / "one" / "evolution.json").read_text())
    assert found[0] == pytest.approx([c["logloss"] for c in alone["seen"]], abs=1e-4)
