"""NASRec's architectures as JSON, what is wrong with a file, and the search spaces."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embsearch_dist.config.options import check_section
from embsearch_dist.errors import UserError
from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.canonical import canonical
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import SPACES, Space, SpaceConfig, check, full, load, size

FULL, SMALL = SPACES["full"], SPACES["small"]
FIRST = Block(("gating",), 64, ("efc",), 16, (0,), (0,), (0,), (0,), True, False)
SECOND = Block(("dot_product",), 16, ("attention",), 32, (0, 1), (1,), (1,), (0,), False, True)
TWO = Architecture((FIRST, SECOND))


def body() -> dict[str, Any]:
    return json.loads(json.dumps(TWO.to_json()))


def random_architectures(space: Space, count: int) -> list[Architecture]:
    generator = np.random.default_rng(7)
    return [draw(space, SCHEMES[k % len(SCHEMES)], generator) for k in range(count)]


def test_a_searched_block_is_plain_in_the_file() -> None:
    assert body() == {
        "format": 1,
        "kind": "architecture",
        "blocks": [
            {
                "dense": "gating", "dense_width": 64, "sparse": "efc", "sparse_width": 16, "dense_sources": [0],
                "sparse_sources": [0], "left": 0, "right": 0, "dense_to_sparse": True, "fm": False,
            },
            {
                "dense": "dot_product", "dense_width": 16, "sparse": "attention", "sparse_width": 32,
                "dense_sources": [0, 1], "sparse_sources": [1], "left": 1, "right": 0, "dense_to_sparse": False,
                "fm": True,
            },
        ],
    }  # fmt: skip


@pytest.mark.parametrize("space", [FULL, SMALL], ids=["full", "small"])
def test_files_give_back_what_was_saved(space: Space, tmp_path: Path) -> None:
    for k, a in enumerate([*random_architectures(space, 30), full(space)]):
        a.save(tmp_path / f"{k}.json", space=space.to_json(), provenance={"seed": k})
        assert Architecture.load(tmp_path / f"{k}.json") == a
        assert load(tmp_path / f"{k}.json") == (a, space)
        assert json.loads((tmp_path / f"{k}.json").read_text())["provenance"] == {"seed": k}
        assert Architecture.from_json(canonical(a).to_json(), "x") == canonical(a)


def test_a_person_may_write_lists_and_any_order() -> None:
    written = body()
    written["blocks"][0].update(dense=["gating"], sparse=["efc"], left=[0], right=[0], dense_sources=0)
    written["blocks"][1].update(dense_sources=[1, 0], sparse=["attention", "efc"], left=[1, 0])
    second = replace(SECOND, sparse=("efc", "attention"), left=(0, 1))
    assert Architecture.from_json(written, "x") == Architecture((FIRST, second))


def block(number: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda b: b["blocks"][number - 1].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (block(2, dense="dot_prodct"), r'a\.json, block 2, key "dense": unknown operator "dot_prodct" \(did you mean '
         r"'dot_product'\?\); allowed: fc, dot_product, gating, sum"),
        (block(1, sparse="fc"), 'a.json, block 1, key "sparse": unknown operator "fc".*allowed: efc, attention'),
        (block(2, sparse_sources=[0, 2]), 'block 2, key "sparse_sources": block 2 is the block itself; allowed: 0 .*1'),
        (block(1, dense_sources=[2]), r'block 1, key "dense_sources": block 2 comes later; allowed: 0 \(the input\)$'),
        (block(2, left=7), 'block 2, key "left": there is no block 7; allowed: 0 .* to 1'),
        (block(2, right=-1), 'block 2, key "right": there is no block -1; allowed'),
        (block(2, dense_sources=[0, 0]), 'block 2, key "dense_sources": write each source once'),
        (block(2, dense=["fc", "fc"]), 'block 2, key "dense": write each operator once'),
        (block(2, dense_sources=[]), 'block 2, key "dense_sources": .*needs a source; allowed: 0'),
        (block(2, dense_width=0), 'block 2, key "dense_width": expected a whole number above 0, got 0'),
        (block(2, dense_width="64"), 'block 2, key "dense_width": expected a whole number, got "64"'),
        (block(2, sparse_width=16.0), 'block 2, key "sparse_width": expected a whole number, got 16.0'),
        (block(2, sparse_width=True), 'block 2, key "sparse_width": expected a whole number, got true'),
        (block(2, fm=1), 'block 2, key "fm": expected true or false, got 1'),
        (block(2, dense_to_sparse=None), 'block 2, key "dense_to_sparse": expected true or false, got null'),
        (block(2, dense=3), 'block 2, key "dense": expected one of fc, dot_product, gating, sum, or a list.*got 3'),
        (block(2, left="1"), r'block 2, key "left": expected a block number \(0 = the input\), got "1"'),
        (block(2, sparse_sources=["1"]), 'block 2, key "sparse_sources": expected a list of block numbers'),
        (block(2, activation="relu"), "block 2: unknown key 'activation'.*known: dense, dense_width"),
        (block(2, dense_widht=4), r"block 2: unknown key 'dense_widht' \(did you mean 'dense_width'\?\)"),
        (lambda b: b["blocks"][1].pop("right"), 'block 2: key "right" is missing; write a block number'),
        (lambda b: b["blocks"].__setitem__(1, 5), "block 2: expected an object with the keys dense, .*got 5"),
        (block(1, dense=[], dense_to_sparse=False), 'block 1, key "dense": name one of'),
        (block(1, sparse=[], sparse_width=0, fm=True), 'block 1, key "sparse": name one of'),
        (block(1, sparse=[], sparse_width=0, dense_to_sparse=False), 'block 2, key "sparse_sources": block 1 has no s'),
        (block(2, sparse=[], sparse_width=0, fm=False), 'block 2, key "sparse": the head reads the last block'),
        (lambda b: b.update(blocks=[]), 'a.json: "blocks" must be a list of at least one block'),
        (lambda b: b.update(blocks={"1": {}}), 'a.json: "blocks" must be a list'),
        (lambda b: b.pop("blocks"), 'a.json: "blocks" must be a list'),
        (lambda b: b.update(kind="allocation"), """a.json: not an architecture: "kind" is 'allocation'"""),
        (lambda b: b.update(format=2), 'a.json: "format" is 2, this version reads format 1'),
        (lambda b: b.update(block=[]), r"a.json: unknown key 'block' \(did you mean 'blocks'\?\); known: format"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    written = body()
    change(written)
    (tmp_path / "a.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=message) as e:
        Architecture.load(tmp_path / "a.json")
    assert str(e.value).startswith(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": 1,', "a.json, line 1: not valid JSON"),
        (b"[1, 2]", "a.json: expected a JSON object, found list"),
        (b"\x80\x02", "a.json: not a text file"),
        (None, "a.json: no such file"),
    ],
)
def test_what_is_no_json_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Architecture.load(tmp_path / "a.json")


def test_a_directory_is_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Architecture.load(tmp_path)


def seven(**changes: Any) -> Architecture:
    """A searched architecture of the full space whose third block is changed."""
    blocks = list(draw(FULL, SCHEMES[0], np.random.default_rng(1)).blocks)
    blocks[2] = replace(blocks[2], **changes)
    return Architecture(tuple(blocks))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dense": ("gating",)},
            'here, block 3, key "dense": operator "gating" is not in the space; allowed: fc, sum$',
        ),
        ({"sparse": ("attention",)}, 'block 3, key "sparse": operator "attention" is not in the space; allowed: efc$'),
        ({"dense_width": 48}, 'here, block 3, key "dense_width": width 48 is not in the space; allowed: 16, 64$'),
        ({"sparse_width": 64}, 'block 3, key "sparse_width": width 64 is not in the space; allowed: 16$'),
        ({"dense": ("fc", "sum")}, 'block 3, key "dense": needs exactly one operator, got 2; allowed: fc, sum$'),
        ({"dense_sources": (0, 1, 2)}, 'block 3, key "dense_sources": 3 sources; allowed: at most 2$'),
        ({"sparse_sources": (0, 1, 2)}, 'block 3, key "sparse_sources": 3 sources; allowed: at most 2$'),
        ({"left": (0, 1)}, 'block 3, key "left": 2 sources; allowed: one$'),
    ],
)
def test_what_is_outside_the_space_is_named(changes: dict[str, Any], message: str) -> None:
    space = Space(3, ("fc", "sum"), ("efc",), (16, 64), (16,), max_sources=2)
    parts = Block(("fc",), 16, ("efc",), 16, (0,), (0,), (0,), (0,), True, True)
    check(space, Architecture((parts, parts, parts)), True, "here")
    with pytest.raises(UserError, match=message):
        check(space, Architecture((parts, parts, replace(parts, **changes))), True, "here")


def test_blocks_missing_and_too_many_are_named() -> None:
    a = seven()
    check(FULL, a, True, "here")
    with pytest.raises(UserError, match="here: block 7 is missing: the space has 7 blocks, the file 6"):
        check(FULL, Architecture(a.blocks[:6]), True, "here")
    check(FULL, Architecture(a.blocks[:6]), False, "here")
    with pytest.raises(UserError, match="here: block 7 is outside the space, which has 6 blocks"):
        check(replace(FULL, blocks=6), a, False, "here")


def test_supernets_and_canonical_forms_belong_to_their_space() -> None:
    for space in (FULL, SMALL):
        check(space, full(space), False, "full")
        for a in random_architectures(space, 20):
            check(space, canonical(a), False, "canonical")
    with pytest.raises(UserError, match='operator "gating" is not in the space'):
        check(SMALL, full(FULL), False, "full")
    with pytest.raises(UserError, match="needs exactly one operator, got 4"):
        check(FULL, full(FULL), True, "full")


def test_the_full_supernet_has_everything() -> None:
    third = full(FULL).blocks[2]
    every = (0, 1, 2)
    names = ("fc", "dot_product", "gating", "sum"), ("efc", "attention")
    assert third == Block(names[0], 1024, names[1], 64, every, every, every, every, True, True)
    third = full(SMALL).blocks[2]
    assert third == Block(("fc", "dot_product"), 1024, ("efc",), 64, every, every, (), (), True, True)


def test_sizes_of_the_published_spaces() -> None:
    # Counted for NASRec-Full and NASRec-Small as coded, both mergers and the cap of 4 sources included.
    assert round(size(FULL), 1) == 43.9
    assert round(size(SMALL), 1) == 32.3


@pytest.mark.parametrize("operators", [("fc",), ("fc", "sum")])
def test_the_size_agrees_with_counting_encodings(operators: tuple[str, ...]) -> None:
    space = Space(3, operators, ("efc",), (16, 32), (16,), max_sources=2)
    count = 1
    for n in (1, 2, 3):
        sets = [s for k in (1, 2) for s in itertools.combinations(range(n), k)]
        sides = list(itertools.product(range(n), repeat=2)) if "sum" in operators else [()]
        count *= len(list(itertools.product(operators, (16, 32), sets, sets, sides, (0, 1), (0, 1))))
    assert 10 ** size(space) == pytest.approx(count)
    assert math.isfinite(size(space))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "space, key blocks: must be a whole number above 0, got 0"),
        ({"max_sources": 0}, "key max_sources"),
        ({"tokens": 2.0}, "key tokens"),
        ({"width": 12}, "key width: attention has 8 heads"),
        ({"dense_operators": ("fx",)}, "key dense_operators: 'fx' is none of fc, dot_product, gating, sum"),
        ({"dense_operators": ()}, "key dense_operators: name at least one"),
        ({"sparse_operators": ("attention", "efc")}, "key sparse_operators: .*in this order"),
        ({"dense_widths": (32, 16)}, "key dense_widths: needs whole numbers above 0, ascending"),
        ({"sparse_widths": ()}, "key sparse_widths"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Space(**changes)


def test_a_space_without_attention_may_have_any_width() -> None:
    assert Space(sparse_operators=("efc",), width=12).width == 12


def test_spaces_come_back_from_json() -> None:
    for space in (FULL, SMALL, Space(3, ("sum",), ("efc",), (4,), (5, 6), 2, 3, 8)):
        assert Space.from_json(json.loads(json.dumps(space.to_json())), "x") == space


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(block=3), r"x, space: unknown key 'block' \(did you mean 'blocks'\?\)"),
        (lambda b: b.pop("tokens"), "x, space: key 'tokens' is missing"),
        (lambda b: b.update(blocks=[7]), "x, space: key 'blocks' must be a number"),
        (lambda b: b.update(dense_widths=16), "x, space: key 'dense_widths' must be a list"),
        (lambda b: b.update(blocks="7"), "x, space, key blocks: must be a whole number above 0"),
        (lambda b: b.update(dense_widths=["16"]), "x, space, key dense_widths"),
        (lambda b: b.update(dense_operators=[1]), "x, space, key dense_operators: 1 is none of"),
    ],
)
def test_a_space_in_a_file_that_is_wrong_is_named(change: Callable[[dict[str, Any]], object], message: str) -> None:
    written = FULL.to_json()
    change(written)
    with pytest.raises(UserError, match=message):
        Space.from_json(written, "x")
    with pytest.raises(UserError, match='x: "space" must be an object'):
        Space.from_json("full", "x")


def test_loading_checks_the_architecture_against_its_space(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    seven().save(path, space=SMALL.to_json())
    with pytest.raises(UserError, match="a.json, block 1, key .* is not in the space"):
        load(path)
    seven().save(path)
    with pytest.raises(UserError, match='a.json: key "space" is missing'):
        load(path)
    full(FULL).save(path, space=FULL.to_json())
    assert load(path) == (full(FULL), FULL)
    with pytest.raises(UserError, match="needs exactly one operator"):
        load(path, searched=True)


def test_the_config_changes_a_named_space() -> None:
    assert SpaceConfig().make() == FULL
    assert SpaceConfig(name="small").make() == SMALL
    config = SpaceConfig("small", 3, ["sum", "fc"], ["attention", "efc"], [64, 8], [2], 1, 4, 8)
    assert config.make() == Space(3, ("fc", "sum"), ("efc", "attention"), (8, 64), (2,), 1, 4, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SpaceConfig(name="ful"), r"key search.space.name: 'ful' is none of full, small, narrow \(did you mean 'full'"),
        (SpaceConfig(blocks=-1), "config key search.space: space, key blocks: must be"),
        (SpaceConfig(dense_operators=["fc", "gate"]), "config key search.space: .*'gate' is none of fc"),
        (SpaceConfig(dense_widths=[16, 16]), "config key search.space: .*dense_widths: needs"),
        (SpaceConfig(width=4), "config key search.space: .*key width"),
    ],
)
def test_a_wrong_config_names_its_key(config: SpaceConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_section(config, "search.space")
    if config.name == "ful":
        with pytest.raises(UserError, match="space 'ful' is none of full, small"):
            config.make()
