"""The router of raw fields: its numbers against plain loops, which fields it takes, what it is on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from embsearch_dist.data.load.dataset import read_rows
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, read_sealed, write_json, write_sealed
from embsearch_dist.methods.ihas import router_by_fields as field_router
from embsearch_dist.methods.ihas.routed_model import open_router
from embsearch_dist.methods.ihas.router_by_fields import (
    FIELD_ROUTER,
    FieldRouter,
    can_route,
    evidence,
    fit_field_router,
    load_field_router,
    read_assignment,
)
from embsearch_dist.run import Run
from embsearch_dist.schema import Field, Schema
from tests.factories import one_rank, open_run, prepared, random_batch, small_config, small_schema
from tests.raw_lists import list_schema, prepared_lists, random_lists

Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def run_of(data: Path, directory: Path) -> Run:
    return open_run(small_config(data, directory, method="ihas"), one_rank())


def teach(run: Run, rule: Rule) -> dict[str, np.ndarray]:
    """Write an assignment of two groups by a rule on ids, with every 20th row on the other side."""
    folder = run.dir / "groups" / "assignment"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for split in ("train", "validation", "test"):
        ids, _, _ = read_rows(run.config.data.path, run.schema, split)
        columns = {n: ids[k].numpy() for k, n in enumerate(run.schema.names)}
        said = rule(columns["left"], columns["right"]).astype(np.uint8)
        said[::20] = 1 - said[::20]
        np.save(folder / f"{split}.npy", said)
        found[split] = said
    return found


def adds_up(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left % 3) + (right % 2) >= 2


def left_alone(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left < 5


def by_hand(run: Run, said: np.ndarray, fields: list[str], split: str) -> np.ndarray:
    """Where plain loops over dictionaries of counts send the rows of a split."""
    ids, _, _ = read_rows(run.config.data.path, run.schema, "train")
    seen = {n: ids[run.schema.names.index(n)].tolist() for n in fields}
    shares = [(int((said == g).sum()) + 1) / (len(said) + 2) for g in (0, 1)]
    counts: dict[tuple[str, int, int], int] = {}
    for name in fields:
        for i, g in zip(seen[name], said.tolist(), strict=True):
            counts[name, i, g] = counts.get((name, i, g), 0) + 1
    ids, _, _ = read_rows(run.config.data.path, run.schema, split)
    answers = []
    for row in range(ids.shape[1]):
        scores = []
        for g in (0, 1):
            score = np.log(shares[g])
            for name in fields:
                i = int(ids[run.schema.names.index(name), row])
                both = [counts.get((name, i, h), 0) for h in (0, 1)]
                score += np.log((both[g] + shares[g]) / (sum(both) + 1)) - np.log(shares[g])
            scores.append(score)
        answers.append(int(scores[1] > scores[0]))
    return np.array(answers)


def routed(run: Run, router: FieldRouter, split: str) -> np.ndarray:
    stream = run.stream(split, 100, shuffle=False)
    return torch.cat([router.assign(b) for b in stream.epoch(0)]).numpy()


def test_it_sends_rows_where_plain_counting_sends_them(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    said = teach(run, adds_up)
    router = fit_field_router(run, 2)
    assert set(list(router.tables)[:2]) == {"left", "right"}
    answers = routed(run, router, "test")
    np.testing.assert_array_equal(answers, by_hand(run, said["train"], list(router.tables), "test"))
    assert set(answers) == {0, 1}
    # The rule adds up, so naive Bayes holds all of it; every 20th row is on the other side.
    assert (answers == said["test"]).mean() > 0.9
    agreement = (routed(run, router, "validation") == said["validation"]).mean()
    assert read_json(run.dir / FIELD_ROUTER)["agreement"] == pytest.approx(agreement)


def test_fields_that_add_nothing_are_not_taken(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    teach(run, left_alone)
    assert list(fit_field_router(run, 2, fields=1).tables) == ["left"]
    assert list(fit_field_router(run, 2, fields=3).tables)[0] == "left"
    cards = {f.name: f.cardinality for f in run.schema.fields}
    assert fit_field_router(run, 2, fields=1).parameters() == 2 + 2 * cards["left"]


def test_where_nearly_all_rows_are_in_one_group_no_field_may_help(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    folder = run.dir / "groups" / "assignment"
    folder.mkdir(parents=True)
    for split, rows in run.schema.rows.items():
        said = np.ones(rows, np.uint8)
        said[::50] = 0
        np.save(folder / f"{split}.npy", said)
    router = fit_field_router(run, 2, fields=1)
    answers = routed(run, router, "test")
    assert router.tables == {} and (answers == 1).all()
    assert read_json(run.dir / FIELD_ROUTER)["agreement"] == (read_assignment(run.dir, "validation") == 1).mean()


def test_the_numbers_of_a_table() -> None:
    counts, prior = torch.tensor([[9, 1], [0, 0], [0, 4]]), torch.tensor([0.75, 0.25], dtype=torch.float64)
    wanted = torch.tensor([[9.75 / 11 / 0.75, 1.25 / 11 / 0.25], [1, 1], [0.75 / 5 / 0.75, 4.25 / 5 / 0.25]]).log()
    torch.testing.assert_close(evidence(counts, prior), wanted)


def test_ids_of_every_chosen_field_are_read_from_their_own_place() -> None:
    schema = small_schema(5, 7, 3)
    batch = random_batch(schema, 16)
    tables = {name: torch.randn(n, 3) for name, n in (("f2", 3), ("f0", 5))}
    prior = torch.randn(3)
    answers = FieldRouter(schema, prior, tables).assign(batch)
    for row in range(16):
        score = prior.clone()
        for name, table in tables.items():
            score += table[int(batch.sparse[name].values()[row])]
        assert int(answers[row]) == int(score.argmax())
    assert len(set(answers.tolist())) > 1
    assert FieldRouter(schema, torch.tensor([0.0, 2.0, 1.0]), {}).assign(batch).tolist() == [1] * 16


def test_beside_lists_the_right_ids_are_read() -> None:
    schema = list_schema()
    schema = Schema("lists", (*schema.fields[1:], schema.fields[0]), ("x0",))
    batch, table = random_lists(schema, 24), torch.eye(11)
    assert torch.equal(FieldRouter(schema, torch.zeros(11), {"one": table}).assign(batch), batch.sparse["one"].values())


def test_lists_are_no_candidates(tmp_path: Path) -> None:
    run = run_of(prepared_lists(tmp_path / "data", 400), tmp_path)
    folder = run.dir / "groups" / "assignment"
    folder.mkdir(parents=True)
    for split, rows in run.schema.rows.items():
        np.save(folder / f"{split}.npy", (np.arange(rows) % 2).astype(np.uint8))
    assert can_route(run.schema)
    assert set(fit_field_router(run, 2).tables) <= {"user"}
    only = Schema("only", (Field("tags", 4, "sum"),))
    assert not can_route(only)
    with pytest.raises(UserError, match="only list fields"):
        fit_field_router(Run(run.config, only, run.context), 2)


def test_what_is_there_is_kept_until_the_groups_change(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    teach(run, adds_up)
    fit_field_router(run, 2)
    files = sorted((run.dir / "groups").glob("field_router*"))
    assert len(files) >= 3
    before = [f.stat().st_mtime_ns for f in files]
    fit_field_router(run, 2)
    assert [f.stat().st_mtime_ns for f in files] == before
    files[0].write_bytes(files[0].read_bytes()[:-1])
    fit_field_router(run, 2)
    load_field_router(run)
    assert [f.stat().st_mtime_ns for f in files] != before
    body = files[-1].read_bytes()
    teach(run, left_alone)
    fit_field_router(run, 2)
    assert files[-1].read_bytes() != body


def test_parts_of_the_split_make_the_same_choice(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 2nd row group of validation: enough to choose by, and counted as so many."""
    monkeypatch.setattr(field_router, "COMPARED_ROWS", 300)
    run = run_of(data, tmp_path)
    teach(run, adds_up)
    assert set(list(fit_field_router(run, 2).tables)[:2]) == {"left", "right"}


def test_damage_and_strangers(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    with pytest.raises(UserError, match="field_router.json is missing"):
        load_field_router(run)
    teach(run, adds_up)
    fit_field_router(run, 2)
    with pytest.raises(UserError, match="knows 2 groups, there are models of 3"):
        open_router(run, "fields", 3)
    path = run.dir / FIELD_ROUTER
    body = read_sealed(path)
    for broken, told in (
        ({**body, "schema": "other"}, "made for data with another schema"),
        ({k: v for k, v in body.items() if k != "prior"}, "not a router of fields"),
        ({**body, "fields": [{**body["fields"][0], "name": "nobody"}]}, "not a router of fields"),
        ({**body, "prior": [0.0, 0.0, 0.0]}, r"not a router of fields.*float32 \[\d+, 2\]"),
    ):
        write_sealed(path, broken)
        with pytest.raises(UserError, match=told):
            load_field_router(run)
    write_json(path, body)
    table = path.with_name(body["fields"][0]["file"])
    flipped = bytearray(table.read_bytes())
    flipped[-1] ^= 1
    table.write_bytes(flipped)
    with pytest.raises(UserError, match=f"{table.name} is missing or damaged"):
        load_field_router(run)


def test_an_assignment_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    said = teach(run, adds_up)
    rows = len(said["train"])
    with pytest.raises(UserError, match=rf"train.npy is of {rows:,} rows in 2 groups.*{rows:,} rows and 1 groups"):
        fit_field_router(run, 1)
    place = run.dir / "groups" / "assignment" / "train.npy"
    np.save(place, said["train"][:-1])
    with pytest.raises(UserError, match=rf"train.npy is of {rows - 1:,} rows"):
        fit_field_router(run, 2)
    np.save(place, said["train"].astype(np.float64))
    with pytest.raises(UserError, match=r"train.npy holds no groups"):
        read_assignment(run.dir, "train")
    place.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"train.npy cannot be read"):
        read_assignment(run.dir, "train")
    place.unlink()
    with pytest.raises(UserError, match=r"train.npy"):
        fit_field_router(run, 2)
