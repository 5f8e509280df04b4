"""Made-up Criteo rows: the form of the file, rows that depend on their number alone, drift, and a planted signal."""

from __future__ import annotations

import fcntl
import functools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from embsearch_dist.data.formats import LABEL, open_source
from embsearch_dist.data.planted import criteo_like
from embsearch_dist.data.planted.criteo_like import (
    BASE_RATE,
    CATEGORIES,
    NUMBERS,
    PAIRS,
    RANKS,
    REFERENCE_ROWS,
    TURNOVER,
    Category,
    CriteoLike,
    Drawn,
    model,
    value_names,
)
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from tools.make.criteo import CHUNK_ROWS, main, make

CATEGORY = {c.name: c for c in CATEGORIES}


@functools.cache
def spread(n: int = 100_000) -> Drawn:
    """Rows evenly spread over the whole file, so that shares are not those of one time of day."""
    return model(0).draw(np.arange(n, dtype=np.uint64) * np.uint64(REFERENCE_ROWS) // np.uint64(n))


def test_every_line_has_the_form_of_criteo() -> None:
    data, clicks = model(0).text(123, 2_123)
    line = re.compile(r"[01](\t(0|-?[1-9][0-9]*)?){13}(\t([0-9a-f]{8})?){26}\n")
    lines = data.decode().splitlines(keepends=True)
    assert len(lines) == 2_000
    assert [text for text in lines if not line.fullmatch(text)] == []
    assert sum(text[0] == "1" for text in lines) == clicks


def test_the_reader_finds_what_was_drawn(tmp_path: Path) -> None:
    make(tmp_path / "made", 3_000, start=40_000_000, quiet=True)
    frame = next(iter(open_source("criteo", tmp_path / "made").chunks())).frame
    drawn = model(0).draw(np.arange(40_000_000, 40_003_000, dtype=np.uint64))
    assert np.array_equal(frame[LABEL].to_numpy() == 1, drawn.label)
    for i, c in enumerate(CATEGORIES):
        names = [f"{name:08x}" for name in value_names(i, drawn.values[c.name])]
        missing = drawn.missing.get(c.name, np.zeros(3_000, bool))
        assert frame[c.name].to_list() == [None if m else n for n, m in zip(names, missing, strict=True)], c.name
    # The reader buckets numbers, so they are compared as they stand in the file.
    lines = (tmp_path / "made" / "train.txt").read_text().splitlines()
    for cells, n in zip(list(zip(*(line.split("\t") for line in lines), strict=True))[1:14], NUMBERS, strict=True):
        missing = drawn.missing.get(n.name, np.zeros(3_000, bool))
        assert list(cells) == ["" if m else str(x) for m, x in zip(missing, drawn.numbers[n.name], strict=True)]


def test_a_row_depends_on_seed_and_number_alone() -> None:
    whole = model(0).text(0, 40_000)[0]
    cuts = [0, 1, 7, 16_384, 16_385, 30_001, 40_000]
    assert b"".join(CriteoLike(0).text(a, b)[0] for a, b in zip(cuts, cuts[1:], strict=False)) == whole
    lines = whole.splitlines()
    assert model(0).text(20_000, 20_003)[0].splitlines() == lines[20_000:20_003]
    assert model(0).text(5, 40_000, 2)[0].splitlines() == lines[5::2]
    other = CriteoLike(1).text(0, 100)[0].splitlines()
    assert not set(other) & set(lines)


def test_parts_and_workers_change_no_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(CHUNK_ROWS + 5_000)
    assert main(["--out", str(tmp_path / "one.tsv"), "--rows", rows, "--start", "77"]) == 0
    assert re.search(rf"one.tsv: {int(rows):,} rows, 0.02 GB in .* rows/s", capsys.readouterr().out)
    options = ["--parts", "3", "--workers", "2", "--start", "77", "--quiet"]
    assert main(["--out", str(tmp_path / "parts"), "--rows", rows, *options]) == 0
    parts = sorted((tmp_path / "parts").glob("train-*.txt"))
    whole = (tmp_path / "one.tsv").read_bytes()
    assert len(parts) == 3 and b"".join(p.read_bytes() for p in parts) == whole
    one, several = read_json(tmp_path / "truth.json"), read_json(tmp_path / "parts" / "truth.json")
    assert several.pop("files") == [p.name for p in parts] and one.pop("files") == ["one.tsv"]
    assert one == several and one["rank"] == RANKS and one["start"] == 77
    labels = [line[:1] for line in whole.splitlines()]
    assert one["base_rate"] == labels.count(b"1") / len(labels)
    assert capsys.readouterr() == ("", "")


def test_every_tenth_row_in_parts(tmp_path: Path) -> None:
    tenth, options = tmp_path / "tenth", ["--parts", "2", "--workers", "2", "--quiet"]
    assert main(["--out", str(tenth), "--rows", "7001", "--every", "10", "--start", "3", *options]) == 0
    written = [p.read_bytes().splitlines() for p in sorted(tenth.glob("train-*.txt"))]
    assert [len(lines) for lines in written] == [3_500, 3_501]
    assert written[0] + written[1] == model(0).text(3, 70_013)[0].splitlines()[::10]
    truth = read_json(tenth / "truth.json")
    assert (truth["rows"], truth["every"]) == (7_001, 10)
    # The effects are those of the rows that were passed over, too.
    assert truth["bayes_auc"] == model(0).bayes_auc(3, 70_013)


def test_names_are_one_to_one_and_look_arbitrary() -> None:
    for field, first in ((0, 0), (2, 2**31 - 100_000), (25, 2**32 - 300_000)):
        index = np.arange(first, first + 300_000).astype(np.uint32)
        names = value_names(field, index)
        assert len(np.unique(names)) == len(names)
        # Neighbours share half of their bits, as unrelated numbers do.
        assert abs(np.bitwise_count(names[1:] ^ names[:-1]).mean() - 16) < 0.1
    assert not (value_names(0, np.arange(1000)) == value_names(1, np.arange(1000))).any()


def test_blanks_magnitudes_and_base_rate_are_those_stated() -> None:
    drawn = spread()
    assert abs(drawn.label.mean() - BASE_RATE) < 0.006
    assert {c.name for c in (*NUMBERS, *CATEGORIES) if c.missing} == set(drawn.missing)
    for c in (*NUMBERS, *CATEGORIES):
        if c.missing:
            assert abs(drawn.missing[c.name].mean() - c.missing) < 0.007, c.name
    for c in NUMBERS:
        x = drawn.numbers[c.name]
        assert abs((x == 0).mean() - c.zero) < 0.006
        assert all(abs((x == -k).mean() - share) < 0.004 for k, share in zip((1, 2, 3), c.minus, strict=True))
        # What would round to 0 is 1, which lifts the columns of small numbers.
        size = np.log(x[x > 0])
        assert -0.02 < size.mean() - c.mean < 0.25 and abs(size.std() / c.std - 1) < 0.25, c.name
    assert drawn.numbers["I2"].min() == -3 and drawn.numbers["I5"].max() > 1_000_000
    assert drawn.numbers["I10"].max() < 10


def test_columns_with_signal_share_no_blanks_with_columns_without() -> None:
    missing = spread().missing
    assert np.array_equal(missing["C25"], missing["C26"]), "as in the real file"
    idle, telling = (missing[n] for n in ("C20", "C26"))
    assert abs((idle & telling).mean() - idle.mean() * telling.mean()) < 0.006


def expected_distinct(c: Category, rows: int) -> float:
    """Distinct values among the first ``rows`` rows, ``rows <= REFERENCE_ROWS``, from the stated popularity."""
    edges = np.unique(np.concatenate([np.arange(min(c.alive, 300) + 1), np.geomspace(1, c.alive, 3000).astype(int)]))
    below = (edges + c.offset) ** (1 - c.exponent)
    slots = np.diff(edges)
    each = np.diff(below) / (below[-1] - below[0]) / slots * rows * (1 - c.missing)
    seen = lambda share: float((slots * -np.expm1(-each * share)).sum())  # noqa: E731
    turned = TURNOVER * rows / REFERENCE_ROWS if c.turns else 0.0
    # A slot that changes hands does so at a time spread evenly: its two values share its rows.
    shares = (np.arange(50) + 0.5) / 50
    return (1 - turned) * seen(1) + turned * float(np.mean([seen(s) + seen(1 - s) for s in shares]))


def test_the_whole_file_would_show_about_the_published_numbers_of_values() -> None:
    for c in CATEGORIES:
        assert 0.85 < expected_distinct(c, REFERENCE_ROWS) / c.published < 1.05, c.name
        if not c.slots:
            assert len(np.unique(spread().values[c.name])) <= c.published
    # The expectation is that of the rows: compare where counting is cheap.
    first = model(0).draw(np.arange(100_000, dtype=np.uint64))
    for name in ("C2", "C3", "C15", "C26"):
        values = first.values[name]
        if name in first.missing:
            values = values[~first.missing[name]]
        # Some slots are in handover at any time and show two values, hence the wider upper side.
        assert 0.95 < len(np.unique(values)) / expected_distinct(CATEGORY[name], 100_000) < 1.1, name


def test_late_rows_have_values_that_early_ones_lack() -> None:
    n = 50_000
    early, soon, late = (
        model(0).draw(np.arange(start, start + n, dtype=np.uint64)).values for start in (0, n, REFERENCE_ROWS - n)
    )
    for c in CATEGORIES:
        unseen_soon, unseen_late = (1 - np.isin(x[c.name], early[c.name]).mean() for x in (soon, late))
        if c.turns:
            assert unseen_late > unseen_soon + 0.04, c.name
        else:
            assert unseen_late < unseen_soon + 0.005, c.name


def test_labels_follow_the_stated_probabilities() -> None:
    drawn, auc = spread(), model(0).bayes_auc(sample=100_000)
    order = np.argsort(np.argsort(drawn.logit)) + 1.0
    n = drawn.label.sum()
    reached = (order[drawn.label].sum() - n * (n + 1) / 2) / (n * (len(order) - n))
    assert auc > 0.7 and abs(reached - auc) < 0.006
    assert abs(model(0).bayes_auc(0, 50_000) - auc) < 0.02


def test_fields_of_rank_zero_tell_nothing_about_the_label() -> None:
    drawn = spread()
    rate = drawn.label.mean()

    def explained(column: str) -> float:
        """Chi-square of the label by value (a blank is one), in standard deviations from what chance gives."""
        x = drawn.values[column].astype(np.int64) if column in drawn.values else drawn.numbers[column] // 8
        x = np.unique(np.where(drawn.missing.get(column, False), -9, x), return_inverse=True)[1]
        rows, clicks = np.bincount(x), np.bincount(x, weights=drawn.label)
        free = len(rows) - 1
        return float((((clicks - rows * rate) ** 2 / (rows * rate * (1 - rate))).sum() - free) / (2 * free) ** 0.5)

    idle = [name for name, rank in RANKS.items() if rank == 0]
    assert len(idle) >= 12 and {"C3", "C9"} <= set(idle), "the largest and the smallest field are idle"
    assert [name for name in idle if explained(name) > 4] == []
    loud = [*(n.name for n in NUMBERS if n.slope), *(c.name for c in CATEGORIES if c.main)]
    assert [name for name in loud if explained(name) < 8] == []


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.left}-{p.right}")
def test_a_pair_has_the_stated_rank(pair: criteo_like.Pair) -> None:
    """All combinations of some values of the two fields, the rest fixed: the table's interaction part."""
    n = [min(CATEGORY[name].published, 60) for name in (pair.left, pair.right)]
    left, right = (grid.ravel() for grid in np.meshgrid(*map(np.arange, n), indexing="ij"))
    values = {c.name: np.zeros(len(left), np.uint32) for c in CATEGORIES}
    values |= {pair.left: left.astype(np.uint32), pair.right: right.astype(np.uint32)}
    numbers = {c.name: np.zeros(len(left), np.int64) for c in NUMBERS}
    table = model(0)._logit(numbers, values, {}, np.zeros(len(left))).reshape(n)
    table -= table.mean(0)
    table -= table.mean(1, keepdims=True)
    assert np.linalg.matrix_rank(table, tol=1e-8) == pair.rank
    assert RANKS[pair.left] == RANKS[pair.right] == pair.rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "--rows must be at least 1, got 0"),
        ({"rows": 5, "start": -1}, "--start must be at least 0"),
        ({"rows": 5, "every": 0}, "--every must be at least 1"),
        ({"rows": 5, "workers": 0}, "--workers must be at least 1"),
        ({"rows": 5, "parts": 6}, "--parts 6 is more than the 5 rows"),
        ({"rows": 5, "seed": -1}, "--seed must be at least 0, got -1"),
        ({"rows": 5, "start": 10**12}, "--start plus --rows is 1,000,000,000,005"),
        ({"rows": 5, "every": 10**11}, "--start plus --rows times --every is 500,000,000,000. Give less"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.txt").write_text("mine")
    assert main(["--out", str(tmp_path), "--rows", "10"]) == 2
    assert "train.txt exists. Give another --out" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["train.txt"] and (tmp_path / "train.txt").read_text() == "mine"


def test_a_full_disk_is_seen_before_hours_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"10,000,000 rows take 2.4 GB, 0.0 are free. Give fewer --rows"):
        make(tmp_path, 10_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_nothing_and_a_killed_one_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "train.txt.partial"
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing it"):
            make(tmp_path, 10, quiet=True)
    assert partial.exists()
    partial.write_text("half of an earlier run")
    with monkeypatch.context() as broken:
        broken.setattr(criteo_like, "text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(tmp_path, 10, quiet=True)
    assert list(tmp_path.iterdir()) == []
    partial.write_text("half of an earlier run")
    make(tmp_path, 10, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.txt", "truth.json"]
    assert (tmp_path / "train.txt").read_bytes() == model(0).text(0, 10)[0]
