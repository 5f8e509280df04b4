"""Which LayerNorms a network keeps when it is trained alone, and that older run directories keep theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.config.settings import changed_settings
from embsearch_dist.errors import UserError
from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import Space
from embsearch_dist.run import Run
from embsearch_dist.train.directories import lasting, open_retraining
from embsearch_dist.train.retrain import SubnetTask, load_best, retrain
from tests.factories import CONFIGS, one_rank, open_run, prepared, small_config, streams

SPACE = Space(blocks=3, dense_widths=(8, 16), sparse_widths=(4, 6), tokens=2, width=8)
FIELDS, COLUMNS, ROWS = 5, 3, 7


def block(dense: str, sparse: str) -> Block:
    return Block((dense,), 8, (sparse,), 4, (0,), (0,), (0,), (0,), dense_to_sparse=True, fm=True)


@pytest.mark.parametrize("sparse", ["efc", "attention"])
def test_as_published_only_attentions_residuals_are_normalised(sparse: str) -> None:
    architecture = Architecture((block("fc", sparse),))
    kept = ArchitectureNetwork(architecture, SPACE, FIELDS, COLUMNS, "attention").weights
    every = ArchitectureNetwork(architecture, SPACE, FIELDS, COLUMNS).weights
    norms = {n for n in every if n.endswith(("_scale", "_shift"))}
    inside = {f"block1_residual{k}_{what}" for k in (1, 2) for what in ("scale", "shift")}
    assert set(every) - set(kept) == norms - inside
    assert norms & set(kept) == (inside if sparse == "attention" else set())


def test_without_layer_norms_a_network_is_its_products_alone() -> None:
    """Against the formulas of the operators, written out."""
    torch.manual_seed(0)
    network = ArchitectureNetwork(Architecture((block("fc", "efc"),)), SPACE, FIELDS, COLUMNS, "attention")
    w = {n.removeprefix("block1_"): p for n, p in network.weights.items()}
    for p in w.values():
        torch.nn.init.normal_(p)
    u, dense = torch.randn(ROWS, FIELDS, 8), torch.randn(ROWS, COLUMNS)
    d = torch.relu(dense @ w["fc_weight"].T + w["fc_bias"])
    s = torch.relu(u.transpose(1, 2) @ w["efc_weight"].T + w["efc_bias"])
    made = (d @ w["merge_weight"].T + w["merge_bias"]).view(ROWS, 8, 2)
    squares = s.sum(2).square() - s.square().sum(2)
    d = d + squares @ w["fm_weight"].T + w["fm_bias"]
    expected = d @ w["head_dense"][0] + (torch.cat([made, s], 2) * w["head_sparse"]).sum((1, 2)) + w["head_bias"]
    torch.testing.assert_close(network(u, dense), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer_norm", ["attention", "all"])
def test_every_weight_is_trained_either_way(layer_norm: str) -> None:
    u, dense = torch.randn(ROWS, FIELDS, 8), torch.randn(ROWS, COLUMNS)
    for seed in range(5):
        architecture = draw(SPACE, SCHEMES[2], np.random.default_rng(seed))
        network = ArchitectureNetwork(architecture, SPACE, FIELDS, COLUMNS, layer_norm)
        network(u, dense).sum().backward()
        assert all(p.grad is not None for p in network.parameters())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def network_config(data: Path, directory: Path, *overrides: str) -> Config:
    file = directory / "searched.json"
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        Architecture((block("fc", "efc"),)).save(file, space=SPACE.to_json())
    model = ["model.backbone=nasrec", f"model.architecture={file}", "model.unify=mixed", "model.unified_width=8"]
    return small_config(data, directory / "run", *model, "train.steps=2", *overrides, method="nasrec")


def train(config: Config) -> Allocation:
    run = open_run(config, one_rank())
    allocation, directory = Allocation.uniform(run.schema, 8), Path(config.run.dir)
    open_retraining(config, run.schema, allocation, directory)
    retrain(config, allocation, *streams(run), run.context, directory, quiet=True)
    return allocation


def as_an_older_version_left_it(directory: Path) -> None:
    """Without the setting, the head and the checksum."""
    path = directory / "config.yaml"
    written = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    lines = [line for line in written if "layer_norm" not in line]
    assert len(lines) == len(written) - 1
    path.write_text("\n".join(lines) + "\n")


def test_a_run_directory_of_an_older_version_keeps_its_layer_norms(data: Path, tmp_path: Path) -> None:
    config = network_config(data, tmp_path, "model.layer_norm=all")
    allocation, directory = train(config), Path(config.run.dir)
    as_an_older_version_left_it(directory)
    found = load_config(CONFIGS, directory / "config.yaml")
    assert found.model.layer_norm == "all" and network_config(data, tmp_path).model.layer_norm == "attention"
    task = load_best(found, allocation, one_rank(), directory)
    assert any(n.endswith("fc_scale") for n in task.model.bare_head.backbone.state_dict())
    # The same command continues it, or finds it done.
    open_retraining(config, allocation.schema, allocation, directory)
    with pytest.raises(UserError, match="holds another training"):
        open_retraining(network_config(data, tmp_path), allocation.schema, allocation, directory)


@pytest.mark.parametrize(("trained", "read"), [("all", "attention"), ("attention", "all")])
def test_weights_are_never_read_into_a_network_with_other_layer_norms(
    data: Path, tmp_path: Path, trained: str, read: str
) -> None:
    config = network_config(data, tmp_path, f"model.layer_norm={trained}")
    allocation, directory = train(config), Path(config.run.dir)
    other = network_config(data, tmp_path, f"model.layer_norm={read}")
    with pytest.raises(UserError, match="fc_scale"):
        load_best(other, allocation, one_rank(), directory)


def test_settings_without_it_are_those_of_a_network_with_all() -> None:
    assert changed_settings({}, {"model.layer_norm": "all"}) == []
    assert changed_settings({}, {"model.layer_norm": "attention"}) == ["model.layer_norm"]


def test_models_without_a_network_do_not_care(data: Path, tmp_path: Path) -> None:
    """Trainings of an older version go on, from a run directory and from a config file."""
    configs = [small_config(data, tmp_path, f"model.layer_norm={x}", "model.hidden=[4]") for x in ("all", "attention")]
    assert lasting(configs[0]) == lasting(configs[1])
    run = Run(configs[0], open_run(configs[0], one_rank()).schema, one_rank())
    task = SubnetTask(configs[0], Allocation.uniform(run.schema, 2), run.context)
    assert "model.layer_norm" not in task.settings
