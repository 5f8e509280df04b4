"""Batch prediction: raw rows without a label, in order, with the bits of an evaluation."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from embsearch_dist.data.formats import blocks, open_source
from embsearch_dist.data.formats.columns import KEPT, LABEL, TIME, Reading, Rows
from embsearch_dist.data.formats.described import Description
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.serving import encoding
from embsearch_dist.serving.directory import ModelDirectory, open_directory
from embsearch_dist.serving.encoding import Index
from embsearch_dist.serving.predict import Job, predict, told
from embsearch_dist.train.metrics import Predictions, figures
from tests.served import exported, run_of, single

ROWS = 1500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    """A model on data split by time; ``test.csv`` beside it holds the raw rows of the test split, without the label.

    Prices are bucketed, x is dense, both with blanks; the model has dropped ``idle``.
    """
    folder, rng = tmp_path_factory.mktemp("predict"), np.random.default_rng(0)
    user, price = rng.integers(0, 300, ROWS), rng.exponential(20, ROWS).round(2)
    frame = pl.DataFrame(
        {
            "click": rng.integers(0, 2, ROWS),
            "at": np.arange(ROWS),
            "user": [f"u{k}" if k else None for k in user],
            "price": [None if p < 1 else p for p in price],
            "idle": rng.integers(0, 9, ROWS),
            "x": [None if k % 7 == 0 else float(v) for k, v in enumerate(rng.standard_normal(ROWS))],
        }
    )
    frame.write_csv(folder / "clicks.csv")
    frame.tail(ROWS // 10).drop("click", "idle").write_csv(folder / "test.csv")
    fields = "user: categorical, price: bucketed, idle: categorical, x: dense"
    (folder / "s.yaml").write_text(f"files: clicks.csv\nlabel: click\ntime: at\nmin_count: 3\nfields: {{{fields}}}\n")
    prepare("table", folder / "s.yaml", folder / "out", split="time", quiet=True)
    run = run_of(folder / "out", "model.hidden=[32,16]")
    exported(run, single(run, {"user": 8, "price": 4, "idle": 0}), folder / "model")
    torch.save(trained_logits(folder), folder / "logits.pt")
    return open_directory(folder / "model")


def trained_logits(folder: Path) -> torch.Tensor:
    """What the training model says of the test split."""
    run = run_of(folder / "out", "model.hidden=[32,16]")
    found = single(run, {"user": 8, "price": 4, "idle": 0})
    with torch.no_grad():
        return torch.cat([found.predict(b) for b in run.stream("test", 64, shuffle=False).epoch(0)])


def test_who_predicts_or_serves_loads_no_torchrec() -> None:
    """It takes as long to load as torch and all else together, in every process."""
    names = "predict", "server", "directory", "programs", "triton"
    told = f"import {', '.join(f'embsearch_dist.serving.{name}' for name in names)}, sys; "
    told += "print(sorted({'torchrec', 'fbgemm_gpu', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch']"


def test_scores_have_the_bits_of_the_evaluation(model: ModelDirectory, tmp_path: Path) -> None:
    folder = model.path.parent
    wanted = torch.load(folder / "logits.pt", weights_only=True)
    done = predict(Job(model.path, folder / "test.csv", tmp_path / "s.parquet", keep=("at", "user")))
    scores = pl.read_parquet(tmp_path / "s.parquet")
    assert np.array_equal(scores["logit"].to_numpy(), wanted.numpy()) and done.rows == len(wanted) == ROWS // 10
    assert np.array_equal(scores["probability"].to_numpy(), torch.sigmoid(wanted).numpy())
    assert scores.columns == ["at", "user", "logit", "probability"]
    assert scores["at"].to_list() == [str(k) for k in range(ROWS - ROWS // 10, ROWS)]
    raw = pl.read_csv(folder / "test.csv")
    known = set(model.vocabulary("user"))
    unknown = sum(value is not None and value not in known for value in raw["user"])
    assert done.unseen["user"] == unknown > 0
    assert f"user: {unknown} values have no id of their own" in told(done, Job(Path(), Path(), Path()), 1.0)


def test_answers_are_measured_where_a_label_is_named(model: ModelDirectory, tmp_path: Path) -> None:
    folder = model.path.parent
    raw = pl.read_csv(folder / "clicks.csv").tail(ROWS // 10)
    raw.write_csv(tmp_path / "labelled.csv")
    raw.with_columns(pl.col("click") == 1).write_parquet(tmp_path / "labelled.parquet")
    wanted = torch.load(folder / "logits.pt", weights_only=True)
    expected = figures(Predictions(wanted, torch.from_numpy(raw["click"].to_numpy()).float(), None, None))
    for name in ("labelled.csv", "labelled.parquet"):
        job = Job(model.path, tmp_path / name, tmp_path / f"{name}.scores", keep=("click",), label="click")
        done = predict(job)
        assert done.figures == expected
        assert f"by click: auc {expected['auc']:.5f}  logloss {expected['logloss']:.5f}  ne " in told(done, job, 1.0)
    for label, said in (("at", "values other than 0 and 1"), ("user", "no numbers")):
        bad = Job(model.path, tmp_path / "labelled.csv", tmp_path / "bad.parquet", keep=(label,), label=label)
        with pytest.raises(UserError, match=f"--label {label}: .*{said}"):
            predict(bad)
        assert not list(tmp_path.glob("bad*"))


def test_pieces_and_formats_do_not_matter(
    model: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model.path.parent
    wanted = torch.load(folder / "logits.pt", weights_only=True).numpy()
    raw = pl.read_csv(folder / "test.csv")
    for k, part in enumerate(raw.iter_slices(40)):
        (tmp_path / "parts").mkdir(exist_ok=True)
        part.write_parquet(tmp_path / "parts" / f"part-{k}.parquet")
    predict(Job(model.path, tmp_path / "parts", tmp_path / "parts.out", keep=("at",)))
    scores = pl.read_parquet(tmp_path / "parts.out")
    assert np.array_equal(scores["logit"].to_numpy(), wanted) and scores["at"].dtype == pl.Int64
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    predict(Job(model.path, folder / "test.csv", tmp_path / "small.out"))
    assert np.array_equal(pl.read_parquet(tmp_path / "small.out")["logit"].to_numpy(), wanted)
    assert pq.read_metadata(tmp_path / "small.out").num_row_groups > 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.drop("price"), "test.csv has no column 'price'"),
        (lambda f: f.with_columns(x=pl.lit("much")), "line 2, column 'x': not a finite number: 'much'"),
        (lambda f: f.head(0), "the file has no rows"),
    ],
)
def test_rows_that_do_not_fit_are_one_clear_line(change, said: str, model: ModelDirectory, tmp_path: Path) -> None:
    change(pl.read_csv(model.path.parent / "test.csv")).write_csv(tmp_path / "test.csv")
    with pytest.raises(UserError) as e:
        predict(Job(model.path, tmp_path / "test.csv", tmp_path / "s.parquet"))
    assert said in str(e.value) and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["test.csv"]


def test_wrong_types_of_parquet_and_unknown_columns_are_refused(model: ModelDirectory, tmp_path: Path) -> None:
    raw = pl.read_csv(model.path.parent / "test.csv")
    raw.with_columns(price=pl.Series([[1]] * raw.height)).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column 'price' is .*Write a number"):
        predict(Job(model.path, tmp_path / "t.parquet", tmp_path / "s.parquet"))
    job = Job(model.path, model.path.parent / "test.csv", tmp_path / "s.parquet", keep=("usr",))
    with pytest.raises(UserError, match="--keep usr.*no column 'usr'. Did you mean 'user'"):
        predict(job)
    with pytest.raises(UserError, match="no such file or folder"):
        predict(Job(model.path, tmp_path / "none.csv", tmp_path / "s.parquet"))


def test_only_scores_are_replaced(model: ModelDirectory, tmp_path: Path) -> None:
    rows, out = model.path.parent / "test.csv", tmp_path / "s.parquet"
    pl.DataFrame({"mine": [1]}).write_parquet(out)
    with pytest.raises(UserError, match="holds no scores: it is left alone"):
        predict(Job(model.path, rows, out, overwrite=True))
    out.unlink()
    predict(Job(model.path, rows, out))
    with pytest.raises(UserError, match="or --overwrite to replace the scores"):
        predict(Job(model.path, rows, out))
    predict(Job(model.path, rows, out, overwrite=True))
    with pytest.raises(UserError, match="written as Parquet"):
        predict(Job(model.path, rows, tmp_path / "s.csv"))


def test_a_large_vocabulary_is_looked_up_as_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = pl.Series([f"v{k}" for k in range(3000)])
    asked = pl.Series(["v7", None, "nothing", "v2999", "", "v7"] + [f"v{k}" for k in range(2900, 3200)])
    small = Index(values)(asked)
    assert [int(Index(values)(asked[k : k + 1])[0]) for k in range(20)] == small[:20].tolist()
    monkeypatch.setattr(encoding, "FEW", 10)
    large = Index(values)
    assert np.array_equal(large(asked), small) and small.tolist()[:6] == [8, 0, 0, 3000, 0, 8]
    large._hashes[1:] = large._hashes[8]  # every value seems to be the eighth: only the values themselves tell
    assert set(large(asked)[np.flatnonzero(small == 0)].tolist()) == {0}


CRITEO = "\t".join(["1", *["3"] * 13, *["a"] * 26])
AVAZU = "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,"
AVAZU += "device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"


@pytest.mark.parametrize("format", ["criteo", "avazu", "movielens_1m", "kdd2012"])
def test_public_data_are_read_without_their_label(format: str, tmp_path: Path) -> None:
    """As their test files come: with the label's column or without, the fields are those that preparation reads."""
    labelled, bare, kept = write_public(format, tmp_path)
    source = open_source(format, labelled)
    wanted = next(source.chunks()).frame
    described = Description.of({**source.description, "dense": {}}, "here")
    for path in (labelled, bare):
        frame = next(described.open(path, format, Reading(False, None, (kept,))).chunks()).frame
        assert frame.drop(f"{KEPT}{kept}").equals(wanted.drop(LABEL, TIME, strict=False))
    some = source.columns[-1].name
    frame = next(described.open(bare, format, Reading(False, frozenset([some]))).chunks()).frame
    assert frame.columns == [some]
    with pytest.raises(UserError, match="--keep nothing"):
        next(described.open(bare, format, Reading(False, None, ("nothing",))).chunks())


def test_a_rating_is_not_taken_for_a_time_stamp(tmp_path: Path) -> None:
    _, bare, _ = write_public("movielens_1m", tmp_path)
    everything = Description.of(open_source("movielens_1m", tmp_path / "with").description, "here")

    def read(line: str, *columns: str, name: str = "ratings.dat") -> pl.DataFrame:
        for old in bare.glob("ratings*"):
            old.unlink()
        (bare / name).write_text(f"1::5::978300760\n{line}\n"[16 if "timestamp" in name else 0 :])
        reading = Reading(False, frozenset(columns), ("user_id",))
        return next(everything.open(bare, "movielens_1m", reading).chunks()).frame

    for rating in ("1", "5"):
        with pytest.raises(UserError, match=f"ratings.dat, line 2: {rating} is a rating, no time stamp. Give rows"):
            read(f"1::5::{rating}", "hour_in_day")
    assert read("1::5::0", "hour_in_day")["hour_in_day"].to_list() == ["22", "0"]
    assert read("1::5::3.5", "year")["year"].to_list() == ["1990"] * 2  # nothing that is read needs a time
    for line in ("1::5::4", "1::5"):
        with pytest.raises(UserError, match="no time stamps, of which weekday is made"):
            read(line, "year", "weekday", name="ratings_no_timestamp.dat.gz")
        assert read(line, "year", name="ratings_no_timestamp.dat.gz")["year"].to_list() == ["1990"]


def test_the_hour_of_avazu_is_that_of_its_files_however_rows_come(tmp_path: Path) -> None:
    """By name, as a request has them, in Kaggle's form or as the hour alone."""
    labelled, _, _ = write_public("avazu", tmp_path)
    described = Description.of(open_source("avazu", labelled).description, "here")
    hour = next(c for c in described.columns if c.name == "hour")
    own = next(described.open(labelled, "avazu", Reading(False, frozenset(["hour"]))).chunks()).frame["hour"].to_list()
    named = next(described.open(labelled / "train.csv", "table", Reading(False, frozenset(["hour"]))).chunks()).frame
    assert own == named["hour"].to_list() == ["13"]
    for cells in (["14102113", "13", "14102100", None], [14102113.0, 13.0, 14102100.0, None]):
        rows = Rows(pl.DataFrame({"hour": cells}), lambda k: f"row {k}")
        assert rows.convert(hour, "hour").to_list() == ["13", "13", "0", None]
    for cell in ("noon", "14102124", "-1", "141021", "2014102113"):
        with pytest.raises(UserError, match=f"row 0, column 'hour': not YYMMDDHH: '{cell}'. Write it like"):
            Rows(pl.DataFrame({"hour": [cell]}), lambda k: f"row {k}").convert(hour, "hour")


def write_public(format: str, folder: Path) -> tuple[Path, Path, str]:
    """Rows in a public form, with and without the label, and a column to keep."""
    two = [folder / "with", folder / "without"]
    for path in two:
        path.mkdir()
    if format == "criteo":
        lines = [CRITEO, CRITEO.replace("3", "", 2)]
        (two[0] / "train.txt").write_text("\n".join(lines) + "\n")
        (two[1] / "train.txt").write_text("\n".join(line[2:] for line in lines) + "\n")
        return two[0], two[1], "C3"
    if format == "avazu":
        row = ["7", "1", "14102113", *["x"] * 21]
        for path, names, cells in ((two[0], AVAZU, row), (two[1], AVAZU.replace("click,", ""), [row[0], *row[2:]])):
            (path / "train.csv").write_text(names + "\n" + ",".join(cells) + "\n")
        return two[0], two[1], "id"
    if format == "movielens_1m":
        for path, line in ((two[0], "1::5::4::978300760\n"), (two[1], "1::5::978300760\n")):
            (path / "ratings.dat").write_text(line)
            (path / "users.dat").write_text("1::F::25::3::12345\n")
            (path / "movies.dat").write_text("5::Thing (1990)::Drama|War\n")
        return two[0], two[1], "timestamp"
    for path, head in ((two[0], "0\t"), (two[1], "")):
        (path / "training.txt").write_text(head + "\t".join("2 11 3 4 2 1 5 6 7 8 9".split()) + "\n")
        (path / "userid_profile.txt").write_text("9\t1\t3\n")
    return two[0], two[1], "user_id"


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("cells", ["\t\t\t\n" * 2, " \t\t\t\n\t\t\t\n"])
def test_a_part_of_blank_cells_has_rows(model: ModelDirectory, tmp_path: Path, cells: str, compressed: bool) -> None:
    (tmp_path / "parts").mkdir()
    for k, rows in enumerate(("u1\t5\t0\t1\n", cells, "")):
        data = f"user\tprice\tx\tz\n{rows}".encode()
        (tmp_path / "parts" / f"{k}.tsv").write_bytes(gzip.compress(data) if compressed else data)
    assert predict(Job(model.path, tmp_path / "parts", tmp_path / "scores")).rows == 3


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n"])
@pytest.mark.parametrize("first", ["u1\n", '"u1"\n', ""])
def test_blank_lines_at_the_end_of_one_column_may_be_rows_and_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, first: str
) -> None:
    table = Description.of({"format": "table", "columns": [{"name": "user", "kind": "categorical"}]}, "here")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1.csv").write_text("user\nu1\n\nu2\n")
    (tmp_path / "parts" / "2.csv").write_bytes(f"user\n{first}".encode())
    columns = [c.frame for c in table.open(tmp_path / "parts", "table", Reading(False)).chunks()]
    assert pl.concat(columns)["user"].to_list() == ["u1", None, "u2", *(["u1"] if first else [])]
    (tmp_path / "parts" / "2.csv").write_bytes(f"user\n{first}{end}".encode())
    for block_bytes in (2, blocks.BLOCK_BYTES):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        with pytest.raises(UserError, match='2.csv: it has one column, .* Remove the line, or write "" in it'):
            [c.frame for c in table.open(tmp_path / "parts", "table", Reading(False)).chunks()]
