"""Which files predict takes as rows, how it cuts them, and what it passes on."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.serving.directory import ModelDirectory, open_directory
from embsearch_dist.serving.narrow import narrow_columns
from embsearch_dist.serving.predict import Job, predict
from launch.predict import main
from tests.served import exported, run_of, single

ROWS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    """A model of a user and a number."""
    return made(tmp_path_factory.mktemp("rows"), "")


def made(folder: Path, keys: str, separator: str = ",", encoding: str = "utf-8", first: int = 0) -> ModelDirectory:
    """A model of ``user`` and ``x``, trained on ``clicks.csv`` with some keys of the source file."""
    rng = np.random.default_rng(0)
    columns = {
        "click": rng.integers(0, 2, ROWS),
        "user": first + rng.integers(0, 20, ROWS),
        "x": rng.standard_normal(ROWS),
    }
    text = pl.DataFrame(columns).write_csv(separator=separator)
    (folder / "clicks.csv").write_text(text, encoding=encoding)
    fields = "{user: categorical, x: dense}"
    (folder / "s.yaml").write_text(f"files: clicks.csv\n{keys}label: click\nfields: {fields}\n")
    prepare("table", folder / "s.yaml", folder / "out", quiet=True)
    run = run_of(folder / "out", "model.hidden=[8]")
    exported(run, single(run, {"user": 4}), folder / "model")
    return open_directory(folder / "model")


def rows(n: int = 20, first: int = 0) -> pl.DataFrame:
    return pl.DataFrame({"user": [k % 25 for k in range(first, first + n)], "x": [k / 7 for k in range(n)]})


def logits(model: ModelDirectory, given: Path, out: Path, **options: object) -> list[float]:
    predict(Job(model.path, given, out, **options))  # type: ignore[arg-type]
    return pl.read_parquet(out)["logit"].to_list()


def test_a_pattern_gives_its_files_in_the_order_of_their_names(
    model: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(30)
    for k in (2, 10, 1):
        (tmp_path / f"w[1]/parts/day={k}").mkdir(parents=True)
        first = {1: 0, 2: 10, 10: 20}[k]
        whole[first : first + 10].write_csv(tmp_path / f"w[1]/parts/day={k}/a.csv")
    whole.write_csv(tmp_path / "whole.csv")
    wanted = logits(model, tmp_path / "whole.csv", tmp_path / "whole.out")
    monkeypatch.chdir(tmp_path / "w[1]")  # that of the working folder's name is no pattern
    for pattern in ("parts/*/*.csv", "parts/**/*.csv", "./parts/day=*/?.csv"):
        assert logits(model, Path(pattern), Path("s.parquet"), overwrite=True) == wanted
    assert logits(model, Path("parts/*/*.csv"), Path("s.parquet"), overwrite=True, processes=2) == wanted
    with pytest.raises(UserError, match=r"--input parts/\*\.csv: no file fits the pattern"):
        predict(Job(model.path, Path("parts/*.csv"), Path("t.parquet")))


def test_scores_are_not_written_where_the_next_call_reads_rows(
    model: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    rows().write_parquet(folder / "a.parquet")
    monkeypatch.chdir(folder)
    given = [(folder, folder / "s.parquet"), (folder, tmp_path / "link" / "s.parquet"), (Path("."), Path("s.parquet"))]
    given += [(Path("*.parquet"), Path("s.parquet")), (tmp_path / "**" / "*.parquet", tmp_path / "link" / "s.parquet")]
    for named, out in given:
        with pytest.raises(UserError, match="the next call would read the scores as rows"):
            predict(Job(model.path, named, out, overwrite=True))
    with pytest.raises(UserError, match="is the --input itself"):
        predict(Job(model.path, folder / "a.parquet", folder / "a.parquet", overwrite=True))
    assert [p.name for p in folder.iterdir()] == ["a.parquet"]
    beside = {"keep": ("user", "x"), "overwrite": True}
    assert len(logits(model, Path("a*.parquet"), Path("s.parquet"), **beside)) == 20
    for given_again in (folder, Path("*.parquet")):
        with pytest.raises(UserError, match=r"s\.parquet holds scores of an earlier call"):
            predict(Job(model.path, given_again, tmp_path / "t.parquet"))
    assert len(logits(model, Path("s.parquet"), tmp_path / "t.parquet")) == 20  # named itself, it is meant


def test_text_that_is_named_as_another_is_cut_as_the_training_was(tmp_path: Path) -> None:
    model = made(tmp_path, "format: tsv\n", "\t")
    for name, separator in (("tabs.csv", "\t"), ("commas.csv", ","), ("tabs.tsv", "\t"), ("tabs.data", "\t")):
        rows().write_csv(tmp_path / name, separator=separator)
    wanted = logits(model, tmp_path / "tabs.tsv", tmp_path / "tsv.out")
    for name in ("tabs.csv", "commas.csv", "tabs.data"):
        assert logits(model, tmp_path / name, tmp_path / f"{name}.out") == wanted
    rows().drop("x").write_csv(tmp_path / "few.csv", separator="\t")
    with pytest.raises(UserError, match=r"few\.csv has no column"):
        predict(Job(model.path, tmp_path / "few.csv", tmp_path / "few.out"))


def test_a_delimiter_and_an_encoding_are_given_as_options(tmp_path: Path) -> None:
    model = made(tmp_path, 'delimiter: ";"\nencoding: utf-16\n', ";", "utf-16")
    for name, separator in (("as.csv", ";"), ("commas.csv", ","), ("tabs.csv", "\t")):
        rows().with_columns(näme=1).write_csv(tmp_path / name, separator=separator)
    wanted = logits(model, tmp_path / "as.csv", tmp_path / "as.out")  # UTF-8 needs no word: a mark tells UTF-16
    for name, shown, given in (("commas", "','", ","), ("tabs", "'tab'", "tab"), ("tabs", "'tab'", "\\t")):
        with pytest.raises(UserError, match=f"Give --delimiter {shown}$"):
            predict(Job(model.path, tmp_path / f"{name}.csv", tmp_path / "no.out"))
        text = {"delimiter": given}
        assert logits(model, tmp_path / f"{name}.csv", tmp_path / "s.out", text=text, overwrite=True) == wanted
    (tmp_path / "old.csv").write_bytes((tmp_path / "as.csv").read_text().encode("latin-1"))
    with pytest.raises(UserError, match="or give --encoding latin-1$"):
        predict(Job(model.path, tmp_path / "old.csv", tmp_path / "no.out"))
    text = {"encoding": "Latin1"}
    assert logits(model, tmp_path / "old.csv", tmp_path / "old.out", text=text) == wanted
    for text, said in (
        ({"delimiter": "::"}, "--delimiter '::'"),
        ({"encoding": "koi8"}, "--encoding 'koi8' is none of"),
    ):
        with pytest.raises(UserError, match=said):
            predict(Job(model.path, tmp_path / "as.csv", tmp_path / "no.out", text=text))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_kept_column_may_have_commas_in_its_name(model: ModelDirectory, tmp_path: Path, processes: int) -> None:
    whole = rows().with_columns(pl.lit(1).alias("user,x"), pl.lit(2).alias("a,b"), pl.lit(1).alias("y,z"))
    whole.write_parquet(tmp_path / "r.parquet")

    def kept(*words: str, label: str = "") -> list[str]:
        job = Job(model.path, tmp_path / "r.parquet", tmp_path / "s", "own", words, processes, True, label)
        predict(job)
        return pl.read_parquet(tmp_path / "s").columns[:-2]

    assert kept("user,x", "x,user,", "a,b") == ["user,x", "x", "user", "a,b"]
    if processes == 1:
        assert kept("x", "y,z", label="y,z") == ["x", "y,z"]
        with pytest.raises(UserError, match="--keep b: .* no column 'b'"):
            kept("user,b")


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (pl.Series([0.5], dtype=pl.Float32), pl.Series([0.1]), pl.Float64),
        (pl.Series([1], dtype=pl.Int8), pl.Series([1 << 40]), pl.Int64),
        (pl.Series([None]), pl.Series([[0.1]]), pl.List(pl.Float64)),
        (pl.Series([1]), pl.Series([0.5, None, float("nan")]), pl.Float64),
        (pl.Series([1.5]), pl.Series([(1 << 53) + 1]), None),
        (pl.Series([7]), pl.Series(["007"]), None),
        (pl.Series([7]), pl.Series(["7"]), pl.Int64),
    ],
)
def test_kept_values_are_the_same_where_types_differ(
    first: pl.Series, second: pl.Series, wanted: pl.DataType | None, model: ModelDirectory, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name, series in (("a", first), ("b", second)):
        rows(len(series)).with_columns(series.alias("k")).write_parquet(tmp_path / f"in/{name}.parquet")
    job = Job(model.path, tmp_path / "in", tmp_path / "s.parquet", keep=("k",))
    if wanted is None:
        with pytest.raises(UserError, match="--keep k: its type differs from file to file"):
            predict(job)
        assert not (tmp_path / "s.parquet").exists()
        return
    predict(job)
    found = pl.read_parquet(tmp_path / "s.parquet")["k"]
    assert found.dtype == wanted
    assert found.equals(pl.concat([first.cast(wanted), second.cast(wanted)]), null_equal=True)


LARGE = 1 << 24


@pytest.mark.parametrize(
    ("given", "first", "step", "said"),
    [
        (pl.Float32, LARGE, 1, "is float, which does not tell 16777216 from its neighbours"),
        (pl.Float32, LARGE - 40, 1, ""),
        (pl.Float32, LARGE, 2, ""),  # a float32 holds all that the model knows: it may be trained on such
        (pl.Float64, LARGE, 1, ""),
        (pl.Float64, 1 << 53, 1, "is double, which does not tell"),
        (pl.Int32, LARGE, 1, ""),
    ],
)
@pytest.mark.parametrize("kind", ["categorical", "list"])
def test_ids_as_floats_that_do_not_hold_them_are_refused(
    given: pl.DataType, first: int, step: int, said: str, kind: str, tmp_path: Path
) -> None:
    ids = [first + step * (k % 20) for k in range(ROWS)]
    frame = pl.DataFrame({"user": ids, "click": [k % 2 for k in range(ROWS)]})
    asked = frame.head(20).select(pl.col("user").cast(given))
    if kind == "list":
        frame, asked = (f.with_columns(pl.concat_list("user", "user")) for f in (frame, asked))
    frame.write_parquet(tmp_path / "clicks.parquet")
    asked.write_parquet(tmp_path / "rows.parquet")
    fields = f"{{user: {{kind: {kind}}}}}"
    (tmp_path / "s.yaml").write_text(f"files: clicks.parquet\nlabel: click\nfields: {fields}\n")
    prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True)
    run = run_of(tmp_path / "out", "model.hidden=[8]")
    exported(run, single(run, {"user": 4}), tmp_path / "model")
    job = Job(tmp_path / "model", tmp_path / "rows.parquet", tmp_path / "s.parquet")
    if said:
        with pytest.raises(UserError, match=rf"rows\.parquet: column 'user' {said}.*as whole numbers or text"):
            predict(job)
    else:
        assert predict(job).unseen == {"user": 0}


def test_half_floats_and_given_ids_are_checked_too(tmp_path: Path) -> None:
    model = made(tmp_path, "", first=2048)
    half = pa.table({"user": pa.array([np.float16(2048)] * 3), "x": [0.5] * 3})
    pq.write_table(half, tmp_path / "half.parquet")
    with pytest.raises(UserError, match="column 'user' is halffloat, which does not tell 2048"):
        predict(Job(model.path, tmp_path / "half.parquet", tmp_path / "s.parquet"))
    ids = replace(model, source=replace(model.source, given_ids=True))
    assert narrow_columns(ids, [tmp_path / "half.parquet"]) == []  # 20 ids: a half holds them
    many = replace(ids.schema, fields=(replace(ids.schema.fields[0], cardinality=2051),))
    assert narrow_columns(replace(ids, schema=many), [tmp_path / "half.parquet"])[0].limit == 2.0**11


def test_the_script_takes_names_patterns_and_separators_as_words(
    model: ModelDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows().with_columns(pl.lit("z").alias("a,b")).write_csv(tmp_path / "r.csv", separator=";")
    words = ["--model", str(model.path), "--input", str(tmp_path / "?.csv"), "--out", str(tmp_path / "s.parquet")]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*words, "--processes", "1", "--quiet"]) == 2
        assert "Give --delimiter ';'\n" in capsys.readouterr().err
        more = ["--delimiter", ";", "--encoding", "utf-8", "--keep", "a,b", "user,x"]
        assert main([*words, *more, "--processes", "1"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert pl.read_parquet(tmp_path / "s.parquet").columns == ["a,b", "user", "x", "logit", "probability"]
