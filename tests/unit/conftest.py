"""Fixtures that several files of this folder share. What they need is imported when they are asked for: some files here
run without torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

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
    """The parts of a picture lie where they fall, for a report's dark pictures stand the light ones, and TensorBoard
    gets empty pictures of heat maps: most of a short training's and a report's time goes into places and drawing.
    Tests of the scripts draw as users see it."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from embsearch_dist.report import style
    from embsearch_dist.train import monitor

    draw, light = style.drawn, [(b"", 0)]

    def once(picture: style.Draw, theme: style.Theme) -> tuple[bytes, int]:
        if theme is not style.DARK:
            light[0] = draw(picture, theme)
        return light[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
        patch.setattr(style, "drawn", once)
        patch.setattr(monitor, "draw_matrix", lambda *parts: Figure(figsize=(1, 1), dpi=20))
        yield
