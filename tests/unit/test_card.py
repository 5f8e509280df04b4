"""The planner's GPU: stated keys first, then the card in use, then the default; the same on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embsearch_dist.config.sections import PlannerConfig
from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import Context
from embsearch_dist.sharding import card as module
from embsearch_dist.sharding.card import DEFAULT, GIB, Card, fill, fill_together, origin, read_card, smallest
from embsearch_dist.sharding.plan import Topology

H100 = Card("NVIDIA H100 80GB HBM3", 79.2, 3120.0)
L4 = Card("NVIDIA L4", 22.0, 279.4)
ODD = Card("odd", 40.0, 0.0)  # its driver tells no bandwidth


def numbers(planner: PlannerConfig) -> tuple[float, float]:
    return planner.hbm_gb, planner.hbm_bandwidth


@pytest.mark.parametrize(
    ("planner", "card", "expected"),
    [
        (PlannerConfig(), None, (80, 1899)),
        (PlannerConfig(), H100, (79.2, 3120)),
        (PlannerConfig(), ODD, (40, 1899)),
        (PlannerConfig(hbm_gb=16), H100, (16, 3120)),
        (PlannerConfig(hbm_bandwidth=500), None, (80, 500)),
        (PlannerConfig(hbm_gb=16, hbm_bandwidth=500), H100, (16, 500)),
    ],
)
def test_a_stated_key_comes_before_the_card_and_the_card_before_the_default(
    planner: PlannerConfig, card: Card | None, expected: tuple[float, float]
) -> None:
    assert numbers(fill(planner, card)) == expected
    assert fill(fill(planner, card), L4) == fill(planner, card)


def test_the_default_is_the_a100_of_the_data_sheet() -> None:
    assert DEFAULT.bandwidth == pytest.approx(2039e9 / GIB, rel=1e-3)
    topology = Topology(8, 8, "cuda", PlannerConfig())
    assert topology.bytes_per_rank == 80 * GIB
    assert topology.torchrec().hbm_mem_bw == pytest.approx(2039e9 / 1000, rel=1e-3)  # bytes a millisecond


def test_the_driver_tells_memory_and_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an A100: 1,593 MHz and 5,120 bits are 2,039 GB/s."""
    told: dict[str, Any] = {"name": "A100", "total_memory": 80 * GIB}
    clock = {"memory_clock_rate": 1_593_000, "memory_bus_width": 5120}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**told, **clock))
    found = read_card(0)
    assert found is not None and (found.name, found.memory) == ("A100", 80)
    assert found.bandwidth == pytest.approx(DEFAULT.bandwidth, rel=1e-3)
    clock.clear()  # a torch that does not know them
    assert read_card(0) == Card("A100", 80, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_card(0) is None


def test_the_least_of_all_cards_counts() -> None:
    assert smallest([H100, L4, H100]) == L4
    assert smallest([H100, Card("slow", 90, 100)]) == Card(H100.name, 79.2, 100)
    assert smallest([H100, None]) is None and smallest([]) is None


class Ranks(Context):
    """A rank of several whose gathering is stated instead of done."""

    def every(self, value: Any) -> Any:
        if value is None or isinstance(value, tuple):  # what ``together`` asks: has anybody failed?
            return [value] * self.world_size
        return [value, [L4.name, L4.memory, L4.bandwidth]]


def test_every_rank_plans_with_the_numbers_of_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Ranks(0, 2, torch.device("cuda", 0))
    monkeypatch.setattr(module, "read_card", lambda device: H100)
    assert numbers(fill_together(PlannerConfig(), context)) == (22.0, 279.4)
    assert numbers(fill_together(PlannerConfig(hbm_gb=16), context)) == (16, 279.4)

    def broken(device: torch.device) -> Card:
        raise UserError("no such card")

    monkeypatch.setattr(module, "read_card", broken)
    with pytest.raises(UserError, match="no such card"):
        fill_together(PlannerConfig(), context)
    assert numbers(fill_together(PlannerConfig(), Context(0, 2, torch.device("cpu")))) == (80, 1899)  # none is read


@pytest.mark.parametrize(
    ("planner", "card", "text"),
    [
        (PlannerConfig(), None, "80 GiB (the default: A100 80GB SXM), 1,899 GiB/s (the default: A100 80GB SXM)"),
        (PlannerConfig(), L4, "22 GiB (read from NVIDIA L4), 279 GiB/s (read from NVIDIA L4)"),
        (PlannerConfig(), ODD, "40 GiB (read from odd), 1,899 GiB/s (the default: A100 80GB SXM)"),
        (PlannerConfig(hbm_gb=16), L4, "16 GiB (dist.planner.hbm_gb), 279 GiB/s (read from NVIDIA L4)"),
        (PlannerConfig(hbm_gb=16, hbm_bandwidth=5), L4, "16 GiB (dist.planner.hbm_gb), 5 GiB/s (dist.planner.hbm_b"),
    ],
)
def test_the_origin_of_the_numbers_is_told(planner: PlannerConfig, card: Card | None, text: str) -> None:
    assert origin(planner, card).startswith(f"GPU memory: {text}")
