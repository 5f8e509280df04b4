"""The fixture of the tests on the pretend device (tools/pretend)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pretend.worker import Worker


@pytest.fixture(scope="module")
def pretend() -> Iterator[Worker]:
    """``pretend(fn, *args)``: a function of the test file, run in a process where the device is installed."""
    worker = Worker()
    yield worker
    worker.end()
