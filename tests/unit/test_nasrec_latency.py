"""The latency table: fitted to times, stored with the search, and the same for a search that goes on."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.methods.nasrec import latency as module
from embsearch_dist.methods.nasrec.latency import FILE, PARTS, LatencyTable, fit, measure, table_of
from embsearch_dist.networks.cost import network_cost, operator_costs
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import Space
from tests.factories import prepared
from tests.unit.test_nasrec_scoring import SPACE, nasrec_run

COLUMNS, FIELDS = 1, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def pretended(network: ArchitectureNetwork, u: torch.Tensor, dense: torch.Tensor) -> float:
    """Milliseconds that follow a law: 0.5, and 0.002 for each million FLOPs."""
    return 0.5 + 0.002 * network.flops * len(u) / 1e6


def test_the_table_finds_what_operators_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "milliseconds", pretended)
    table = measure(SPACE, COLUMNS, FIELDS, torch.device("cpu"))
    assert table.error < 0.02 and table.rows == 512
    for seed in range(10):
        a = draw(SPACE, SCHEMES[0], np.random.default_rng(1000 + seed))
        flops = network_cost(a, SPACE, COLUMNS, FIELDS).total.flops
        assert table.predict(a, SPACE, COLUMNS, FIELDS) == pytest.approx(0.5 + 0.002 * flops * 512 / 1e6, rel=0.05)


def test_a_prediction_adds_up_uses_and_flops() -> None:
    use = {p: 2.0**k for k, p in enumerate(PARTS)}
    mflop = {p: 3.0**k for k, p in enumerate((*PARTS, "head"))}
    table = LatencyTable({}, "", 100, 0.125, use, mflop, 0.0)
    a = draw(SPACE, SCHEMES[0], np.random.default_rng(2))
    expected = 0.125 + mflop["head"] * 100e-6 * network_cost(a, SPACE, COLUMNS, FIELDS).head.flops
    for block in operator_costs(a, SPACE, COLUMNS, FIELDS):
        expected += sum(use[name] + mflop[name] * 100e-6 * cost.flops for name, cost in block.items())
    assert table.predict(a, SPACE, COLUMNS, FIELDS) == pytest.approx(expected)


def test_a_table_names_the_processor_it_was_measured_on(tmp_path: Path) -> None:
    """Two machines of one architecture and as many threads need not be alike fast."""
    told = tmp_path / "cpuinfo"
    names = set()
    for model in ("Fast 9000", "Slow 100"):
        told.write_text(f"processor\t: 0\nmodel name\t: {model}\n\nprocessor\t: 1\nmodel name\t: {model}\n")
        names.add(module.processor(told))
    assert names == {"Fast 9000 CPU", "Slow 100 CPU"}
    assert module.processor(tmp_path / "none") == f"{platform.machine()} CPU"
    assert module.where(torch.device("cpu")).startswith(module.processor() + ", ")


def test_no_operator_gives_time_back() -> None:
    generator = np.random.default_rng(0)
    features = generator.random((40, 5))
    found = fit(features, np.maximum(features @ np.array([1.0, 2.0, -1.0, 0.5, 0.0]), 0.1))
    assert (found >= 0).all() and found[2] == 0


def test_real_networks_are_timed_in_both_spaces() -> None:
    """On this machine: figures that are finite and above zero, whatever they are."""
    space = Space(2, dense_widths=(4, 8), sparse_widths=(4,), tokens=2, width=8, fewest_blocks=1)
    table = measure(space, 0, 2, torch.device("cpu"), "attention")
    assert np.isfinite(table.error) and table.base + sum(table.use.values()) + sum(table.mflop.values()) > 0
    assert table.predict(draw(space, SCHEMES[0], np.random.default_rng(0)), space, 0, 2) > 0


def test_a_search_goes_on_with_the_table_it_began_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(network: ArchitectureNetwork, u: torch.Tensor, dense: torch.Tensor) -> float:
        calls.append(1)
        return pretended(network, u, dense) * (1 + 0.01 * len(calls))  # never the same twice

    monkeypatch.setattr(module, "milliseconds", counted)
    run = nasrec_run(data, tmp_path)
    first = table_of(run, SPACE, begun=False)
    assert len(calls) == module.NETWORKS
    assert table_of(run, SPACE, begun=True) == first == table_of(run, SPACE, begun=False)
    # On another device as well, once candidates have been judged by it; before that it is measured anew.
    body = read_sealed(tmp_path / FILE)
    (tmp_path / FILE).write_text(json.dumps(body | {"where": "another device"}))
    assert table_of(run, SPACE, begun=True).use == first.use
    assert len(calls) == module.NETWORKS
    assert table_of(run, SPACE, begun=False).use != first.use
    other = Space(2, dense_widths=(8,), sparse_widths=(4,), tokens=2, width=8)
    with pytest.raises(UserError, match=rf"{FILE} is gone, or of another space.*evolution.json"):
        table_of(run, other, begun=True)
    (tmp_path / FILE).unlink()
    with pytest.raises(UserError, match=f"{FILE} is gone"):
        table_of(run, SPACE, begun=True)
