"""A run directory is ours: what is not ours is never replaced or deleted, one process works in it, and it is sealed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_json, write_sealed
from embsearch_dist.rundir import LOCK, clear, foreign, hold, plain_word, release
from embsearch_dist.written import adopt
from tests.factories import command_line, small_config
from tests.launch.test_bad_input import assert_refused


@pytest.fixture
def run(data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, run_script: Callable) -> Path:
    """A run directory of uniform widths, made once and copied."""
    folder = tmp_path_factory.getbasetemp() / "found"
    if not folder.exists():
        folder.mkdir()
        (folder / "ues.yaml").write_text("method: ues\nsearch: {width: 4}\ntrain: {epochs: 1, batch_size: 512}\n")
        run_script("search.py", "--config", folder / "ues.yaml", *command_line(data, folder / "run"))
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def search(run_script: Callable, data: Path, run: Path, *words: object) -> object:
    config = run.parent / "given.yaml"
    config.write_text("method: ues\nsearch: {width: 4}\n")
    return run_script("search.py", "--config", config, *command_line(data, run), *words, check=False)


@pytest.mark.parametrize("words", [[], ["--run.overwrite", "true"]])
def test_a_folder_of_the_users_is_left_as_it_is(
    data: Path, tmp_path: Path, run_script: Callable, words: list[str]
) -> None:
    own = tmp_path / "my"
    own.mkdir()
    files = {"config.yaml": "method: ues\nsearch: {width: 4}\n", "source.yaml": "x", "clicks.csv": "y"}
    for name, text in files.items():
        (own / name).write_text(text)
    done = run_script("search.py", "--config", own / "config.yaml", *command_line(data, own), *words, check=False)
    assert_refused(done, "my is not a run directory", "nothing was deleted")
    assert {p.name: p.read_text() for p in own.iterdir()} == files


PLACES = ["notes.txt", "retrain/mine.txt", "retrain/a/thesis.tex", "more.yaml"]
PLACES += ["report/notes.md", "tb/notes.txt", "stages/mine.txt", "search/thesis.tex", "allocations/by_hand.json"]
PLACES += ["widest-mine/thesis.tex", "retrain/a/group-0/notes.txt"]
PLACES += ["checkpoints/supernet/step-3/readme", "groups/group-0/mine.csv", "widest/checkpoints/retrain/notes"]


@pytest.mark.parametrize("place", [PLACES[0], PLACES[5], PLACES[8]])
def test_overwrite_deletes_only_what_we_made(data: Path, run: Path, run_script: Callable, place: str) -> None:
    before = run / "allocation.json"
    (run / place).parent.mkdir(parents=True, exist_ok=True)
    (run / place).write_text("years of work")
    (run / "metrics.jsonl").write_text('{"stage": "old"}\n')
    done = search(run_script, data, run, "--run.overwrite", "true")
    assert_refused(done, str(run / place), "Nothing was deleted")
    assert (run / place).read_text() == "years of work" and before.exists() and (run / "metrics.jsonl").exists()
    (run / place).unlink()
    assert search(run_script, data, run, "--run.overwrite", "true").returncode == 0
    assert before.exists() and not (run / "metrics.jsonl").exists()


def test_files_of_the_users_are_found_in_every_folder(run: Path) -> None:
    """And none of what every method leaves is taken for theirs."""
    made = ["stages/widest.json", "search/pareto.json", "report/index.html", "report/curves-gates.png"]
    made += ["tb/gates/events.out.tfevents.17.host.3.0", "checkpoints/gates/best.json", "architectures/rank-12.json"]
    made += ["checkpoints/gates/step-12/data/__0_1.distcp", "checkpoints/gates/step-12/data/.metadata"]
    made += ["checkpoints/gates/step-9.damaged/manifest.json", "checkpoints/gates/step-9.partial/state.json"]
    made += ["groups/router.json", "groups/field_router-0.npy", "groups/assignment/train.npy", "groups/kmeans.json.tmp"]
    made += ["groups/group-1/train/part-00000.parquet", "groups/group-1/schema.json", "retrain/a/training.json"]
    made += ["widest-auto-seed2/training.json", "retrain/a/difference-to-ues-8.json", "emptied.json"]
    made += ["widest/checkpoints/retrain/step-1/state.json", "retrain/a/group-0/tb/retrain/events.out.tfevents.1"]
    for name in made:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    adopt(run / "architectures/rank-12.json", "0")
    assert foreign(run) is None
    for name in PLACES:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
        assert foreign(run) == run / name
        (run / name).unlink()
    (run / "report" / "index.html").unlink()
    (run / "report" / "index.html").symlink_to(run / "config.yaml")
    assert foreign(run) == run / "report" / "index.html"


def test_a_kill_while_it_is_emptied_does_not_lock_the_directory(
    data: Path, run: Path, run_script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []

    def killed(path: Path) -> None:
        removed.append(path.name)
        if path.name == "schema.json":
            raise KeyboardInterrupt
        os.unlink(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        hold(run, "test")
        clear(run)
    release()
    assert (run / "config.yaml").exists() and "config.yaml" not in removed
    assert search(run_script, data, run, "--run.overwrite", "true").returncode == 0
    for path in run.iterdir():  # a first start that was killed before it wrote anything
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert search(run_script, data, run, "--run.overwrite", "true").returncode == 0
    assert (run / "allocation.json").exists()


def test_one_process_works_in_a_directory(data: Path, run: Path, run_script: Callable) -> None:
    file = os.open(run / LOCK, os.O_RDWR)
    os.pwrite(file, b'{"host": "node7", "pid": 41, "doing": "search.py"}\n'.ljust(200), 0)
    fcntl.flock(file, fcntl.LOCK_EX)
    assert_refused(search(run_script, data, run), f"{run}: search.py (process 41 on node7) is at work there")
    os.close(file)  # the kernel does this for the dead
    assert search(run_script, data, run).returncode == 0


def test_a_lock_is_for_this_process_until_it_lets_go(tmp_path: Path) -> None:
    hold(tmp_path / "a", "test")
    hold(tmp_path / "a", "test")
    other = os.open(tmp_path / "a" / LOCK, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UserError, match="a: test .* is at work there"):
        hold(tmp_path / "a", "test")
    os.close(other)


def test_a_cut_or_changed_config_is_refused_and_an_edited_one_is_not(
    data: Path, run: Path, run_script: Callable
) -> None:
    path = run / "config.yaml"
    text = path.read_text()
    again = ["--run.dir", run]
    for cut in ("train:", "optim:", "search:", "# sha256"):
        path.write_text(text[: text.index(cut)])
        assert_refused(run_script("search.py", *again, check=False), str(path), "cut short")
        assert_refused(run_script("retrain.py", "--run", run, check=False), str(path), "cut short")
    changed = text.replace("batch_size: 512", "batch_size: 513")
    path.write_text(changed)
    assert_refused(run_script("search.py", *again, check=False), str(path), "differs from its checksum", "# edited")
    path.write_text(changed + "# edited\n")
    run_script("search.py", *again)
    assert "batch_size: 513" in path.read_text() and not path.read_text().endswith("# edited\n")


def test_names_that_become_folders(data: Path, run: Path, run_script: Callable, tmp_path: Path) -> None:
    done = run_script("retrain.py", "--run", run, "--name", "../../x", check=False)
    assert_refused(done, "--name: '../../x' cannot name a folder")
    stranger = read_json(run / "allocation.json")
    del stranger["sha256"]
    stranger["provenance"]["name"] = str(tmp_path / "away")
    write_json(tmp_path / "s.json", stranger)
    done = run_script("retrain.py", "--run", run, "--allocation", tmp_path / "s.json", check=False)
    assert_refused(done, "cannot name a folder", "--name gives another")
    assert not (tmp_path / "away").exists() and not (run / "retrain").exists()
    with pytest.raises(UserError, match="search.name: .*'a/b'"):
        small_config(data, run, "search.name=a/b")
    for name in ("007", "exp #1", "no", "ü"):
        assert plain_word(name, "x") == name
    for name in ("", ".", "..", ".x", "a/b", "a\\b", "a\nb", "x" * 151):
        with pytest.raises(UserError, match="cannot name a folder"):
            plain_word(name, "x")


def test_one_bit_of_an_allocation_is_noticed_and_a_lost_one_is_restored(
    data: Path, run: Path, run_script: Callable
) -> None:
    path = run / "allocation.json"
    whole = path.read_text()
    path.write_text(whole.replace('"big": 4', '"big": 5'))
    done = run_script("retrain.py", "--run", run, check=False)
    assert_refused(done, "allocation.json was changed since it was written", '"sha256"')
    (run / "allocations").mkdir()
    (run / "allocations" / "ues-4.json").write_text(whole)
    path.unlink()
    done = run_script("search.py", "--run.dir", run)
    assert f"stage allocate: {path} is gone; made again" in done.stdout and path.exists()
    path.unlink()
    mark = read_json(run / "stages" / "allocate.json")
    write_sealed(run / "stages" / "allocate.json", {**mark, "files": []})  # as of an older version
    done = run_script("search.py", "--run.dir", run)
    assert f"{path} was gone: restored from" in done.stdout and read_json(path) == read_json(
        run / "allocations/ues-4.json"
    )
