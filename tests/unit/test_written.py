"""Files of a run directory are held to the list of what was written there: exchanged and lost ones are noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from embsearch_dist import written
from embsearch_dist.errors import UserError
from embsearch_dist.files import copy_sealed, read_json, read_sealed, write_json, write_sealed
from embsearch_dist.rundir import hold, release
from embsearch_dist.train.lines import compare_lines, lines_of
from embsearch_dist.train.monitor import Monitor


def home(folder: Path, *values: int) -> Path:
    """A run directory in which ``found.json`` was written once for each value."""
    hold(folder, "test")
    release()
    for value in values:
        write_sealed(folder / "deep" / "found.json", {"value": value})
    return folder / "deep" / "found.json"


def test_that_of_another_run_and_an_older_one_are_refused(tmp_path: Path) -> None:
    mine, other = home(tmp_path / "a", 1), home(tmp_path / "b", 2)
    assert read_sealed(mine)["value"] == 1
    shutil.copy(mine, tmp_path / "older.json")
    write_sealed(mine, {"value": 3})
    assert read_sealed(mine)["value"] == 3
    for stranger in (other, tmp_path / "older.json"):
        shutil.copy(stranger, mine)
        with pytest.raises(UserError, match=r"deep/found.json is not the file that was written there .*written.json"):
            read_sealed(mine, "Search again")
    write_json(mine, {"value": 7})  # without a checksum: a person has put it there
    assert read_sealed(mine)["value"] == 7


def test_a_kill_beside_the_rename_leaves_both_right(tmp_path: Path) -> None:
    mine = home(tmp_path / "a", 1)
    before = mine.read_bytes()
    for replaced in (False, True):
        with pytest.raises(KeyboardInterrupt), written.listed(mine, "f" * 64):
            if replaced:
                write_json(mine, {"value": 2, "sha256": "f" * 64})
            raise KeyboardInterrupt
        written.check(mine, read_json(mine)["sha256"], "")
    with pytest.raises(UserError, match="not the file that was written"):
        written.check(mine, json.loads(before)["sha256"][::-1], "")
    write_sealed(mine, {"value": 2})
    mine.write_bytes(before)
    with pytest.raises(UserError, match="not the file that was written"):
        read_sealed(mine)


def test_a_damaged_list_is_named_and_none_compares_nothing(tmp_path: Path) -> None:
    mine = home(tmp_path / "a", 1)
    path = tmp_path / "a" / written.LIST
    text = path.read_text()
    for broken in (text[:-30], text.replace("found", "bound"), "[]", "", "[" * 5000):
        path.write_text(broken)
        with pytest.raises(UserError, match="written.json.*Delete it"):
            read_sealed(mine)
    path.unlink()
    assert read_sealed(mine)["value"] == 1
    copy_sealed(mine, tmp_path / "elsewhere.json")
    assert not (tmp_path / written.LIST).exists()


def test_what_has_no_checksum_of_its_own_is_listed_too(tmp_path: Path) -> None:
    home(tmp_path / "a")
    file = tmp_path / "a" / "rows.npy"
    file.write_bytes(b"12")
    written.adopt(file, written.file_checksum(file))
    written.check_file(file, "")
    assert written.knows(file) and written.log()[-1] == file
    file.write_bytes(b"13")
    with pytest.raises(UserError, match="rows.npy is not the file.*Search again"):
        written.check_file(file, "Search again")


def test_lines_that_are_not_what_a_checkpoint_remembers_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, "fit", quiet=True) as monitor:
        for step in (1, 2, 2):
            monitor.scalars(step, {"loss": step / 4})
        known = monitor.lines
        monitor.scalars(2, {"auc": 0.5})  # of an evaluation that the checkpoint came before
        monitor.scalars(3, {"loss": 0.75})
    assert known["metrics.jsonl"][0] == 3
    with Monitor(tmp_path, "fit") as monitor:
        monitor.resume_at(2, known)
        assert monitor.lines == known == lines_of(tmp_path, "fit") and capsys.readouterr().out == ""
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.25", "0.35"))
    with Monitor(tmp_path, "fit") as monitor:
        monitor.resume_at(2, known)
        assert f"{path}: the lines of stage 'fit' are not those" in capsys.readouterr().out
    assert compare_lines(tmp_path, "fit", None) == []
    path.unlink()
    assert len(compare_lines(tmp_path, "fit", known)) == 1
