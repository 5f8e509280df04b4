"""What a check is given: its device, a folder, the time that is left, and how it tells what it found."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.methods import CONFIGS
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from tools.bench.clock import Marks, timed
from tools.gpucheck.data import make_prepared, small_schema
from tools.gpucheck.worker import Wrong

T = TypeVar("T")
ROWS = {"train": 3200, "validation": 400, "test": 400}


class Lab:
    """Of one check.

    Attributes:
        kind: cpu | pretend | cuda.
        device: what tensors are told; the pretend one calls itself cuda, too.
        real: a GPU is there, so sizes are large and times mean something.
        folder: empty, for this check alone.
    """

    def __init__(
        self, kind: str, folder: Path, data: Path | None, deadline: float, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self.kind, self.folder, self.real = kind, folder, kind == "cuda"
        self._data, self._deadline, self._tell = data, deadline, tell
        if kind == "pretend":
            from tools.pretend import install

            install()
        if self.real and not torch.cuda.is_available():
            raise Wrong("torch.cuda.is_available() is False: no GPU, no driver, or a CPU build of torch")
        self.device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", 0)

    @property
    def where(self) -> str:
        """For ``run.device``."""
        return self.device.type

    def pick(self, small: T, large: T) -> T:
        """A size: the large one on a GPU."""
        return large if self.real else small

    def left(self) -> float:
        """Seconds until this check is stopped."""
        return self._deadline - time.monotonic()

    def note(self, **figures: Any) -> None:
        """Tell figures, at once: they are kept whatever comes after. Numbers and words are shown in the table,
        lists and dicts are in results.jsonl only. An underscore in a name is shown as a space."""
        self._tell({k.replace("_", " "): _plain(v) for k, v in figures.items()})

    def expect(self, fine: bool, text: str) -> None:
        """Fail the check, with this text, unless ``fine``."""
        if not fine:
            raise Wrong(text)

    def close(self, name: str, found: float, wanted: float, tolerance: float) -> float:
        """Fail unless two numbers are within ``tolerance``; returns how far apart they are."""
        apart = abs(found - wanted)
        self.expect(apart <= tolerance, f"{name}: {found:.6g}, should be {wanted:.6g} within {tolerance:g}")
        return apart

    def prepared(self) -> Path:
        """The data set that was given, or a small one made up; see :mod:`tools.gpucheck.data`."""
        if self._data is not None:
            return self._data
        folder = self.folder / "data"
        return folder if folder.exists() else make_prepared(folder, small_schema(), ROWS)

    @property
    def given(self) -> bool:
        """A data set was given."""
        return self._data is not None

    def config(self, *overrides: str, method: str = "ues") -> Config:
        """A config for this device; ``overrides`` are ``key=value``."""
        base = [f"run.device={self.where}", f"run.dir={self.folder / 'run'}", "dist.timeout_s=120"]
        return load_config(CONFIGS, None, [*base, *overrides], method)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Context]:
        """The process group of one rank, as training opens it."""
        config = self.config()
        with start(config.run, config.dist) as context:
            yield context

    def run(self, context: Context, *overrides: str, method: str = "ues") -> Run:
        """A run on the prepared data."""
        data = self.prepared()
        return Run(self.config(f"data.path={data}", *overrides, method=method), Schema.load(data), context)

    def network_space(self, name: str = "small") -> list[str]:
        """Settings of NASRec's space of that name on a GPU, elsewhere of a much smaller one."""
        tiny = ["search.space.blocks=2", "search.space.dense_widths=[16,32]", "search.space.sparse_widths=[16]"]
        return [f"search.space.name={name}", *([] if self.real else tiny)]

    def marks(self) -> Marks:
        """Marks on the device's time line; the pretend device has the host's."""
        return Marks(self.device if self.real else "cpu")

    def timed(self, work: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
        """Seconds of each of ``repeats`` calls; see :func:`tools.bench.clock.timed`."""
        return timed(work, self.device if self.real else "cpu", repeats, warmup)


def script(main: Callable[[Sequence[str]], None], *words: object) -> str:
    """Run the ``main`` of an entry script in this process, as its command line would; returns what it printed."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            main([str(w) for w in words])
    finally:
        print(printed.getvalue(), end="")
    return printed.getvalue()


def copy_bandwidth(lab: Lab) -> float:
    """Bytes/s that a plain copy on the device moves, those read and those written counted: the roof for tables."""
    size = lab.pick(1 << 24, 1 << 31)
    source, target = (torch.ones(size // 4, device=lab.device) for _ in range(2))
    return 2 * size / min(lab.timed(lambda: target.copy_(source), 5, 2))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
