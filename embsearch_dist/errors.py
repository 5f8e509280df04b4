"""The one exception type for anything a user can put right, and the word that he may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """Bad input: the message names the file, row, field or key, and what to change.

    Entry scripts print the message without a traceback and exit with code 2; a bug keeps its
    traceback. Raise it with one sentence for what is wrong and one for the fix.

    Attributes:
        everywhere: all ranks raise this or a telling of it, so rank 0 alone needs to print it.
        repeats: the same start would end in it again. False when it tells of another rank's error of
            another kind, which may have been a passing one.
    """

    repeats = True

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
