"""Retraining that begins with the widest model: which one that is, when it is the default, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.methods.finetuning import by_default, width_of
from embsearch_dist.methods.retraining import planned
from embsearch_dist.methods.wish import Wish
from tests.factories import one_rank, prepared, small_config, small_schema
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


def plan(found: Allocation, widest: str | None, **wished: object) -> dict[str, str]:
    """Name -> widths and beginning of what ``--or-uniform`` trains."""
    wish = Wish(**{"allocation": "", "name": "", "or_uniform": True, "best": 0, "refit": False, **wished})  # type: ignore[arg-type]
    job = SimpleNamespace(wish=wish, found=found, name=wish.name or found.provenance["name"], start=None)
    models = planned(job, widest)  # type: ignore[arg-type]
    return {n: f"{'-'.join(map(str, a.widths.values()))} {start or 'fresh'}" for n, (a, start) in models.items()}


def test_the_uniform_width_is_trained_from_fresh_weights_where_the_search_finds_it_itself() -> None:
    schema = small_schema(60, 30)
    told = {"name": "auto", "budget": "ues-8"}
    uniform = Allocation(schema, {"f0": 8, "f1": 8}, told)
    assert plan(uniform, "widest") == {"auto": "8-8 widest", "ues-8": "8-8 fresh"}
    assert plan(uniform, None) == {"auto": "8-8 fresh"}  # the same model again would tell nothing
    other = Allocation(schema, {"f0": 4, "f1": 16}, told)
    assert plan(other, "widest") == {"auto": "4-16 widest", "ues-8": "8-8 fresh", "ues-8-finetuned": "8-8 widest"}
    assert plan(other, None) == {"auto": "4-16 fresh", "ues-8": "8-8 fresh"}
    by_name = Allocation.uniform(schema, 8)
    assert plan(by_name, "widest") == {"ues-8-finetuned": "8-8 widest", "ues-8": "8-8 fresh"}
    assert plan(uniform, "widest", or_uniform=False) == {"auto": "8-8 widest"}
    around = plan(other, "widest", or_uniform=False, allocation="bracket")
    assert around["ues-8"] == "8-8 fresh" and around["ues-8-finetuned"] == "8-8 widest" and "auto" not in around


def test_uniform_widths_at_other_precisions_or_with_fewer_rows_are_no_uniform_width() -> None:
    schema = small_schema(60, 30)
    told = {"name": "auto", "budget": "720", "precision": "mixed"}
    coarse = Allocation(schema, {"f0": 8, "f1": 8}, told, precisions={"f0": "int4", "f1": "int8"})
    assert sorted(plan(coarse, "widest")) == ["auto", "ues-8", "ues-8-finetuned"]
    fine = replace(coarse, precisions={"f0": "int8", "f1": "int8"})
    assert sorted(plan(fine, "widest")) == ["auto", "ues-8"]


def test_a_result_cannot_be_called_as_the_uniform_width_beside_it() -> None:
    found = Allocation(small_schema(60, 30), {"f0": 8, "f1": 8}, {"name": "auto", "budget": "ues-8"})
    with pytest.raises(UserError, match="--name ues-8 is that of the uniform width which is trained beside it"):
        plan(found, "widest", name="ues-8")


def test_a_found_uniform_width_is_compared_with_itself_from_fresh_weights(data: str, tmp_path: Path) -> None:
    case = Case("auto", data, ("search.candidates=[2,4]", "search.budget=ues-2", "search.pareto=[]"))
    run = case.search(tmp_path, one_rank())
    assert set(Allocation.load(tmp_path / "allocation.json").widths.values()) == {2}
    figures = case.retrain(run.dir, one_rank())
    final = read_sealed(tmp_path / "final.json")
    assert sorted(figures) == ["auto", "ues-2"] == sorted(final["size"])
    assert "start" in figures["auto"] and "start" not in figures["ues-2"]
    assert "auto" in final["reason"] and "against ues-2" in final["reason"] and final["name"] in figures
    again = case.retrain(run.dir, one_rank())  # nothing is trained twice
    assert {n: x["auc"] for n, x in again.items()} == {n: x["auc"] for n, x in figures.items()}
    assert read_sealed(tmp_path / "final.json") == final
    alone = case.retrain(run.dir, one_rank(), finetune=False, name="fresh")
    assert list(alone) == ["fresh"] and alone["fresh"]["auc"] == figures["ues-2"]["auc"]
