"""The library: found widths as tables, predictions of frames, a search and a retraining in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

import embsearch_dist as es
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.trial import merged
from embsearch_dist.run import Run, open_data
from embsearch_dist.running import answers_of, trained_config
from embsearch_dist.schema import Field, Schema
from embsearch_dist.serving.predict import Job, predict
from embsearch_dist.stores.states import restore
from tests.factories import one_rank, prepared
from tests.faulty_store import faulty_store
from tests.served import exported, run_of, single

SCHEMA = Schema("shop", (Field("user", 50), Field("tags", 9, "mean"), Field("idle", 7)), ("price",))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    es.Allocation(SCHEMA, {"user": 6, "tags": 4, "idle": 0}, {"name": "mine"}).save(tmp_path / "allocation.json")
    return tmp_path / "allocation.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(prepared(tmp_path_factory))


def settings(data: Path, method: str) -> dict[str, object]:
    sections = merged(METHODS[method].trial)
    words = {f"{section}.{key}": value for section, body in sections.items() for key, value in body.items()}
    return {**words, "data.path": data, "run.device": "cpu", "run.threads": 1}


def test_to_import_it_loads_nothing_heavy() -> None:
    """The scripts set variables that must be there before torch loads."""
    told = "import sys, embsearch_dist; print(sorted({'torch', 'polars', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there_and_others_are_not() -> None:
    assert set(es.__all__) <= set(dir(es))
    for name in es.__all__:
        assert getattr(es, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'serach'"):
        es.serach  # noqa: B018


def test_an_allocation_away_from_its_data_gives_torchrecs_tables(file: Path) -> None:
    from torchrec import EmbeddingBagCollection, PoolingType

    found = es.Allocation.load(file)
    assert found.widths == {"user": 6, "tags": 4, "idle": 0} and found.schema.fingerprint == SCHEMA.fingerprint
    configs = found.embedding_bag_configs()
    shapes = [(c.name, c.num_embeddings, c.embedding_dim, c.feature_names, c.pooling) for c in configs]
    assert shapes == [("user", 50, 6, ["user"], PoolingType.SUM), ("tags", 9, 4, ["tags"], PoolingType.MEAN)]
    collection = EmbeddingBagCollection(tables=configs)
    assert sum(p.numel() for p in collection.parameters()) == found.total("parameters")


def test_and_torchs_own(file: Path) -> None:
    tables = torch.nn.ModuleDict(es.Allocation.load(file).to_torch())
    assert {n: tuple(t.weight.shape) for n, t in tables.items()} == {"user": (50, 6), "tags": (9, 4)}
    bag = tables["tags"](torch.tensor([1, 2, 3]), torch.tensor([0, 2]))
    weight = tables["tags"].weight
    torch.testing.assert_close(bag, torch.stack([(weight[1] + weight[2]) / 2, weight[3]]))


def test_a_file_of_an_older_version_says_what_it_lacks(file: Path) -> None:
    body = file.read_text().replace('"fields"', '"columns"')
    file.write_text("\n".join(line for line in body.split("\n") if '"sha256"' not in line).replace("},\n}", "}\n}"))
    with pytest.raises(UserError, match="does not say how many values its fields have"):
        es.Allocation.load(file)
    assert es.Allocation.load(file, SCHEMA).widths["user"] == 6


def test_batches_are_those_of_the_split(data: Path) -> None:
    found = es.open_data(data)
    rows = [batch.size for batch in found.batches("test", batch_size=100)]
    assert sum(rows) == found.schema.rows["test"] and max(rows) == 100
    with pytest.raises(UserError, match="not a prepared data set"):
        es.open_data(data / "nowhere")


def test_a_search_and_a_retraining_in_one_process(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = es.search(run_dir=run, method="utilities", settings=settings(data, "utilities") | {"search.budget": "60%"})
    assert isinstance(found, es.Allocation) and found == es.Allocation.load(run / "allocation.json", found.schema)
    assert es.search(run / "config.yaml", run_dir=run) == found, "a search that is done is read"
    results = es.retrain(run) | es.retrain(run, "ues-2", settings={"train.epochs": 1})
    assert set(results) == {"utilities", "ues-2"}
    again = es.retrain(run, name="again", start=run / "retrain" / "utilities", settings={"train.epochs": 1})["again"]
    assert again["widths"] == found.widths and again["start"]["from"] == str(run / "retrain" / "utilities")
    assert all(0.4 < r["auc"] < 1 and (run / "retrain" / n / "evaluation.json").exists() for n, r in results.items())


def test_another_seed_has_a_name_of_its_own(data: Path, tmp_path: Path) -> None:
    run, quick = tmp_path / "run", {"train.epochs": 1}
    es.search(run_dir=run, method="ues", settings=settings(data, "ues"))
    names = [list(es.retrain(run, settings={**quick, "run.seed": seed})) for seed in (0, 1)]
    assert [len(n) for n in names] == [1, 1] and names[1] == [f"{names[0][0]}-seed1"]


def test_a_run_is_mirrored_and_goes_on_from_there_on_an_empty_machine(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty_store(tmp_path, monkeypatch)
    words = {**settings(data, "ues"), "run.mirror": "s3://bucket/runs/one"}
    found = es.search(run_dir=tmp_path / "one", method="ues", settings=words)
    assert es.search(tmp_path / "one" / "config.yaml", run_dir=tmp_path / "two", settings=words) == found
    assert (tmp_path / "two" / "stages").is_dir()
    mirror = {"run.mirror": "s3://bucket/runs/one", "train.epochs": 1}
    (name, figures), *_ = es.retrain(tmp_path / "three", settings=mirror).items()
    restore(tmp_path / "four", f"s3://bucket/runs/one/retrain/{name}")
    assert es.evaluate(tmp_path / "four")["auc"] == figures["auc"]


def test_one_call_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread holds is the process's: another one would read its data and let go of its locks."""
    told: list[str] = []

    def meanwhile(*_: object) -> None:
        with pytest.raises(UserError, match="another thread of this program is in es.search"):
            es.search(run_dir=tmp_path / "b", method="ues", settings=settings(data, "ues"))
        told.append("refused")
        raise UserError("enough")

    monkeypatch.setattr("embsearch_dist.running.search", meanwhile)
    with pytest.raises(UserError, match="enough"):
        es.search(run_dir=tmp_path / "a", method="ues", settings=settings(data, "ues"))
    monkeypatch.undo()
    assert told == ["refused"] and es.search(run_dir=tmp_path / "b", method="ues", settings=settings(data, "ues"))


def test_a_search_that_trains_its_model_itself_gives_no_widths(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert es.search(run_dir=run, method="adafs", settings=settings(data, "adafs")) is None
    with pytest.raises(UserError, match="adafs trains its model itself.* --allocation ues-32"):
        es.retrain(run)
    assert set(es.retrain(run, "ues-2")) == {"ues-2"}


@pytest.mark.parametrize("method", ["adafs", "ihas"])
def test_of_the_model_of_a_search_no_router_and_no_precision_is_measured(tmp_path: Path, method: str) -> None:
    (tmp_path / "evaluation.json").write_text("{}")
    check = METHODS[method]().check_evaluation
    check(tmp_path, "", "")
    with pytest.raises(UserError, match="--router fields: .* holds one model"):
        check(tmp_path, "fields", "")
    with pytest.raises(UserError, match="--precision int8: .* export it, the card has figures"):
        check(tmp_path, "", "int8")


@pytest.mark.parametrize(("method", "name"), [("adafs", "adafs-soft"), ("ihas", "ihas-1")])
def test_the_model_of_a_search_itself_is_measured_again(data: Path, tmp_path: Path, method: str, name: str) -> None:
    es.search(run_dir=tmp_path / "run", method=method, settings=settings(data, method))
    searched = tmp_path / "run" / "retrain" / name
    first = read_sealed(searched / "evaluation.json")
    again = es.evaluate(searched)
    assert {k: again[k] for k in ("auc", "logloss", "name", "rows")} == {
        k: first[k] for k in ("auc", "logloss", "name", "rows")
    }
    held_out = es.evaluate(searched, "validation")
    assert held_out["split"] == "validation" and held_out["auc"] != first["auc"]
    config = trained_config(searched, "--run", [])
    context = one_rank()
    assert (
        len(answers_of(searched, Run(config, open_data(config, context), context), "test").found.labels)
        == first["rows"]
    )


def test_a_group_that_the_program_has_opened_is_used_and_left_open(data: Path) -> None:
    one_rank()
    assert torch.distributed.is_initialized()
    assert es.open_data(data).schema.rows["test"] > 0
    assert torch.distributed.is_initialized()


def test_what_is_wrong_is_said_as_the_scripts_say_it(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown config key 'search.bugdet'"):
        es.search(run_dir=tmp_path / "run", method="utilities", settings={"search.bugdet": "5%"})
    with pytest.raises(UserError, match="no method is named"):
        es.search(run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"config.yaml"):
        es.retrain(tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["polars", "arrow", "mapping", "pandas"])
def test_a_model_predicts_frames_as_the_script_predicts_files(data: Path, tmp_path: Path, kind: str) -> None:
    run = run_of(data)
    exported(run, single(run), tmp_path / "model")
    frame = pl.read_csv(data.parent / "clicks.csv").drop("click").head(333)
    frame.write_parquet(tmp_path / "rows.parquet")
    predict(Job(tmp_path / "model", tmp_path / "rows.parquet", tmp_path / "scores.parquet", "table"))
    expected = pl.read_parquet(tmp_path / "scores.parquet")
    table: object = frame
    if kind == "arrow":
        table = frame.to_arrow()
    elif kind == "mapping":
        table = frame.to_dict(as_series=False)
    elif kind == "pandas":
        table = pytest.importorskip("pandas").DataFrame(frame.to_dict(as_series=False))
    model = es.load_model(tmp_path / "model")
    assert np.array_equal(model.predict(table), expected["probability"].to_numpy())
    assert np.array_equal(model.logits(table), expected["logit"].to_numpy())


def test_rows_that_cannot_be_predicted(data: Path, tmp_path: Path) -> None:
    run = run_of(data)
    exported(run, single(run), tmp_path / "model")
    model = es.load_model(tmp_path / "model")
    assert model.predict(pl.DataFrame({"left": []})).shape == (0,)
    twice = pa.Table.from_arrays([pa.array([1])] * 2, names=["left", "left"])
    for table in (twice, pl.DataFrame({"left": pl.Series([object()], dtype=pl.Object)})):
        with pytest.raises(es.UserError, match="a column cannot be read .*: give a pandas or polars frame"):
            model.predict(table)
    with pytest.raises(UserError, match="right"):
        model.predict({"left": [1], "big": [2], "x": [0.5]})
    with pytest.raises(UserError, match="int is no table"):
        model.predict(7)
    with pytest.raises(UserError, match="one column is no table"):
        model.predict(pa.array([1, 2]))
