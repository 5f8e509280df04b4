"""The progress of a stage: a bar where somebody looks on, a line every ten seconds where not."""

from __future__ import annotations

import math
import os
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

PLAIN_INTERVAL_S = 10.0
BAR_INTERVAL_S = 0.5


class Progress:
    """How far a stage is and when it will be done; made by ``Monitor.progress``."""

    def __init__(self, label: str, total: int, unit: str, initial: int, shown: bool) -> None:
        self.total, self.unit, self.initial, self.done = total, unit, initial, initial
        self.bar: Any = None
        self._label = label
        self._shown = shown
        self._postfix: dict[str, Any] = {}
        self._start = self._last = time.monotonic()
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            # Some terminals (docker -t, script) report a width of 0, on which tqdm draws an empty bar.
            known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            width: dict[str, Any] = {"dynamic_ncols": True} if known else {"ncols": 100}
            self.bar = tqdm(total=total, initial=initial, desc=label, unit=f" {unit}", file=sys.stderr, **width)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def update(self, n: int = 1, **postfix: Any) -> None:
        """Count ``n`` more units done.

        Args:
            n: units done since the last call.
            postfix: numbers to show, e.g. ``loss=``, ``samples_per_s=``. Tensors are welcome: they are
                read only when a line is due, so an accelerator is not made to wait at every step.
        """
        self.done += n
        if not self._shown:
            return
        self._postfix.update(postfix)
        now = time.monotonic()
        if self.bar is not None:
            if now - self._last >= BAR_INTERVAL_S:
                self._last = now
                self.bar.set_postfix_str("  ".join(self._shown_postfix()), refresh=False)
            self.bar.update(n)
        elif now - self._last >= PLAIN_INTERVAL_S and self.done < self.total:
            self._last = now
            self._print(now)

    def close(self) -> None:
        """End the display with a last line: the time taken, or where it stopped. Harmless when repeated."""
        if not self._shown:
            return
        self._shown = False
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(self._shown_postfix()), refresh=True)
            self.bar.close()
            self.bar = None
        else:
            self._print(time.monotonic(), last=True)

    def _print(self, now: float, last: bool = False) -> None:
        elapsed = max(now - self._start, 1e-9)
        rate = (self.done - self.initial) / elapsed
        share = self.done / self.total if self.total > 0 else 1.0
        # Rounded down: 100% is said only when it is done.
        parts = [self._label, f"{math.floor(100 * share):3d}%", f"{self.done:,}/{self.total:,} {self.unit}"]
        if rate > 0 and not any(name.endswith("_per_s") for name in self._postfix):
            parts.append(f"{_short(rate)} {self.unit}/s")
        parts += self._shown_postfix()
        if not last:
            parts.append(f"eta {_duration((self.total - self.done) / rate)}" if rate > 0 else "eta ?")
        else:
            parts.append(f"{'done in' if self.done >= self.total else 'stopped after'} {_duration(elapsed)}")
        print("  ".join(parts), file=sys.stderr, flush=True)

    def _shown_postfix(self) -> list[str]:
        texts = []
        for name, value in self._postfix.items():
            if isinstance(value, str):
                texts.append(f"{name} {value}")
                continue
            number = float(value)
            if name.endswith("_per_s"):  # speed goes first, whatever the order of the arguments
                texts.insert(0, f"{_short(number)} {name.removesuffix('_per_s')}/s")
            else:
                whole = float(number).is_integer() and abs(number) < 1e15
                texts.append(f"{name} {int(number):,}" if whole and abs(number) >= 10 else f"{name} {number:.4f}")
        return texts


def _short(number: float) -> str:
    """Three significant digits with k, M, G: 38.1k."""
    if not math.isfinite(number):
        return str(number)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
