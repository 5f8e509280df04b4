"""What changes while it is read, a model directory or rows to be predicted, is refused: nothing is a mixture of two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.data.formats import blocks
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.serving import predict as predicting
from embsearch_dist.serving.directory import MODEL, open_directory, write_checksums
from embsearch_dist.serving.predict import Job, predict
from tests.served import exported, run_of, single


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``other``, which is another model of the same data, and ``rows`` with two files."""
    folder = tmp_path_factory.mktemp("changes")
    lines = [f"{k % 3 % 2},u{k % 7},{k % 11}" for k in range(300)]
    (folder / "clicks.csv").write_text("\n".join(["click,user,x", *lines]) + "\n")
    (folder / "s.yaml").write_text("files: clicks.csv\nlabel: click\nfields: {user: categorical, x: dense}\n")
    prepare("table", folder / "s.yaml", folder / "out", quiet=True)
    run = run_of(folder / "out")
    exported(run, single(run, {"user": 4}), folder / "model")
    shutil.copytree(folder / "model", folder / "other")
    body = json.loads((folder / "other" / MODEL).read_text())
    (folder / "other" / MODEL).write_text(json.dumps({**body, "name": "of-tomorrow"}))
    write_checksums(folder / "other")
    (folder / "rows").mkdir()
    for name in ("b.csv", "c.csv"):
        (folder / "rows" / name).write_text("user,x\nu1,2\nu2,3\n")
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home, tmp_path / "place"))


def exchanged(place: Path) -> None:
    """As an export with --overwrite does it."""
    shutil.rmtree(place / "model")
    (place / "other").rename(place / "model")


def test_files_of_two_models_are_not_read_as_one(place: Path) -> None:
    opened = open_directory(place / "model")
    assert opened.model() is not None and len(opened.vocabulary("user")) == 7
    exchanged(place)
    for read in (opened.model, lambda: opened.vocabulary("user")):
        with pytest.raises(UserError, match="model: another model was put there while it was read. Start again"):
            read()
    assert open_directory(place / "model").body["name"] == "of-tomorrow"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (exchanged, "model: another model was put there while it was read"),
        (lambda place: (place / "rows" / "a.csv").write_text("user,x\nu3,4\n"), "a.csv was changed while it was read"),
        (lambda place: (place / "rows" / "b.csv").write_text("user,x\nu3,4\n"), "b.csv was changed while it was read"),
    ],
)
def test_all_processes_have_the_same_model_and_rows(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any], said: str
) -> None:
    """A file that arrives, or a new model, between the starts of two processes."""
    whole = predicting._Workers.__enter__

    def late(self: Any) -> Any:
        change(place)
        return whole(self)

    monkeypatch.setattr(predicting._Workers, "__enter__", late)
    with pytest.raises(UserError, match=said):
        predict(Job(place / "model", place / "rows", place / "s.parquet", processes=2))
    assert not list(place.glob("s.parquet*"))


def test_rows_that_are_still_written_are_not_predicted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line that is there may be half of one."""
    file, whole = place / "rows" / "b.csv", predicting._alone
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8)

    def growing(scorer: predicting.Scorer) -> Iterator[Any]:
        for k, piece in enumerate(whole(scorer)):
            if k == 0:
                with file.open("a") as more:
                    more.write("u4,1")
            yield piece

    monkeypatch.setattr(predicting, "_alone", growing)
    with pytest.raises(UserError, match=r"b.csv was changed while it was read\. Start again once the input is whole"):
        predict(Job(place / "model", file, place / "s.parquet"))
    assert not list(place.glob("s.parquet*"))
