"""Retraining that begins with the widest model: which one that is, when it is the default, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.methods.finetuning import by_default, width_of
from embsearch_dist.methods.wish import Wish
from tests.factories import one_rank, prepared, small_config
from tests.method_contract import Case

ASKED = ("train.epochs=2",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared(tmp_path_factory))


@pytest.fixture(scope="module")
def searched(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of utilities."""
    case = Case("utilities", data, ("search.budget=8%",))
    return case.search(tmp_path_factory.mktemp("search"), one_rank()).dir


def began(directory: Path) -> dict[str, object]:
    """Field -> (earlier width, width, how) of a training that began with another model."""
    return {f: (*told["width"], told["how"]) for f, told in read_sealed(directory / "start.json")["fields"].items()}


def test_what_was_found_begins_with_the_widest_model_of_its_search(data: str, searched: Path) -> None:
    figures = Case("utilities", data).retrain(searched, one_rank(), name="own")
    assert figures["own"]["start"]["from"] == str(searched / "widest")
    found = Allocation.load(searched / "retrain" / "own" / "allocation.json")
    moved = began(searched / "retrain" / "own")
    assert moved == {n: (4, w, "turned, cut" if w < 4 else "turned, same") for n, w in found.widths.items() if w}
    assert any(0 < w < 4 for w in found.widths.values())
    assert not list(searched.glob("widest-*"))
    # What it began with stands in the run directory as any other training, so that it can be begun with again.
    assert set(Allocation.load(searched / "widest" / "allocation.json").widths.values()) == {4}


def test_fresh_weights_where_they_are_asked_for_and_for_uniform_widths_by_name(data: str, searched: Path) -> None:
    case = Case("utilities", data)
    assert "start" not in case.retrain(searched, one_rank(), finetune=False, name="fresh")["fresh"]
    assert "start" not in case.retrain(searched, one_rank(), allocation="ues-2")["ues-2"]
    tuned = case.retrain(searched, one_rank(), allocation="ues-2", finetune=True)
    assert list(tuned) == ["ues-2-finetuned"] and "start" in tuned["ues-2-finetuned"]
    around = case.retrain(searched, one_rank(), allocation="bracket")
    plain = [n for n in around if not n.endswith("-finetuned")]
    assert plain and sorted(around) == sorted([*plain, *(f"{n}-finetuned" for n in plain)])
    assert all(("start" in around[n]) == n.endswith("-finetuned") for n in around)


def test_another_seed_or_model_begins_with_a_widest_model_of_its_own(data: str, searched: Path) -> None:
    other = replace(Case("utilities", data), more=("run.seed=5", *ASKED))
    figures = other.retrain(searched, one_rank(), name="five")
    assert figures["five"]["start"]["from"] == str(searched / "widest-five")
    trained = read_sealed(searched / "widest-five" / "evaluation.json")
    assert trained["seed"] == 5 and set(trained["widths"].values()) == {4}
    again = other.retrain(searched, one_rank(), name="five")  # nothing is trained twice
    assert again["five"]["auc"] == figures["five"]["auc"]


def test_any_method_can_be_fine_tuned(data: str, tmp_path: Path) -> None:
    case = Case("random", data)
    run = case.search(tmp_path, one_rank())
    assert "start" not in case.retrain(run.dir, one_rank())["random"]
    figures = case.retrain(run.dir, one_rank(), finetune=True, name="tuned")
    assert figures["tuned"]["start"]["from"] == str(run.dir / "widest-tuned")
    widths = Allocation.load(run.dir / "widest-tuned" / "allocation.json").widths
    assert set(widths.values()) == {width_of(run.config)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), True),
        (("search.finetune=false",), False),
        (("model.backbone=wide_deep",), True),
        (("model.backbone=dcnv2",), False),
        (("model.backbone=dcnv2", "model.transform=field", "model.unified_width=4"), True),
        (("model.transform=width", "model.unified_width=4"), False),
        (("model.norm=field",), False),
    ],
)
def test_it_is_the_default_where_columns_can_be_turned(settings: tuple[str, ...], expected: bool) -> None:
    assert by_default(small_config("d", "r", *settings, method="utilities")) is expected
    assert not by_default(small_config("d", "r", method="adass"))


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(UserError, match="--finetune begins with the widest model, --from"):
        Wish.of({"finetune": "true", "from": "runs/my/retrain/a"}, [])
    with pytest.raises(UserError, match="--finetune begins with the widest model, --best"):
        Wish.of({"finetune": "true", "best": "2"}, [])
    with pytest.raises(UserError, match="--finetune 'yes': write true or false"):
        Wish.of({"finetune": "yes"}, [])
    assert Wish.of({"finetune": "false"}, []).finetune is False and Wish.of({}, []).finetune is None
