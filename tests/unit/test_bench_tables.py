"""The benchmark of the tables' optimizers: all sides train the same tables, and the report compares with the first."""

from __future__ import annotations

from typing import Any

import pytest

from tests.factories import one_rank


@pytest.fixture
def bench() -> Any:
    from tools.bench import table_steps

    return table_steps


def test_sides_take_turns_and_are_compared_with_the_first(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    case, turns = bench.Case([40, 9], 4, 16), []

    def told(name: str, step: Any) -> Any:
        return lambda number: (turns.append(name), step(number))

    sides = {"adam": case.ours(one_rank(), "adam"), "dense": case.dense_adam(one_rank())}
    sides["torch"] = case.without_kernel(one_rank())
    seconds = bench.measure({n: told(n, s) for n, s in sides.items()}, rounds=2, steps=2)
    assert turns == [n for _ in range(3) for n in sides for _ in range(2)]
    assert {n: len(found) for n, found in seconds.items()} == dict.fromkeys(sides, 4)
    bench.report("title", {"a": [2.0] * 4, "b": [3.0] * 4})
    assert "| b | 3000.00 | 3000.00-3000.00 | 1.50 |" in capsys.readouterr().out
