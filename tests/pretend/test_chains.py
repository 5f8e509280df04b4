"""Every method on CUDA from search to evaluation: nothing mixes host and device, and a kill changes no bit.

iHAS, AdaFS and UES are in test_gated_chains.py, so that two processes share the work.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from tests.pretend.chains import CHAINS, Chain, chains_of, check_killed
from tests.pretend.worker import Worker


def test_every_pair_of_choices_is_walked() -> None:
    choices = ("method", "optimizer", "norm", "lists")
    assert [len({getattr(c, key) for c in CHAINS}) for key in choices] == [5, 4, 3, 2]
    for left, right in itertools.combinations(choices, 2):
        walked = {(getattr(c, left), getattr(c, right)) for c in CHAINS}
        every = itertools.product({a for a, _ in walked}, {b for _, b in walked})
        missing = set(every) - walked
        # AdaFS has a BatchNorm of its own, whatever model.norm says.
        assert {pair for pair in missing if (left, right, pair[0]) != ("method", "norm", "adafs")} == set()


@chains_of("adass", "nasrec")
def test_a_killed_chain_ends_like_an_unbroken_one(
    pretend: Worker, ids: Path, lists: Path, tmp_path: Path, chain: Chain
) -> None:
    check_killed(pretend, chain, lists if chain.lists else ids, tmp_path)
