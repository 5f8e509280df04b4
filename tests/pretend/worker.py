"""A process with the pretend device, which a test file keeps: installing it changes torch for good.

The functions that run there are those of the test files, at module level, so that the process can import them.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.ranks import CONTEXT, THREAD_LIMITS, fork


class Worker:
    """``worker(fn, *args)`` is ``fn(*args)`` over there; both ways only what can be pickled."""

    def __init__(self) -> None:
        self._pipe, there = CONTEXT.Pipe()
        self._process = fork(_serve, (there,), name="pretend", daemon=True)
        there.close()

    def __call__(self, fn: Callable[..., Any], *args: Any, timeout: float = 200) -> Any:
        """
        Raises:
            AssertionError: ``fn`` raised, with the traceback of over there, or the process is gone or too slow.
        """
        self._pipe.send((fn, args))
        if not self._pipe.poll(timeout):
            self.end()
            raise AssertionError(f"{fn.__name__} not done after {timeout} s")
        try:
            error, result = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise AssertionError(f"the process of the device ended with {self._process.exitcode}") from None
        if error:
            raise AssertionError(f"in the process of the device:\n{error}")
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection) -> None:
    os.environ.update(THREAD_LIMITS)
    import torch

    from tools.pretend import install

    torch.set_num_threads(1)
    install()
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            return
        if not gc.get_freeze_count():
            gc.freeze()  # what the libraries hold stays: no need to look through it again and again
        torch.manual_seed(0)
        try:
            answer = "", fn(*args)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)
