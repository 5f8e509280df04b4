"""iHAS, AdaFS and UES on CUDA from search to evaluation: see test_chains.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretend.chains import CHAINS, Chain, walk
from tests.pretend.worker import Worker

METHODS = ("ihas", "adafs", "ues")


@pytest.mark.parametrize("chain", [c for c in CHAINS if c.method in METHODS], ids=lambda c: c.label)
def test_a_killed_chain_ends_like_an_unbroken_one(
    pretend: Worker, ids: Path, lists: Path, tmp_path: Path, chain: Chain
) -> None:
    data = lists if chain.lists else ids
    unbroken, killed = (pretend(walk, chain, data, tmp_path, "cuda", kill) for kill in (False, True))
    assert killed == unbroken
