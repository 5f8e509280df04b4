"""Which training a directory holds: what may change between two starts of it, and what makes it another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.rundir import warned_of_anew
from embsearch_dist.train.directories import open_retraining, open_run_directory
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


LAUNCHERS = [
    {"TORCHELASTIC_RUN_ID": "a1", "TORCHELASTIC_RESTART_COUNT": "{count}"},
    {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "{count}"},
    {"TORCHX_JOB_ID": "local_cwd://torchx/search-x1"},
]


def begin_anew(data: Path, directory: Path) -> Path:
    """Open a run directory that is to be emptied first; a checkpoint in it."""
    config = small_config(data, directory, "run.overwrite=true")
    open_run_directory(config, open_run(config, one_rank()).schema, directory)
    step = directory / "checkpoints" / "supernet" / "step-4"
    step.mkdir(parents=True, exist_ok=True)
    return step


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_is_started_again_keeps_what_it_has_begun_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str]
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "TORCHX_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "run"
    old = begin_anew(data, directory)
    (old / "state.json").touch()
    for count in ("0", "1", "2"):
        for name, value in launcher.items():
            monkeypatch.setenv(name, value.format(count=count))
        step = begin_anew(data, directory)
        assert (step / "state.json").exists() == (count != "0"), "the first start empties it, the next ones go on"
        (step / "state.json").touch()
    monkeypatch.setenv(next(iter(launcher)), "another job")
    assert not (begin_anew(data, directory) / "state.json").exists()


def test_the_same_command_in_one_session_begins_anew_each_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node of a Slurm job that was not requeued a person gives it twice."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (begin_anew(data, tmp_path / "run") / "state.json").touch()
    assert not (begin_anew(data, tmp_path / "run") / "state.json").exists()
    told = warned_of_anew("stopped; give the same command again to continue")
    assert told.endswith("but without --run.overwrite true (or run.overwrite in its config), which would begin anew")
