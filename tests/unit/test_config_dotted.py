"""Overrides of a command line become few layers, which say what one layer per override would."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from embsearch_dist.config.dotted import layers_of
from embsearch_dist.config.sections import SECTIONS
from embsearch_dist.errors import UserError

BASE = OmegaConf.create({k: OmegaConf.structured(v) for k, v in SECTIONS.items()})


def layered(*words: str) -> list[Any]:
    given = [(key, value) for key, _, value in (word.partition("=") for word in words)]
    return [OmegaConf.to_container(layer) for layer in layers_of(given, BASE, literal=True)]


def test_no_override_is_no_layer_and_many_are_one() -> None:
    assert layered() == []
    assert layered("train.epochs=3", "optim.embedding=adam", "train.steps=4") == [
        {"train": {"epochs": 3, "steps": 4}, "optim": {"embedding": "adam"}}
    ]


def test_the_later_of_two_counts_and_mappings_are_joined() -> None:
    assert layered("train.epochs=3", "train.epochs=4") == [{"train": {"epochs": 4}}]
    joined = layered("a={x: {p: 1}, y: 2}", "a={x: {q: 3}, z: [4, 5]}", "a.y=6", "a.x.p=7")
    assert joined == [{"a": {"x": {"p": 7, "q": 3}, "y": 6, "z": [4, 5]}}]


def test_a_value_and_a_section_of_one_name_stay_apart() -> None:
    assert layered("data=5", "data.path=/x") == [{"data": 5}, {"data": {"path": "/x"}}]
    assert layered("data.path=/x", "data=5", "data=6") == [{"data": {"path": "/x"}}, {"data": 6}]


def test_what_two_calls_are_given_is_not_shared() -> None:
    first = layers_of([("search.widths", "[2, 4]")], BASE, literal=True)[0]
    assert isinstance(first, DictConfig)
    first.search.widths.append(8)
    assert layered("search.widths=[2, 4]") == [{"search": {"widths": [2, 4]}}]


def test_texts_are_taken_as_they_stand_and_the_rest_is_yaml() -> None:
    assert layered("data.path=007", "train.epochs=007") == [{"data": {"path": "007"}, "train": {"epochs": 7}}]
    assert layered("dist.tables.a.b[0]=row_wise") == [{"dist": {"tables": {"a.b[0]": "row_wise"}}}]
    assert layered("train.epochs=") == [{"train": {"epochs": None}}]


def test_the_backbone_stands_before_all_others() -> None:
    words = ("model.options.order=3", "model.backbone=dcnv2")
    assert layered(*words) == [{"model": {"backbone": "dcnv2", "options": {"order": 3}}}]


@pytest.mark.parametrize(("word", "told"), [("=3", "has no key"), ("train.epochs=[1", r"override train.epochs=\[1")])
def test_what_cannot_be_read_is_named(word: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        layered(word)
