"""Model directories give the logits of the training models, whatever kind of model it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.serving.collect import Collected, ids_of_batch
from embsearch_dist.serving.directory import TABLES, open_directory, write_checksums
from embsearch_dist.serving.export import described_by
from embsearch_dist.serving.tables import Ids
from tests.factories import prepared
from tests.raw_lists import make_lists
from tests.served import WIDTHS, exported, gated, routed, run_of, single

IHAS = ["search.width=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    source, _ = make_lists(folder / "raw", rows=1500)
    prepare("table", source, folder / "out", min_count=2, quiet=True)
    return folder / "out"


KINDS: dict[str, Callable[[Path], tuple]] = {
    "first-order weights": lambda d: _one(d, "model.first_order=value"),
    "maps and norm": lambda d: _one(d, "model.transform=mlp", "model.norm=field"),
    "wide and deep": lambda d: _one(d, "model.backbone=wide_deep", "model.transform=field"),
    "bfloat16": lambda d: _one(d, "model.precision=bfloat16"),
    "dlrm": lambda d: _one(d, "model.backbone=dlrm", widths=dict.fromkeys(WIDTHS, 4)),
    **{
        b: lambda d, b=b: _one(d, f"model.backbone={b}") for b in ("dcnv2", "autoint", "xdeepfm", "masknet", "finalmlp")
    },
    "adafs": lambda d: _gated(d, "adafs", "search.width=4"),
    "adafs hard": lambda d: _gated(d, "adafs", "search.width=4", "search.mode=hard", "search.k=2"),
    "gates": lambda d: _gated(d, "ihas", *IHAS),
    "router of fields": lambda d: _routed(d, "fields", "embeddings", "model.backbone=mlp"),
    "router of centres": lambda d: _routed(d, "centres", "scaled", "model.first_order=value"),
    "router of masks": lambda d: _routed(d, "centres", "masks"),
}


def _one(data: Path, *overrides: str, widths: dict[str, int] = WIDTHS) -> tuple:
    run = run_of(data, *overrides)
    return run, single(run, widths)


def _gated(data: Path, method: str, *overrides: str) -> tuple:
    run = run_of(data, *overrides, method=method)
    return run, gated(run)


def _routed(data: Path, kind: str, on: str, *overrides: str) -> tuple:
    run = run_of(data, *IHAS, *overrides, method="ihas")
    return run, routed(run, kind, on)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_have_the_bits_of_the_training_model(kind: str, data: Path, tmp_path: Path) -> None:
    run, found = KINDS[kind](data)
    body = exported(run, found, tmp_path / "model")
    measured = body["measured"]
    assert measured["bitwise"] and measured["rows"] == run.schema.rows["test"]
    assert measured["served"]["auc"] == measured["trained"]["auc"]
    again = open_directory(tmp_path / "model")
    batch = next(iter(run.stream("test", 100, shuffle=False).epoch(0)))
    with torch.no_grad():
        logits, wanted = again.model()(ids_of_batch(batch, run.schema)), found.predict(batch)
    assert torch.equal(logits, wanted) and float(wanted.std()) > 0.01


def test_lists_have_the_bits_of_the_training_model(lists: Path, tmp_path: Path) -> None:
    run = run_of(lists)
    found = single(run, {"user": 2, "tags": 4, "likes": 8, "big": 2})
    assert exported(run, found, tmp_path / "model")["measured"]["bitwise"]


def test_a_row_is_answered_alike_alone_and_among_others(data: Path, tmp_path: Path) -> None:
    run, found = KINDS["router of fields"](data)
    exported(run, found, tmp_path / "model")
    model = open_directory(tmp_path / "model").model()
    ids = ids_of_batch(next(iter(run.stream("test", 200, shuffle=False).epoch(0))), run.schema)
    with torch.no_grad():
        whole = model(ids)
        alone = torch.cat([model(ids.take(slice(k, k + 1))) for k in range(20)])
        some = model(ids.take(torch.arange(199, -1, -3)))
    assert torch.equal(alone, whole[:20]) and torch.equal(some, whole[torch.arange(199, -1, -3)])


@pytest.mark.parametrize(("precision", "most"), [("fp16", 1e-2), ("int8", 0.1), ("int4", 2.0)])
def test_lower_precisions_stay_near_and_are_smaller(precision: str, most: float, data: Path, tmp_path: Path) -> None:
    run, found = _one(data, widths=dict.fromkeys(WIDTHS, 32))
    body = exported(run, found, tmp_path / "model", precision)
    exact = exported(run, found, tmp_path / "exact")
    assert 0 < body["measured"]["served"]["max_difference"] < most
    assert body["sizes"][TABLES] < exact["sizes"][TABLES] / {"fp16": 1.9, "int8": 3, "int4": 5}[precision]
    assert body["sizes"][f"served_{precision}"] < exact["sizes"]["served_fp32"] / 1.9


def test_the_card_names_what_was_measured(data: Path, tmp_path: Path) -> None:
    run, found = KINDS["router of fields"](data)
    body = exported(run, found, tmp_path / "model", "int8")
    card = (tmp_path / "model" / "README.md").read_text()
    served = body["measured"]["served"]
    assert f"| this directory | {served['rows']:,} | {served['auc']:.5f} |" in card
    assert "not the same bits" in card and "| big | 2 | 4 |" in card


def test_a_damaged_directory_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    run, found = KINDS["first-order weights"](data)
    exported(run, found, tmp_path / "model")
    path = tmp_path / "model" / TABLES
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    _refused(tmp_path / "model", "tables.safetensors: damaged")
    path.unlink()
    _refused(tmp_path / "model", "tables.safetensors: cannot be read")
    path.write_bytes(whole)
    (tmp_path / "model" / "more.txt").write_text("")
    _refused(tmp_path / "model", "more.txt: not in checksums.json")
    (tmp_path / "model" / "more.txt").unlink()
    path.write_bytes(b"not safetensors")
    write_checksums(tmp_path / "model")  # as if somebody had meant it
    with pytest.raises(UserError, match="its files do not fit together"):
        open_directory(tmp_path / "model").model()
    _refused(data, "not a model directory")


def _refused(directory: Path, said: str) -> None:
    with pytest.raises(UserError) as e:
        open_directory(directory)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_what_is_not_ours_is_not_replaced(data: Path, tmp_path: Path) -> None:
    run, found = KINDS["first-order weights"](data)
    with pytest.raises(UserError, match="is not a model directory: it is left alone"):
        exported(run, found, data)
    exported(run, found, tmp_path / "model")
    before = read_json(tmp_path / "model" / "checksums.json")
    with pytest.raises(UserError, match="--overwrite to replace the model"):
        exported(run, found, tmp_path / "model")
    assert read_json(tmp_path / "model" / "checksums.json") == before


def test_a_failed_export_leaves_nothing(data: Path, tmp_path: Path) -> None:
    run, found = KINDS["first-order weights"](data)
    found.tables["left"] = found.tables["left"] * 1e6
    with pytest.raises(UserError, match="beyond float16"):
        exported(run, found, tmp_path / "model", "fp16")
    assert list(tmp_path.iterdir()) == []


def test_data_of_an_older_version_want_their_source(data: Path, tmp_path: Path) -> None:
    run, found = KINDS["first-order weights"](data)
    described = run.schema.provenance.pop("source")
    with pytest.raises(UserError, match="--source FILE.yaml"):
        exported(run, found, tmp_path / "model")
    assert described_by(str(data.parent / "clicks.yaml"), run.schema) == described
    with pytest.raises(UserError, match="is only in one of"):
        described_by("criteo", run.schema)


def test_collected_models_know_their_fields(data: Path) -> None:
    run, found = KINDS["router of fields"](data)
    assert isinstance(found, Collected) and found.fields(run.schema) == ["left", "big", "right", "idle"]
    assert single(run, WIDTHS).fields(run.schema) == ["left", "big", "right"]
    assert Ids({}, {}, torch.zeros(3, 0)).rows == 3
