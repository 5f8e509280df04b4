"""What the host asked of the device: kernels, operators, waits and copies, by the line of the project that did it."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = str(Path(__file__).resolve().parent)
OURS = tuple(str(ROOT / name) for name in ("embsearch_dist", "launch", "tools", "tests"))
LIBRARIES = ("torchrec", "fbgemm_gpu", "torch/optim", "torch/distributed", "torch/nn")
Place = tuple[str, str]
"""What was done, and ``"file:line"`` of who did it."""


@dataclass
class Counts:
    """Counts of one :func:`watching` block, over all threads.

    Attributes:
        operators: calls of torch and FBGEMM operators on device tensors, views included.
        kernels: those that start at least one kernel: neither views nor allocations. FBGEMM's look-up counts as
            two forwards and eight backwards, about what a profiler shows for it.
        syncs: moments where the host waits for the device, by what and by line. A copy is one unless it is
            ``non_blocking`` and its host side is pinned.
        copies: transfers between host and device, waited for or not.
        transferred: bytes of those, under the same keys.
        by_operator: ``operators`` by name.
    """

    operators: int = 0
    kernels: int = 0
    syncs: Counter[Place] = field(default_factory=Counter)
    copies: Counter[Place] = field(default_factory=Counter)
    transferred: Counter[Place] = field(default_factory=Counter)
    by_operator: Counter[str] = field(default_factory=Counter)
    asynchronous: int = 0

    @property
    def views(self) -> int:
        return self.operators - self.kernels

    @property
    def syncs_and_copies(self) -> int:
        """Host waits, and the copies that nobody waits for: each event once."""
        return self.syncs.total() + self.asynchronous

    def per(self, steps: int) -> str:
        """A table of averages over ``steps``: the totals, then each place with what it did."""
        totals = {"operators": self.operators, "kernels": self.kernels, "syncs": self.syncs.total()}
        totals |= {"copies": self.copies.total(), "syncs and copies": self.syncs_and_copies}
        lines = ["  ".join(f"{name} {value / steps:.4g}" for name, value in totals.items())]
        for title, found in (("sync", self.syncs), ("copy", self.copies)):
            for (what, place), count in sorted(found.items(), key=lambda item: (-item[1], item[0])):
                size = self.transferred.get((what, place), 0) / count if title == "copy" else 0
                lines.append(f"  {count / steps:7.2f}  {title}  {what:32} {place}{f'  {size:,.0f} bytes' * bool(size)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.per(1)


_open: list[Counts] = []


@contextlib.contextmanager
def watching() -> Iterator[Counts]:
    """Count until the block ends. Blocks may be nested; each counts for itself."""
    counts = Counts()
    _open.append(counts)
    try:
        yield counts
    finally:
        _open[:] = [c for c in _open if c is not counts]


def note_operator(name: str, kernels: int) -> None:
    for counts in _open:
        counts.operators += 1
        counts.kernels += kernels
        counts.by_operator[name] += 1


def note_sync(what: str) -> None:
    """The host waits here."""
    if _open:
        library, place = library_and_place()
        for counts in _open:
            counts.syncs[what + library, place] += 1


def note_copy(direction: str, size: int, pinned: bool, non_blocking: bool) -> None:
    """A transfer of ``size`` bytes; ``direction`` is H2D or D2H."""
    if not _open or not size:
        return
    library, place = library_and_place()
    waits = not (pinned and non_blocking)
    what = f"{direction} {'pinned' if pinned else 'pageable'}{'' if non_blocking else ' blocking'}{library}"
    for counts in _open:
        counts.copies[what, place] += 1
        counts.transferred[what, place] += size
        if waits:
            counts.syncs[what, place] += 1
        else:
            counts.asynchronous += 1


def where() -> str:
    """``file:line`` of the innermost call of the project; of whoever called, where it is not the project."""
    return library_and_place()[1]


def library_and_place() -> tuple[str, str]:
    """What of a library the project called (`` in torchrec/...:line``, or nothing), and ``file:line`` of that call."""
    frame, library, other = sys._getframe(1), "", "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if "site-packages" in name:
            if not library and any(f"site-packages/{part}" in name for part in LIBRARIES):
                library = f" in {name.rsplit('site-packages/', 1)[1]}:{frame.f_lineno}"
        elif name.startswith(OURS) and not name.startswith(HERE):
            return library, f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        elif other == "?" and not name.startswith(HERE) and not name.startswith("<"):
            other = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return library, other
