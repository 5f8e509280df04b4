"""Fixtures that several files of this folder share. What they need is imported when they are asked for: some files here
run without torch."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data set of ``tests/factories.py``; a file with other data has a fixture of this name."""
    from tests.factories import prepared

    return prepared(tmp_path_factory)


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a finished supernet of NASRec, to be read; who writes there copies it."""
    from embsearch_dist.methods.stages import run_stages
    from tests.unit.test_nasrec_scoring import OnlySupernet, nasrec_run

    directory = tmp_path_factory.mktemp("supernet") / "run"
    run_stages(OnlySupernet(), nasrec_run(data, directory))
    return directory


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The same in a run directory of the test's own."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session", autouse=True)
def rough_pictures() -> Iterator[None]:
    """The parts of a picture lie where they fall, and in place of a report's dark pictures stand the bytes of the light
    ones: most of a report's time goes into places and drawing. Tests of the scripts draw as users see it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_hex
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from embsearch_dist.report.style import DARK

    draw, light = FigureCanvasAgg.print_png, [b""]

    @functools.wraps(draw)  # savefig passes what its signature names
    def print_png(self: FigureCanvasAgg, target: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(target, BytesIO):  # a file, of a tool: drawn once
            draw(self, target, *arguments, **options)
            return
        if to_hex(self.figure.get_facecolor()) != DARK.background:
            drawn = BytesIO()
            draw(self, drawn, *arguments, **options)
            light[0] = drawn.getvalue()
        target.write(light[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        patch.setattr(FigureCanvasAgg, "print_png", print_png)
        yield
