"""Names for ``model.backbone``: what a class must be to get one, and how options and modules are read from a config."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import embsearch_dist as es
from embsearch_dist.config import backbones, own_module
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.config.settings import describe
from embsearch_dist.errors import UserError
from embsearch_dist.models.backbones.making import backbone_of
from embsearch_dist.train.directories import lasting
from tests.factories import CONFIGS


class Plain(nn.Module):
    """The least that a backbone can be."""

    def __init__(self, *, fields: int, width: int, dense: int, hidden: list[int], dropout: float) -> None:
        super().__init__()
        self.last = nn.Linear(fields * width + dense, 1)

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        logit: torch.Tensor = self.last(torch.cat([u.flatten(1), dense], 1))
        return logit.squeeze(1)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone with it."""
    monkeypatch.setattr(backbones, "_known", dict(backbones._known))
    monkeypatch.setattr(own_module, "_loaded", {})


def load(*overrides: str, file: Path | None = None) -> Config:
    return load_config(CONFIGS, file, overrides, method="ues")


def test_a_class_without_options_is_a_backbone() -> None:
    assert es.register_backbone("plain")(Plain) is Plain
    model = load("model.backbone=plain").model
    made = backbone_of(model, 3, 4, 2)
    assert isinstance(made, Plain) and made(torch.zeros(5, 3, 4), torch.zeros(5, 2)).shape == (5,)
    with pytest.raises(UserError, match=r"model.options: the backbone plain has none, got layers"):
        load("model.backbone=plain", "model.options.layers=2")


def test_a_class_may_be_defined_again_where_it_was(tmp_path: Path) -> None:
    """As a notebook does that runs a cell again, or whose file has been edited."""
    file, body = tmp_path / "mine.py", Path(__file__).read_text().split("@pytest.fixture")[0]
    for name in ("Plain", "Other", "Plain"):
        file.write_text(
            body.replace("class Plain", f"import embsearch_dist as es\n@es.register_backbone('m')\nclass {name}")
        )
        model = load("model.backbone=m", f"model.module={file}").model
        assert type(backbone_of(model, 3, 4, 0)).__name__ == name
    before = backbones.registered("m").make
    load("model.backbone=m", f"model.module={file}")
    assert backbones.registered("m").make is before, "the same file is run once"
    with pytest.raises(UserError, match=rf"the name is taken by {file}"):
        es.register_backbone("m")(Plain)


def test_a_module_of_a_package_is_taken_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_pkg").mkdir()
    (tmp_path / "own_pkg" / "__init__.py").write_text("")
    (tmp_path / "own_pkg" / "late.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"model.module: own_pkg.late cannot be imported \(it imports a_package_that"):
        load("model.module=own_pkg.late")
    load("model.module=own_pkg")
    assert "own_pkg" in sys.modules


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("name", ["deepfm", "nasrec", "dcnv2"])
def test_names_of_built_in_backbones_stay_theirs(name: str, loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loaded:
        monkeypatch.setattr(backbones, "_known", {})
    with pytest.raises(UserError, match=f"{name}.*the name is taken"):
        es.register_backbone(name)(Plain)


def test_a_class_that_cannot_be_called_is_refused_at_once() -> None:
    class NoWidth(nn.Module):
        def __init__(self, *, fields: int, dense: int, hidden: list[int], dropout: float) -> None:
            super().__init__()

    class PlainOptions(Plain):
        class Options:
            layers = 3

    class Forgotten(Plain):
        @dataclass
        class Options:
            layers: int = 3

    with pytest.raises(UserError, match="'width'.*Let it take them"):
        es.register_backbone("own")(NoWidth)
    with pytest.raises(UserError, match="Options must be a dataclass"):
        es.register_backbone("own")(PlainOptions)
    with pytest.raises(UserError, match="dropout, options .*'options'"):
        es.register_backbone("own")(Forgotten)
    with pytest.raises(UserError, match="a name has letters"):
        es.register_backbone("a b")(Plain)


def test_an_unknown_name_says_what_there_is_and_how_to_load_more() -> None:
    own = r"model.module loads a class of your own \(@es.register_backbone\('dcn'\)\)"
    with pytest.raises(UserError, match=f"'dcn' is none of wide_deep, .*, dcnv2, .*{own}"):
        load("model.backbone=dcn")


def test_options_come_from_file_and_command_line_and_go_with_their_backbone(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {backbone: dcnv2, options: {layers: 2, structure: stacked}}\n")
    assert load(file=file).model.options == {"layers": 2, "structure": "stacked"}
    assert load("model.options.layers=4", file=file).model.options == {"layers": 4, "structure": "stacked"}
    assert load("model.backbone=deepfm", file=file).model.options == {}
    for words in (
        ("model.backbone=autoint", "model.options.heads=4"),
        ("model.options.heads=4", "model.backbone=autoint"),
    ):
        assert load(*words, file=file).model.options == {"heads": 4}
    (tmp_path / "b.yaml").write_text("base: a.yaml\nmodel: {backbone: masknet}\n")
    assert load(file=tmp_path / "b.yaml").model.options == {}
    with pytest.raises(UserError, match=r"model.options.layers: Value 'two'"):
        load("model.options.layers=two", file=file)
    load(file=file).save(tmp_path / "run")
    again = load(file=tmp_path / "run" / "config.yaml")
    assert again.model.options == {"layers": 2, "structure": "stacked"}
    assert lasting(again) != lasting(load("model.options.layers=3", file=file))


def test_help_has_the_options_of_every_backbone() -> None:
    told = describe(CONFIGS)
    assert "of backbone dcnv2:\n    model.options.layers [3]  cross layers" in told
    assert all(f"of backbone {name}:" in told for name in ("autoint", "xdeepfm", "masknet", "finalmlp"))
