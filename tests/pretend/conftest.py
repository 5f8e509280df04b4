"""Fixtures of the tests on the pretend device (tools/pretend)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factories import make_data
from tests.pretend.worker import Worker
from tests.raw_lists import prepared_lists

ROWS = 800


@pytest.fixture(scope="module")
def pretend() -> Iterator[Worker]:
    """``pretend(fn, *args)``: a function of the test file, run in a process where the device is installed."""
    worker = Worker()
    yield worker
    worker.end()


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data: four fields of one id and a dense column."""
    return make_data(tmp_path_factory.mktemp("ids"), ROWS)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data: lists that are averaged, weighted and often empty, beside single ids."""
    return prepared_lists(tmp_path_factory.mktemp("lists"), ROWS)
