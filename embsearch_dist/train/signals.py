"""SIGTERM and SIGUSR1, which schedulers send before they take a machine away: save, and leave in order.

While training runs, a signal is only noted; the ranks then agree on the step after which they stop, since it
reaches them at different steps. Anywhere else an entry script just ends: what it was doing is short, or is
done again from the last checkpoint. Either way the exit code is ``EXIT_CODE``, so that a scheduler's script can
tell "give the same command again" from a failure.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedBySignal(BaseException):
    """This process was told to end, and all that can be saved is saved; not an error of anybody."""


class Asked:
    """Whether a signal has come; ``name`` is that of the first, empty before."""

    def __init__(self) -> None:
        self.name = ""


_listening: Asked | None = None
_raised = ""
received: set[int] = set()
"""The signals of ``SIGNALS`` that have come so far."""


def raised() -> StoppedBySignal | None:
    """What a signal has raised in this process; packages may have made another error of it, or have dropped it."""
    return StoppedBySignal(f"stopped by {_raised}; give the same command again to continue") if _raised else None


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _raised
    received.add(number)
    name = signal.Signals(number).name
    if _listening is None:
        _raised = _raised or name
        raise StoppedBySignal(f"stopped by {_raised}; give the same command again to continue")
    # Launchers pass on a signal that the whole process group has got already: the second changes nothing.
    _listening.name = _listening.name or name


def catch() -> None:
    """Answer the signals from now on; for entry scripts, before they do anything long."""
    global _raised
    _raised = ""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _on_signal)


@contextlib.contextmanager
def noted() -> Iterator[Asked]:
    """Within, a signal is noted and nothing else happens. In a thread that cannot have signals: nothing ever is. One
    that has come before, and whose exception was dropped by a package, counts as noted."""
    global _listening
    asked = Asked()
    asked.name = _raised
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    outer, _listening = _listening, asked
    try:
        yield asked
    finally:
        _listening = outer
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
