"""What a training step may ask of a GPU: how often the host waits or copies, and how many operators it starts.

``python -m tools.pretend.count`` prints the same counts with the lines they come from. A change that lowers one should
lower its ceiling here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretend.worker import Worker

STEPS = 4
# Side of a step -> (host waits and copies, operators), as means over the steps.
CEILINGS = {
    "retrain": (2, 166),
    "adass": (2, 226),
    "adass-field": (2, 254),
    "adass-width": (2, 336),
    "ihas": (2, 206),
    "ihas-outer": (6, 360),
    "adafs": (2, 276),
    "adafs-outer": (6, 465),
    "nasrec": (3, 570),
    "nasrec-whole": (3, 1680),
}


def counted(side: str, data: Path) -> tuple[float, float, str]:
    from embsearch_dist.config.read import load_config
    from embsearch_dist.ranks.context import start
    from tools.pretend import count

    config = load_config(count.CONFIGS, None, count.SMALL, "ues")
    with start(config.run, config.dist) as context:
        counts = count.count(side, data, context, STEPS)
    return counts.syncs_and_copies / STEPS, counts.operators / STEPS, counts.per(STEPS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.pretend.count import make_data

    return make_data(tmp_path_factory.mktemp("counted"), 1000)


@pytest.mark.parametrize("side", CEILINGS)
def test_a_step_waits_copies_and_starts_no_more_than_this(pretend: Worker, data: Path, side: str) -> None:
    waits, operators, places = pretend(counted, side, data)
    most_waits, most_operators = CEILINGS[side]
    assert waits <= most_waits, f"{waits} host waits and copies a step\n{places}"
    assert operators <= most_operators, f"{operators} operators a step\n{places}"
    # A ceiling far above what is needed would let much slip through.
    assert operators > 0.6 * most_operators, f"{operators} operators a step: lower the ceiling"


def test_every_kind_of_step_has_a_ceiling() -> None:
    from tools.pretend.count import SIDES

    assert set(CEILINGS) == set(SIDES)
