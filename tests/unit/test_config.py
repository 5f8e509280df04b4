"""The config tree: precedence, what is refused and how, and every shipped file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from embsearch_dist.config.read import load_config, split_arguments
from embsearch_dist.config.sections import SECTIONS, Config
from embsearch_dist.config.settings import changed_settings, describe, fingerprint, tell_changed
from embsearch_dist.errors import UserError
from embsearch_dist.methods.nasrec.config import NASRecConfig
from tests.factories import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name not in ("sources", "comparisons"))


def load(*overrides: str, file: Path | None = None, method: str = "adass") -> Config:
    return load_config(CONFIGS, file, overrides, method=method)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_config_loads_and_checks(path: Path) -> None:
    config = load_config(CONFIGS, path)
    assert config.method in CONFIGS
    assert config.run.dir.startswith("runs/")


def test_shipped_configs_of_one_run_directory_share_its_supernet() -> None:
    """Each of them may be the first: the others then only search again."""
    seen: dict[str, str] = {}
    for path in SHIPPED:
        config = load_config(CONFIGS, path)
        if config.method == "adass":
            search = config.search
            parts = (config.data, config.model, config.optim, search.sampling, search.supernet)
            found = fingerprint(*parts, search.candidates, search.scheme)
            assert seen.setdefault(config.run.dir, found) == found, path


def test_the_run_directory_is_named_after_the_folder_and_the_config_file(tmp_path: Path) -> None:
    # Two data sets have a config of one name: they must not share a run directory.
    (tmp_path / "mine.yaml").write_text("method: adass\n")
    assert load(file=tmp_path / "mine.yaml").run.dir == f"runs/{tmp_path.name}_mine"


def test_a_config_may_say_only_what_differs_from_another(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "ground.yaml").write_text("method: adass\ntrain: {epochs: 3, batch_size: 64}\nmodel: {hidden: [8]}\n")
    (tmp_path / "middle.yaml").write_text("base: ground.yaml\ntrain: {epochs: 4}\n")
    top = tmp_path / "own" / "top.yaml"
    top.write_text("base: ../middle.yaml\nmodel: {hidden: [4, 4]}\n")
    config = load("optim.dense_lr=0.5", file=top)
    assert (config.train.epochs, config.train.batch_size, config.model.hidden) == (4, 64, [4, 4])
    assert config.optim.dense_lr == 0.5 and config.run.dir == "runs/own_top"
    assert "base" not in config.to_yaml()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: a.yaml\n", "a.yaml: base: a.yaml is based on this file"),
        ("base: b.yaml\n", "b.yaml: base: a.yaml is based on this file"),
        ("base: gone.yaml\n", "a.yaml: base: .*gone.yaml does not exist; it is looked for beside this file"),
        ("base: [b.yaml]\n", "a.yaml: base: .* is no file name"),
        ("base: c.yaml\n", "c.yaml: unknown config key 'train.epoch'.*did you mean 'epochs'"),
    ],
)
def test_what_is_wrong_with_a_base_names_the_file_that_says_so(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    (tmp_path / "c.yaml").write_text("method: adass\ntrain: {epoch: 3}\n")
    with pytest.raises(UserError, match=told):
        load(file=tmp_path / "a.yaml")


def options_of(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(cls):
        if isinstance(f.default_factory, type(dataclasses.MISSING)) or not dataclasses.is_dataclass(
            f.default_factory()
        ):
            yield f"{prefix}.{f.name}", f
        else:
            yield from options_of(type(f.default_factory()), f"{prefix}.{f.name}")


def test_help_names_every_word_that_an_option_may_be() -> None:
    checked = 0
    for name, cls in [*SECTIONS.items(), *((f"{m}.search", c) for m, c in CONFIGS.items())]:
        for key, option in options_of(cls, name):
            for word in option.metadata.get("choices", ()):
                checked += 1
                assert word in option.metadata["help"], key
    assert checked > 50


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("run.threads=-1", "run.threads: must be >= 0, got -1"),
        ("run.seed=-1", r"run.seed: must be in \[0, 4294967295\], got -1"),
        ("run.seed=1700000000000", "run.seed: must be in .*, got 1700000000000"),
        ("model.init_std=.inf", r"model.init_std: must be in \[0, inf\), got inf"),
        ("train.patience=-3", "train.patience: must be >= 0, got -3"),
        ("dist.planner.ddr_gb=.inf", "dist.planner.ddr_gb: must be above 0 and finite, got inf"),
        ("train.epochs=0", "train.epochs: must be at least 1, got 0"),
        ("search.supernet.epochs=0", "search.supernet.epochs: must be at least 1, got 0"),
        ("optim.dense_lr=0", "optim.dense_lr: must be above 0, got 0"),
        ("optim.dense_lr=.nan", "optim.dense_lr: must be above 0, got nan"),
        ("model.dropout=1", r"model.dropout: must be in \[0, 1\), got 1"),
        ("train.lr_cut=0", r"train.lr_cut: must be in \(0, 1\], got 0"),
        ("train.metric=aug", r"train.metric: 'aug' is none of auc, logloss \(did you mean 'auc'\?\)"),
    ],
)
def test_what_an_option_may_be_is_said(given: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(given)


def test_there_are_shipped_configs() -> None:
    assert len(SHIPPED) >= 2


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: adass\ntrain: {epochs: 7, batch_size: 64}\n")
    config = load("train.batch_size=128", file=tmp_path / "a.yaml")
    assert (config.train.epochs, config.train.batch_size, config.train.patience) == (7, 128, 2)


def test_dotted_overrides_reach_nested_lists_and_mappings() -> None:
    config = load(
        "search.candidates=[0,4,8]", "search.policy.lr=0.5", "dist.tables.user=row_wise", "run.overwrite=true"
    )
    assert config.search.candidates == [0, 4, 8]
    assert config.search.policy.lr == 0.5
    assert config.dist.tables == {"user": "row_wise"}
    assert config.run.overwrite is True


def test_the_last_override_of_a_key_wins() -> None:
    assert load("train.epochs=3", "train.epochs=4").train.epochs == 4


def test_a_saved_config_comes_back_equal(tmp_path: Path) -> None:
    original = load("train.epochs=3", "dist.tables.user=row_wise", "search.pareto=['10%','2MB']", "run.dir=somewhere")
    original.save(tmp_path)
    assert load(file=tmp_path / "config.yaml").to_dict() == original.to_dict()


def test_the_order_to_overwrite_is_not_saved(tmp_path: Path) -> None:
    load("run.overwrite=true").save(tmp_path)
    assert load(file=tmp_path / "config.yaml").run.overwrite is False


def test_defaults_are_not_shared_between_configs() -> None:
    first = load()
    first.search.candidates.append(99)
    first.model.hidden.append(99)
    assert 99 not in load().search.candidates
    assert 99 not in load().model.hidden


def test_the_method_decides_the_search_section() -> None:
    assert load("search.width=16", method="ues").search.width == 16
    with pytest.raises(UserError, match="unknown config key 'search.candidates'"):
        load("search.candidates=[2,4]", method="ues")


def test_products_that_are_not_rounded_are_not_said_to_be() -> None:
    assert load("model.precision=bfloat16", "model.backbone=wide_deep").model.precision == "bfloat16"
    with pytest.raises(UserError, match="model.precision: dlrm has products in float32 alone, got bfloat16"):
        load("model.precision=bfloat16", "model.backbone=dlrm")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.epoch=3", "unknown config key 'train.epoch' .did you mean 'epochs'"),
        ("trian.epochs=3", "unknown config key 'trian' .did you mean 'train'"),
        ("search.candidate=[2,4]", "unknown config key 'search.candidate' .did you mean 'candidates'"),
        ("search.policy.lambda=1", "unknown config key 'search.policy.lambda' .did you mean 'lambda_"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        load(key)


def test_an_unknown_key_of_a_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: adass\nmodel: {backbon: fm}\n")
    with pytest.raises(UserError, match="'model.backbon' .did you mean 'backbone'"):
        load(file=tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=2.5", "train.epochs"),
        ("model.hidden=wide", "model.hidden"),
        ("run.overwrite=perhaps", "run.overwrite"),
        ("search.candidates=[2,x]", "search.candidates"),
        ("train=3", "train"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_key(override: str, key: str) -> None:
    with pytest.raises(UserError, match=f"config key {key}"):
        load(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=0", "train.epochs: must be at least 1, got 0"),
        ("train.metric=ndcg", "train.metric: 'ndcg' is none of auc, logloss"),
        ("train.lr_cut=0", "train.lr_cut: must be in"),
        ("model.backbone=deep_fm", "model.backbone: 'deep_fm'.*did you mean 'deepfm'"),
        ("model.dropout=1", "model.dropout"),
        ("model.hidden=[8,0]", "model.hidden"),
        ("optim.embedding_lr=0", "optim.embedding_lr"),
        ("optim.embedding=adamw", "optim.embedding: 'adamw'.*did you mean 'adam'"),
        ("dist.sharding=rows", "dist.sharding"),
        ("dist.tables.user=auto", "dist.tables.user"),
        ("dist.timeout_s=1", "dist.timeout_s"),
        ("run.device=tpu", "run.device"),
        ("data.make=criteo", "data.make"),
        ("search.candidates=[8,2]", "search.candidates: widths must ascend, but 2 follows 8"),
        ("search.candidates=[2,2,8]", "search.candidates: widths must ascend"),
        ("search.candidates=[-1,2]", "search.candidates: widths must be >= 0"),
        ("search.candidates=[8]", "search.candidates: at least two"),
        ("search.scheme=both", "search.scheme"),
        ("search.sampling.mode=greedy", "search.sampling.mode"),
        ("search.sampling.floor_e=0.5", "search.sampling.floor_e"),
        ("search.sampling.keep_start=0.4", "search.sampling.keep_start"),
        ("search.supernet.epochs=0", "search.supernet.epochs"),
        ("search.policy.batch=1", "search.policy.batch"),
        ("search.policy.heads=5", "search.policy.model_width"),
        ("search.policy.metric=ndcg", "search.policy.metric"),
        ("search.name=a/b", "search.name"),
        ("method=adas", "method: 'adas'.*did you mean 'adass'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"config key {message}"):
        load(override)


def test_no_method_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="no method is named"):
        load_config(CONFIGS)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "expected a mapping"), ("3", "a.yaml")]
)
def test_a_file_that_is_no_config_is_refused_by_path(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load(file=tmp_path / "a.yaml")


def test_a_missing_file_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        load(file=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("words", "plain", "dotted"),
    [
        (["--config", "a.yaml", "--train.epochs", "3"], {"config": "a.yaml"}, ["train.epochs=3"]),
        (["--config=a.yaml", "--train.epochs=3"], {"config": "a.yaml"}, ["train.epochs=3"]),
        (["--print-config", "--run.overwrite"], {"print-config": "true"}, ["run.overwrite=true"]),
        (["--", "--method", "ues", "--search.budget", "1.5MB"], {}, ["method=ues", "search.budget=1.5MB"]),
        (["--a.b=c=d"], {}, ["a.b=c=d"]),
    ],
)
def test_arguments_are_split_into_options_and_overrides(
    words: list[str], plain: dict[str, str], dotted: list[str]
) -> None:
    assert split_arguments(words) == (plain, dotted)


def test_a_word_that_is_no_option_is_refused() -> None:
    with pytest.raises(UserError, match="'epochs' is not an option"):
        split_arguments(["epochs", "3"])


def test_the_help_text_names_every_key() -> None:
    text = describe(CONFIGS)

    def keys(body: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for key, value in body.items():
            inner = isinstance(value, dict) and value
            found += keys(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
        return found

    for key in keys({k: v for k, v in load().to_dict().items() if k != "method"}, ""):
        assert f"  {key} [" in text


def test_a_fingerprint_tells_values_apart() -> None:
    assert fingerprint(load().train, [1]) == fingerprint(load().train, [1])
    assert fingerprint(load().train, [1]) != fingerprint(load("train.epochs=9").train, [1])


def test_settings_differ_by_value_and_what_an_older_version_lacked_is_its_default() -> None:
    old = {"optim.dense_lr": 0.1, "model.hidden": [4], "gone": 1}
    assert changed_settings(old, old) == []
    new = {**old, "optim.dense": "adam", "model.bottom": [64], "schedule": "constant", "search.space.blocks": 0}
    assert changed_settings(old, new, NASRecConfig) == []
    other = {**new, "optim.dense": "adagrad", "schedule": "cosine", "search.space.blocks": 3, "widths": [1]}
    assert changed_settings(old, other, NASRecConfig) == ["optim.dense", "schedule", "search.space.blocks", "widths"]
    assert changed_settings(old, {"optim.dense_lr": 0.2, "model.hidden": [4]}) == ["optim.dense_lr", "gone"]


def test_a_run_directory_of_a_version_without_transforms_had_a_map_per_width(tmp_path: Path) -> None:
    load("train.epochs=7").save(tmp_path)
    assert load(file=tmp_path / "config.yaml").model.transform == "identity"
    body = OmegaConf.load(tmp_path / "config.yaml")
    del body.model["transform"], body.model["first_order"]
    OmegaConf.save(body, tmp_path / "config.yaml")
    old = load(file=tmp_path / "config.yaml")
    assert (old.model.transform, old.model.first_order, old.train.epochs) == ("width", "embedding", 7)
    assert load("model.transform=field", file=tmp_path / "config.yaml").model.transform == "field"
    # A person's file has what is today's default.
    del body["dist"]
    OmegaConf.save(body, tmp_path / "my.yaml")
    assert load(file=tmp_path / "my.yaml").model.transform == "identity"
    # So does what a checkpoint or a stage recorded.
    old_settings = {"model.norm": "none", "optim.dense": "adam"}
    assert changed_settings(old_settings, {**old_settings, "model.transform": "width"}) == []
    new = {**old_settings, "model.transform": "identity"}
    assert changed_settings(old_settings, new) == ["model.transform"]
    assert tell_changed(old_settings, new, ["model.transform"]) == "model.transform was 'width', now 'identity'"
