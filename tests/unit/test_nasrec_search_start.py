"""What a search settles before its first score: the rows that candidates are tuned and judged on (disjoint ones, drawn
over a split that the supernet has not seen), its first networks, and the table of latencies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.methods.nasrec.config import ScoringConfig
from embsearch_dist.methods.nasrec.latency import LatencyTable
from embsearch_dist.methods.nasrec.scoring import held_out_sizes
from embsearch_dist.networks.architecture import Architecture
from tests.unit.test_nasrec_scoring import SEEN, SPACE, nasrec_run, rows_of, scorer, search


def test_rows_are_drawn_from_all_of_the_validation_split(data: Path, trained: Path) -> None:
    """Half of its rows to tune on (more were asked for) and 150 others to score, none twice, early and late ones."""
    found, run = scorer(data, trained, "search.scoring.rows=150"), nasrec_run(data, trained)
    assert found.tuning is not None
    n = run.schema.rows["validation"]
    whole = rows_of(run, "validation", n)
    numbers = []
    for rows, count in ((found.tuning, n // 2), (found.validation, 150)):
        # ``x`` is another number in every row.
        places = (rows.dense[:, None, 0] == whole[0][None, :, 0]).nonzero()[:, 1]
        assert len(places) == len(rows.label) == count
        assert torch.equal(rows.u, whole[1][places]) and torch.equal(rows.label, whole[2][places])
        numbers.append(places.tolist())
        assert numbers[-1] != sorted(numbers[-1]) and 0.4 < sum(numbers[-1]) / count / n < 0.6
    assert len({*numbers[0], *numbers[1]}) == n // 2 + 150
    again = scorer(data, trained, "search.scoring.rows=150")
    assert torch.equal(again.validation.dense, found.validation.dense)
    other = scorer(data, trained, "search.scoring.rows=150", "run.seed=1")
    assert not torch.equal(other.validation.dense, found.validation.dense)
    assert "150 rows" in found.rows_in_words() and f"{n // 2} others" in found.rows_in_words()


@pytest.mark.parametrize(
    ("rows", "config", "expected"),
    [
        (100_000, ScoringConfig(), (32_768, 32_768)),
        (40_000, ScoringConfig(), (20_000, 20_000)),
        (100_000, ScoringConfig(rows=0), (32_768, 67_232)),
        (40_000, ScoringConfig(tune_rows=500), (500, 32_768)),
        (1000, ScoringConfig(tune_steps=0), (0, 1000)),
        (1, ScoringConfig(tune_steps=0), (0, 1)),
    ],
)
def test_at_most_half_of_the_split_is_tuned_on(rows: int, config: ScoringConfig, expected: tuple[int, int]) -> None:
    assert held_out_sizes(rows, config) == expected


def test_a_split_of_one_row_cannot_be_divided() -> None:
    with pytest.raises(UserError, match=r"1 row.*tune_steps 0"):
        held_out_sizes(1, ScoringConfig())


def test_a_search_of_an_older_version_is_not_repeated(data: Path, copied: Path) -> None:
    """It tuned on rows of the training split, had no prefilter and named neither setting."""
    search(data, copied, SEEN)
    mark = copied / "stages" / "evolution.json"
    body = json.loads(mark.read_text())
    new = [k for k in body["inputs"] if k == "search.scoring.held_out" or k.startswith("search.prefilter.")]
    assert len(new) == 5
    write_sealed(mark, body | {"inputs": {k: v for k, v in body["inputs"].items() if k not in new}})
    before = (copied / "evolution.json").stat().st_mtime_ns
    search(data, copied, SEEN)
    assert (copied / "evolution.json").stat().st_mtime_ns == before
    search(data, copied)
    assert (copied / "evolution.json").stat().st_mtime_ns != before


def test_a_search_begins_with_what_the_prefilter_kept_and_minds_predicted_latencies(
    data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embsearch_dist.methods.nasrec.latency.NETWORKS", 24)
    monkeypatch.setattr("embsearch_dist.methods.nasrec.latency.HELD_BACK", 4)
    prefilter = ["search.prefilter.proxies=[snip,zico]", "search.prefilter.sample=8", "search.prefilter.keep=0.5"]
    cost = ["search.evolution.cost=latency", "search.evolution.cost_weight=0.1", "search.evolution.cost_target=2"]
    body = search(data, copied, *prefilter, *cost)
    kept = json.loads((copied / "prefilter.json").read_text())["kept"]
    assert [c["key"] for c in body["seen"][:4]] == [c["key"] for c in kept]
    table = LatencyTable(**read_sealed(copied / "latency.json"))
    for c in body["seen"]:
        architecture = Architecture.from_json({"format": 1, "kind": "architecture", "blocks": c["blocks"]}, "x")
        assert c["latency"] == table.predict(architecture, SPACE, 1, 4)
        assert c["fitness"] == pytest.approx(c["logloss"] + 0.1 * (c["latency"] / 2 - 1))
    # What the networks are that were timed belongs to the search; where nothing has changed it is not repeated.
    done = (copied / "evolution.json").stat().st_mtime_ns
    search(data, copied, *prefilter, *cost)
    assert (copied / "evolution.json").stat().st_mtime_ns == done
    search(data, copied, *prefilter, *cost, "model.layer_norm=all")
    assert (copied / "evolution.json").stat().st_mtime_ns != done
    assert read_sealed(copied / "latency.json")["of"]["layer_norm"] == "all" != table.of["layer_norm"]
    last = (copied / "evolution.json").stat().st_mtime_ns
    search(data, copied, SEEN)
    plain = (copied / "evolution.json").stat().st_mtime_ns
    search(data, copied, SEEN, "model.layer_norm=all")  # nothing but supernet slices is looked at
    assert last != plain == (copied / "evolution.json").stat().st_mtime_ns
