"""The GPU that plans are made for: what the config states, else the one that is here, else an A100."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from embsearch_dist.config.sections import PlannerConfig
from embsearch_dist.ranks.context import Context

GIB = 1024**3


@dataclass(frozen=True)
class Card:
    """A GPU: bytes of its memory and bytes a second between it and the chip, in GiB. A bandwidth of 0 is unknown."""

    name: str
    memory: float
    bandwidth: float


DEFAULT = Card("A100 80GB SXM", 80.0, 1899.0)
"""NVIDIA's data sheet of it: 80 GB, 2,039 GB/s. An H100 SXM has as much memory and 3,350 GB/s."""


def read_card(device: torch.device | int) -> Card | None:
    """The GPU ``device`` as its driver describes it; None where there is no CUDA."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(device)
    # kHz and bits; HBM and GDDR memory transfer twice a clock.
    clock, bits = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    return Card(found.name, found.total_memory / GIB, 2 * 1000 * clock * bits / 8 / GIB)


def smallest(cards: Sequence[Card | None]) -> Card | None:
    """What each of the cards has at least; None if one of them is unknown. The name is that of the smallest memory."""
    known = [card for card in cards if card is not None]
    if not known or len(known) < len(cards):
        return None
    least = min(known, key=lambda card: card.memory)
    return dataclasses.replace(least, bandwidth=min(card.bandwidth for card in known))


def fill(planner: PlannerConfig, card: Card | None) -> PlannerConfig:
    """The settings with ``hbm_gb`` and ``hbm_bandwidth`` of 0 replaced: by the card's, or by the default card's."""
    card = card or DEFAULT
    return dataclasses.replace(
        planner,
        hbm_gb=planner.hbm_gb or card.memory,
        hbm_bandwidth=planner.hbm_bandwidth or card.bandwidth or DEFAULT.bandwidth,
    )


def fill_together(planner: PlannerConfig, context: Context) -> PlannerConfig:
    """:func:`fill` with what the smallest GPU of all ranks has: the same numbers on every rank. A collective."""
    if context.device.type != "cuda":
        return fill(planner, None)
    with context.together("reading the GPUs"):
        card = read_card(context.device)
    every = context.every(None if card is None else list(dataclasses.astuple(card)))
    return fill(planner, smallest([None if card is None else Card(*card) for card in every]))


def origin(planner: PlannerConfig, card: Card | None) -> str:
    """Where :func:`fill` takes the two numbers from, for people."""
    filled = fill(planner, card)
    here = f"read from {card.name}" if card else f"the default: {DEFAULT.name}"
    clocked = here if card is None or card.bandwidth else f"the default: {DEFAULT.name}"
    memory = "dist.planner.hbm_gb" if planner.hbm_gb else here
    bandwidth = "dist.planner.hbm_bandwidth" if planner.hbm_bandwidth else clocked
    return f"GPU memory: {filled.hbm_gb:.4g} GiB ({memory}), {filled.hbm_bandwidth:,.0f} GiB/s ({bandwidth})"
