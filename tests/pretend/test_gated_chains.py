"""iHAS, AdaFS and UES on CUDA from search to evaluation: see test_chains.py."""

from __future__ import annotations

from pathlib import Path

from tests.pretend.chains import Chain, chains_of, check_killed
from tests.pretend.worker import Worker


@chains_of("ihas", "adafs", "ues")
def test_a_killed_chain_ends_like_an_unbroken_one(
    pretend: Worker, ids: Path, lists: Path, tmp_path: Path, chain: Chain
) -> None:
    check_killed(pretend, chain, lists if chain.lists else ids, tmp_path)
