"""The exception type for anything a user can put right, the word that he may have meant, the command to give, the file
that could not be written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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


class Diverged(UserError):
    """A training has met a loss or gradient that is not finite, on all ranks alike. Of several trainings that are
    compared, one that ends so has lost; alone it is the user's to mend."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """The system names a file that cannot be opened, but not one that cannot be written any further.

    Raises:
        OSError: what is raised inside, with the file's name.
    """
    try:
        yield
    except OSError as e:
        if e.filename is not None or e.errno is None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def nearest_or_all(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known word most like ``word``, or a list of what is known."""
    words = [str(k) for k in known]
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return "Known: " + ", ".join(words[:40]) + (", ..." if len(words) > 40 else "")


def script(name: str) -> str:
    """How the user starts an entry script from where he stands: in a checkout, or with the package installed."""
    return f"python launch/{name}.py" if Path("launch", f"{name}.py").exists() else f"embsearch {name}"
