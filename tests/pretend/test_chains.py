"""Every method on CUDA from search to evaluation: nothing mixes host and device, and a kill changes no bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.factories import make_data
from tests.pretend.chains import Chain, walk
from tests.pretend.worker import Worker
from tests.raw_lists import prepared_lists

OPTIMIZERS = ("adam", "adagrad", "rowwise_adagrad", "sgd")
NORMS = ("none", "field", "width")
# Every method with every optimizer; of norms and kinds of fields every pair with a method and with an optimizer.
CHAINS = [
    Chain("adass", "adam", "field"),
    Chain("adass", "adagrad", "width", lists=True),
    Chain("adass", "rowwise_adagrad", "none", lists=True),
    Chain("adass", "sgd", "none"),
    Chain("nasrec", "adam", "none", lists=True),
    Chain("nasrec", "adagrad", "field"),
    Chain("nasrec", "rowwise_adagrad", "width"),
    Chain("nasrec", "sgd", "field", lists=True),
    Chain("ihas", "adam", "width"),
    Chain("ihas", "adagrad", "none"),
    Chain("ihas", "rowwise_adagrad", "field", lists=True, more=("search.gates.through=true",)),
    Chain("ihas", "sgd", "width", lists=True, more=("search.gates.shared=true",)),
    Chain("adafs", "adam", "none", lists=True),
    Chain("adafs", "adagrad", "none", more=("search.mode=hard",)),
    Chain("adafs", "rowwise_adagrad", "none"),
    Chain("adafs", "sgd", "none", lists=True),
    Chain("ues", "adam", "field", lists=True),
    Chain("ues", "adagrad", "width", more=("model.backbone=dlrm",)),
    Chain("ues", "rowwise_adagrad", "none", more=("model.backbone=wide_deep", "model.precision=bfloat16")),
    Chain("ues", "sgd", "none", lists=True, more=("model.dropout=0.2",)),
]


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("ids"), 800)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_lists(tmp_path_factory.mktemp("lists"), 800)


def test_every_pair_of_choices_is_walked() -> None:
    for left, right in itertools.combinations(("method", "optimizer", "norm", "lists"), 2):
        walked = {(getattr(c, left), getattr(c, right)) for c in CHAINS}
        choices = {key: {getattr(c, key) for c in CHAINS} for key in (left, right)}
        missing = set(itertools.product(choices[left], choices[right])) - walked
        # AdaFS has a BatchNorm of its own, whatever model.norm says.
        assert not {pair for pair in missing if "adafs" not in pair or "norm" not in (left, right)}
    assert {c.optimizer for c in CHAINS} == set(OPTIMIZERS) and {c.norm for c in CHAINS} == set(NORMS)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.label)
def test_a_killed_chain_ends_like_an_unbroken_one(
    pretend: Worker, ids: Path, lists: Path, tmp_path: Path, chain: Chain
) -> None:
    data = lists if chain.lists else ids
    unbroken, killed = (pretend(walk, chain, data, tmp_path, "cuda", kill) for kill in (False, True))
    assert killed == unbroken
