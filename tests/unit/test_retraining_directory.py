"""Which training a directory holds: what may change between two starts of it, and what makes it another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.train.directories import open_retraining
from tests.factories import one_rank, open_run, small_config


@pytest.fixture
def trained(data: Path, tmp_path: Path) -> tuple[Path, Path, Allocation]:
    config = small_config(data, tmp_path / "run")
    run = open_run(config, one_rank())
    allocation = Allocation.uniform(run.schema, 4)
    open_retraining(config, run.schema, allocation, Path(config.run.dir))
    return data, Path(config.run.dir), allocation


@pytest.mark.parametrize(
    "word",
    [
        "run.tf32=true",
        "run.threads=3",
        "run.device=auto",
        "dist.sharding=row_wise",
        "dist.planner.hbm_gb=40",
        "dist.wait_s=900",
        "train.save_every=5",
        "search.budget=50%",
        "search.name=other",
        "search.supernet.keep_checkpoints=4",
        "model.allocation=ues-4",
    ],
)
def test_where_it_runs_and_how_its_widths_were_found_may_change(
    trained: tuple[Path, Path, Allocation], word: str
) -> None:
    data, directory, allocation = trained
    open_retraining(small_config(data, directory, word), allocation.schema, allocation, directory)
    assert word.split("=")[1].strip("%") in (directory / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("run.seed=7", "run.seed was 0, now 7"),
        ("optim.dense_lr=0.5", "optim.dense_lr was .*, now 0.5"),
        ("model.hidden=[3]", r"model.hidden was .*, now \[3\]"),
        ("train.batch_size=8", "train.batch_size was .*, now 8"),
        ("data.window_rows=7", "data.window_rows was .*, now 7"),
    ],
)
def test_another_recipe_is_another_training_and_the_key_is_told(
    trained: tuple[Path, Path, Allocation], word: str, told: str
) -> None:
    data, directory, allocation = trained
    with pytest.raises(UserError, match=rf"holds another training; give --name, .* \({told}\)"):
        open_retraining(small_config(data, directory, word), allocation.schema, allocation, directory)


def test_other_widths_are_another_training(trained: tuple[Path, Path, Allocation]) -> None:
    data, directory, allocation = trained
    with pytest.raises(UserError, match=r"holds another training; .* \(other widths\)"):
        other = Allocation.uniform(allocation.schema, 8)
        open_retraining(small_config(data, directory), allocation.schema, other, directory)


def test_other_first_weights_are_another_training(data: Path, tmp_path: Path) -> None:
    epochs = "search.training.epochs=3"
    config = small_config(data, tmp_path / "run", epochs, method="optfs")
    allocation = Allocation.uniform(open_run(config, one_rank()).schema, 4)
    open_retraining(config, allocation.schema, allocation, Path(config.run.dir))
    with pytest.raises(UserError, match=r"\(search.rewind was 0, now 1\)"):
        rewinding = small_config(data, tmp_path / "run", epochs, "search.rewind=1", method="optfs")
        open_retraining(rewinding, allocation.schema, allocation, Path(config.run.dir))
