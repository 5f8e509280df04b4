"""A prepare that was ended at any point: the same command continues it, and gives the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embsearch_dist.data.formats import blocks
from embsearch_dist.data.prepare import encode, partial, staging, vocabulary
from embsearch_dist.data.prepare.partial import JOB, MARK, whole_directory
from embsearch_dist.data.prepare.pipeline import STAGE, prepare
from embsearch_dist.data.prepare.scratch import save_record
from embsearch_dist.data.store.manifest import verify
from embsearch_dist.errors import UserError
from tests.raw_clicks import OPTIONS, digest, make_raw

KILLED = """
import os, signal, sys
from embsearch_dist.data.prepare import encode, staging, vocabulary
from embsearch_dist.data.formats import blocks
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.prepare.scratch import save_record
from tests.raw_clicks import OPTIONS
left = int(sys.argv[1])
def save(path, body):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    save_record(path, body)
for module in (encode, staging, vocabulary):
    module.save_record = save
blocks.BLOCK_BYTES = 5000
prepare("table", sys.argv[2], sys.argv[3], **OPTIONS)
"""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A source file and the digest of what it prepares to: 4 parts, 2 fields, 3 + 1 + 1 shards."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = make_raw(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", 5000)
        prepare("table", source, folder / "out", **OPTIONS)
    yield source, digest(folder / "out")


class Notes:
    """Counts the notes of finished work; the ``last`` one never gets written, as when Ctrl-C comes before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[str] = []
        self.last = 0
        for module in (encode, staging, vocabulary):
            monkeypatch.setattr(module, "save_record", self)

    def __call__(self, path: Path, body: dict) -> None:
        if len(self.written) + 1 == self.last:
            raise KeyboardInterrupt
        self.written.append(path.name)
        save_record(path, body)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    return Notes(monkeypatch)


def test_interrupted_anywhere_it_continues_and_repeats_nothing(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, str]], notes: Notes
) -> None:
    source, expected = undisturbed
    prepare("table", source, tmp_path / "whole", **OPTIONS)
    every = sorted(notes.written)
    assert len(every) == 4 + 1 + 2 + 5
    for last in range(1, len(every) + 1):
        out = tmp_path / f"out{last}"
        notes.written, notes.last = [], last
        with pytest.raises(KeyboardInterrupt):
            prepare("table", source, out, **OPTIONS)
        assert not out.exists() and (tmp_path / f"out{last}.partial" / JOB).exists()
        notes.last = 0
        prepare("table", source, out, **OPTIONS)
        assert sorted(notes.written) == every, "each part, field and shard was done once"
        assert digest(out) == expected
        assert not (tmp_path / f"out{last}.partial").exists()


@pytest.mark.parametrize("last", [3, 10])
def test_killed_it_continues(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, str]], repo_root: Path, capsys: pytest.CaptureFixture, last: int
) -> None:
    source, expected = undisturbed
    script = [sys.executable, "-c", KILLED, str(last), str(source), str(tmp_path / "out")]
    done = subprocess.run(script, env=os.environ | {"PYTHONPATH": str(repo_root)}, check=False)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    begun = {p.name for p in (tmp_path / "out.partial" / STAGE).iterdir()}
    assert "part-00000.json" in begun
    prepare("table", source, tmp_path / "out", **OPTIONS | {"quiet": False})
    assert "out.partial: continuing what an earlier start left" in capsys.readouterr().err
    assert digest(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("stage/part-00001.arrays", "part-00001.json"),
        ("vocabulary/user.parquet", "field-user.json"),
        ("stage/field-price.arrays", "field-price.json"),
        ("train/part-00001.parquet", "shard-train-00001.json"),
    ],
)
@pytest.mark.parametrize(
    "change", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-1]], ids=["one bit", "shorter"]
)
def test_what_was_damaged_meanwhile_is_done_again(
    tmp_path: Path,
    undisturbed: tuple[Path, dict[str, str]],
    notes: Notes,
    file: str,
    again: str,
    change: Callable[[bytes], bytes],
) -> None:
    source, expected = undisturbed
    notes.last = 12
    with pytest.raises(KeyboardInterrupt):
        prepare("table", source, tmp_path / "out", **OPTIONS)
    path = tmp_path / "out.partial" / file
    path.write_bytes(change(path.read_bytes()))
    notes.written, notes.last = [], 0
    prepare("table", source, tmp_path / "out", **OPTIONS)
    assert again in notes.written and len(notes.written) <= 3
    assert digest(tmp_path / "out") == expected


@pytest.mark.parametrize("changed", ["--seed", "clicks.csv"])
def test_other_input_or_options_start_over(
    tmp_path: Path, notes: Notes, capsys: pytest.CaptureFixture, changed: str
) -> None:
    source = make_raw(tmp_path)
    notes.last = 9
    with pytest.raises(KeyboardInterrupt):
        prepare("table", source, tmp_path / "out", **OPTIONS)
    options = OPTIONS | {"quiet": False}
    if changed == "--seed":
        options["seed"] = 3
    else:
        os.utime(tmp_path / "clicks.csv", ns=(0, 5))
    notes.written, notes.last = [], 0
    prepare("table", source, tmp_path / "out", **options)
    said = capsys.readouterr().err
    assert "out.partial: left by other input or options (" in said and f"{changed}); starting over" in said
    assert len(notes.written) == 12


def test_finished_but_not_renamed_it_is_only_checked(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, str]], notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = undisturbed

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(partial, "_finish", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare("table", source, tmp_path / "out", **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)
    notes.written = []
    prepare("table", source, tmp_path / "out", **OPTIONS)
    assert notes.written == [] and digest(tmp_path / "out") == expected
    verify(tmp_path / "out")


def test_bad_input_leaves_nothing_and_a_full_disk_leaves_what_is_done(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_raw(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "write_arrays", full)
        with pytest.raises(UserError, match=r"No space left on device. Check the disk"):
            prepare("table", source, tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out.partial" / STAGE / "part-00003.json").exists()
    with (tmp_path / "clicks.csv").open("a") as f:
        f.write("1,1,a,cheap,1\n")
    with pytest.raises(UserError, match=r"clicks.csv, line 1002, column 'price': not a finite number: 'cheap'"):
        prepare("table", source, tmp_path / "out", **OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clicks.csv", "source.yaml"]


def test_input_that_changes_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_raw(tmp_path)
    build = vocabulary.build

    def touching(*args: object) -> vocabulary.Vocabulary:
        os.utime(tmp_path / "clicks.csv", ns=(0, 1))
        return build(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(vocabulary, "build", touching)
    with pytest.raises(UserError, match="the input was changed while it was read"):
        prepare("table", source, tmp_path / "out", **OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clicks.csv", "source.yaml"]


def test_without_a_job_nothing_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "out", False) as directory:
        assert (directory / MARK).exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
