"""prepare.py --vocabulary: ids, means and deviations of earlier data are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from embsearch_dist.data.formats import blocks
from embsearch_dist.data.load.dataset import read_rows
from embsearch_dist.data.prepare import vocabulary
from embsearch_dist.data.prepare.partition import write_group
from embsearch_dist.data.prepare.pipeline import prepare, summary
from embsearch_dist.data.prepare.vocabulary import load_values
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS, Schema
from tests.ranks import run_ranks
from tests.raw_clicks import OPTIONS, digest, make_raw
from tests.unit.test_prepare import raw_rows


def make_day(folder: Path, day: int) -> Path:
    """Another day's log of the same form: other rows, and users that the day before did not have."""
    folder.mkdir()
    source = make_raw(folder, seed=day)
    if day:
        text = (folder / "clicks.csv").read_text().replace(",u0,", ",new-a,").replace(",u1,", ",new-b,", 30)
        (folder / "clicks.csv").write_text(text.replace(",u49,", ",once,", 1))
    return source


@pytest.fixture
def days(tmp_path: Path) -> tuple[Path, Path]:
    first, second = make_day(tmp_path / "day0", 0), make_day(tmp_path / "day1", 1)
    prepare("table", first, tmp_path / "first", min_count=2, **OPTIONS)
    return first, second


def test_old_values_keep_their_ids_and_new_ones_get_those_behind(tmp_path: Path, days: tuple[Path, Path]) -> None:
    schema = prepare("table", days[1], tmp_path / "out", min_count=10, vocabulary=tmp_path / "first", **OPTIONS)
    old, new = (load_values(tmp_path / d, "user") for d in ("first", "out"))
    assert new["value"].to_list() == [*old["value"].to_list(), "new-a", "new-b"], "by falling count; not `once`"
    assert new["id"].to_list() == list(range(1, len(new) + 1))
    assert new.row(old["value"].to_list().index("u0"))[2] == 0, "its count is of today's rows, which lack it"
    raw, users = raw_rows(days[1]), new["value"].to_list()
    found = [i for name in SPLITS for i in read_rows(tmp_path / "out", schema, name)[0][0].tolist()]
    assert sorted(found) == sorted(users.index(r[2]) + 1 if r[2] in users else 0 for r in raw)
    assert schema.provenance["fields"]["user"]["new"] == 2  # type: ignore[index,call-overload]
    assert "kept, " in summary(schema) and "(extend)" in summary(schema)


def test_frozen_no_value_gets_a_new_id_and_a_row_is_encoded_as_it_was(tmp_path: Path, days: tuple[Path, Path]) -> None:
    first = Schema.load(tmp_path / "first")
    frozen = {"vocabulary": tmp_path / "first", "vocabulary_new": "freeze"}
    later = prepare("table", days[1], tmp_path / "out", min_count=1, **frozen, **OPTIONS)
    assert later.fingerprint == first.fingerprint
    # The first day's rows among the later day's: every number of theirs is what it was.
    both = (tmp_path / "day0" / "clicks.csv").read_text() + "\n".join(
        (tmp_path / "day1" / "clicks.csv").read_text().splitlines()[1:]
    )
    (tmp_path / "day1" / "clicks.csv").write_text(both + "\n")
    mixed = prepare("table", days[1], tmp_path / "mixed", min_count=1, **frozen, **OPTIONS)

    def rows(directory: str, schema: Schema) -> list[tuple[float, ...]]:
        parts = [read_rows(tmp_path / directory, schema, name) for name in SPLITS]
        return [tuple(map(float, r)) for ids, x, y in parts for r in np.column_stack([*ids, x, y]).tolist()]

    among = rows("mixed", mixed)
    assert len(among) == 2000 and all(row in among for row in rows("first", first))


def test_own_frozen_vocabulary_changes_no_byte_of_the_data(tmp_path: Path, days: tuple[Path, Path]) -> None:
    for new in ("freeze", "extend"):
        again = prepare(
            "table", days[0], tmp_path / new, min_count=2, vocabulary=tmp_path / "first", vocabulary_new=new, **OPTIONS
        )
        old, found = digest(tmp_path / "first"), digest(tmp_path / new)
        assert {k for k in old if old[k] != found[k]} == {"schema.json", "manifest.json"}, "they tell how it was made"
        assert again.fingerprint == Schema.load(tmp_path / "first").fingerprint


def test_memory_and_processes_change_nothing(
    tmp_path: Path, days: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    options = {"min_count": 3, "vocabulary": tmp_path / "first", **OPTIONS}
    prepare("table", days[1], tmp_path / "one", **options)
    monkeypatch.setattr(vocabulary, "PASS_VALUES", 10)
    monkeypatch.setattr(vocabulary, "BATCH_VALUES", 5)
    prepare("table", days[1], tmp_path / "tight", **options)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")  # what it is decides, not where it lies
    run_ranks(_work, 2, tmp_path, str(days[1]), str(tmp_path / "two"), str(tmp_path / "copy"), init=False)
    assert digest(tmp_path / "tight") == digest(tmp_path / "one") == digest(tmp_path / "two")


def _work(rank: int, world_size: int, source: str, out: str, old: str) -> None:
    from embsearch_dist.data.prepare.team import from_environment

    blocks.BLOCK_BYTES = 1000
    prepare("table", source, out, team=from_environment(), min_count=3, vocabulary=old, **OPTIONS)


def test_work_left_with_another_vocabulary_is_not_continued(
    tmp_path: Path, days: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from embsearch_dist.data.prepare import pipeline

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare("table", days[1], tmp_path / "out", min_count=3, **OPTIONS)
    monkeypatch.undo()
    schema = prepare("table", days[1], tmp_path / "out", min_count=3, vocabulary=tmp_path / "first", quiet=False)
    assert "left by other input or options (" in (told := capsys.readouterr().err) and "--vocabulary" in told
    assert load_values(tmp_path / "out", "user")["value"].to_list()[: len(load_values(tmp_path / "first", "user"))] == (
        load_values(tmp_path / "first", "user")["value"].to_list()
    )
    assert schema.provenance["vocabulary"]["new"] == "extend"  # type: ignore[index,call-overload]


def test_ids_of_all_days_before_are_known_to_be_kept(tmp_path: Path, days: tuple[Path, Path]) -> None:
    from embsearch_dist.data.store.manifest import identity

    second = prepare("table", days[1], tmp_path / "second", vocabulary=tmp_path / "first", **OPTIONS)
    third = prepare("table", days[0], tmp_path / "third", vocabulary=tmp_path / "second", **OPTIONS)
    known = [identity(tmp_path / n, s) for n, s in (("second", second), ("first", Schema.load(tmp_path / "first")))]
    assert third.provenance["vocabulary"]["keeps"] == known  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{user: categorical, price: bucketed, other: dense}", "the earlier data lack field 'other'"),
        ("{user: categorical, price: bucketed}", "these data lack field 'score'"),
        ("{user: categorical, price: categorical, score: dense}", "field 'price' is of another type: kind 'bucketed'"),
        ("{price: bucketed, user: categorical, score: dense}", "the fields come in another order, from 'price' on"),
        ("{user: {kind: list, pooling: mean}, price: bucketed, score: dense}", "field 'user' is of another type"),
    ],
)
def test_data_with_other_columns_are_refused(tmp_path: Path, days: tuple[Path, Path], line: str, told: str) -> None:
    text = days[1].read_text().replace("{user: categorical, price: bucketed, score: dense}", line)
    days[1].write_text(text)
    csv = tmp_path / "day1" / "clicks.csv"
    csv.write_text(csv.read_text().replace("price,score", "price,other", 1) if "other" in line else csv.read_text())
    with pytest.raises(UserError, match="--vocabulary .*" + told):
        prepare("table", days[1], tmp_path / "out", vocabulary=tmp_path / "first", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_an_earlier_vocabulary_is_told(tmp_path: Path, days: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="not a prepared data set"):
        prepare("table", days[1], tmp_path / "out", vocabulary=tmp_path, **OPTIONS)
    with pytest.raises(UserError, match="would be replaced"):
        prepare("table", days[1], tmp_path / "first", vocabulary=tmp_path / "first", overwrite=True, **OPTIONS)
    with pytest.raises(UserError, match="Copy the data here"):
        prepare("table", days[1], tmp_path / "out", vocabulary="s3://bucket/first", **OPTIONS)
    with pytest.raises(UserError, match="--vocabulary-new says what becomes of values"):
        prepare("table", days[1], tmp_path / "out", vocabulary_new="freeze", **OPTIONS)
    file = tmp_path / "first" / "vocabulary" / "user.parquet"
    body = bytearray(file.read_bytes())
    body[20] ^= 1
    file.write_bytes(bytes(body))
    with pytest.raises(UserError, match=r"user\.parquet: not the file that manifest\.json describes"):
        prepare("table", days[1], tmp_path / "out", vocabulary=tmp_path / "first", **OPTIONS)


def test_a_group_of_rows_has_no_vocabulary(tmp_path: Path, days: tuple[Path, Path]) -> None:
    schema = Schema.load(tmp_path / "first")
    assignment = {name: np.zeros(n, np.int64) for name, n in schema.rows.items()}
    write_group(tmp_path / "first", schema, assignment, 0, tmp_path / "group")
    with pytest.raises(UserError, match=r"--vocabulary .*group: it has no vocabulary of field .* Give the data"):
        prepare("table", days[1], tmp_path / "out", vocabulary=tmp_path / "group", **OPTIONS)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("later", "told"), [("3.5", 1), ("3", 0), ("", 0)])
def test_a_column_that_was_constant_and_stays_zeros_is_told(tmp_path: Path, later: str, told: int) -> None:
    for name, value in (("a", "3"), ("b", later)):
        (tmp_path / f"{name}.csv").write_text("y,u,p\n" + "".join(f"{k % 2},{k % 5},{value}\n" for k in range(100)))
        fields = "{u: categorical, p: dense}"
        (tmp_path / f"{name}.yaml").write_text(f"files: {name}.csv\nlabel: y\nfields: {fields}\n")
    prepare("table", tmp_path / "a.yaml", tmp_path / "first", **OPTIONS)
    schema = prepare("table", tmp_path / "b.yaml", tmp_path / "out", vocabulary=tmp_path / "first", **OPTIONS)
    warnings = schema.provenance["warnings"]
    assert isinstance(warnings, list)
    said = [w for w in warnings if "'p' was constant (3) in the data of --vocabulary and stays zeros" in w]
    assert len(said) == told
