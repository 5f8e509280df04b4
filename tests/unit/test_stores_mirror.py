"""The mirror of a run directory: whole at every moment, brought back as it was, never of two runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.files import write_sealed
from embsearch_dist.rundir import write_text
from embsearch_dist.stores import mirror as mirror_module
from embsearch_dist.stores.mirror import Mirror, changed, names_of, push_once, watched
from embsearch_dist.stores.states import STATE, restore
from embsearch_dist.train.manifest import verify, write_manifest
from tests.faulty_store import Faulty, faulty_store

URL = "s3://bucket/runs/one"
PLACE = "bucket/runs/one"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    monkeypatch.setattr(mirror_module, "AT_ONCE", 1)  # so that the first write is the same one each time
    return faulty_store(tmp_path, monkeypatch)


def checkpoint(run: Path, step: int, text: str = "") -> Path:
    """A checkpoint in the form of real ones, the two before it gone."""
    folder = run / "checkpoints" / "retrain" / f"step-{step}"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "__0_0.distcp").write_text(text or f"tensors of {step}")
    (folder / "state.json").write_text(f'{{"step": {step}}}')
    write_manifest(folder, {"format": 3, "step": step})
    write_sealed(run / "checkpoints" / "retrain" / "best.json", {"step": step})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with two checkpoints, and things in it that are not to go up."""
    directory = tmp_path / "here" / "run"
    directory.mkdir(parents=True)
    (directory / "run.lock").touch()
    write_text(directory / "config.yaml", f"run:\n  mirror: {URL}\n")
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    (directory / "notes.txt").write_text("of a person")
    checkpoint(directory, 4)
    checkpoint(directory, 8)
    half = directory / "checkpoints" / "retrain" / "step-12.partial"
    half.mkdir()
    (half / "state.json").write_text("half")
    (directory / "retrain" / "other").mkdir(parents=True)
    (directory / "retrain" / "other" / "config.yaml").write_text("of another training")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names_of(directory)}


def objects(tmp_path: Path) -> list[str]:
    base = tmp_path / PLACE / "files"
    return sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.is_file())


def test_it_comes_back_as_it_was(store: Faulty, run: Path, tmp_path: Path) -> None:
    Mirror(run, URL).finish()
    other = tmp_path / "there" / "run"
    assert restore(other, URL) and contents(other) == contents(run)
    assert sorted(p.name for p in other.iterdir()) == [
        *("checkpoints", "config.yaml", "metrics.jsonl", "mirror.json", "written.json")
    ]
    verify(other / "checkpoints" / "retrain" / "step-8")
    assert not restore(other, URL), "what is there is not replaced"
    assert not restore(tmp_path / "new", f"{URL}/none"), "an empty mirror: the run begins"
    assert not (tmp_path / "new").exists()


def test_checkpoints_go_as_they_do_on_the_disk_and_nothing_is_sent_twice(
    store: Faulty, run: Path, tmp_path: Path
) -> None:
    import shutil

    found = Mirror(run, URL)
    found.finish()
    sent: list[str] = []
    store.on = lambda what, path: sent.append(path) if what == "write" else None  # type: ignore[func-returns-value]
    shutil.rmtree(run / "checkpoints" / "retrain" / "step-4")
    checkpoint(run, 12)
    found.finish()
    steps = {m[0] for name in objects(tmp_path) if (m := re.search(r"step-\d+", name))}
    assert steps == {"step-8", "step-12"} and not [p for p in sent if "step-8/" in p]
    assert sent[-1] == f"{PLACE}/{STATE}"
    order = [p for p in sent if "step-12/" in p]
    assert "/manifest.json@" in order[-1]


@pytest.mark.parametrize("at", range(6))
def test_an_upload_that_is_cut_leaves_the_state_before_whole(
    store: Faulty, run: Path, tmp_path: Path, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Mirror(run, URL)
    found.finish()
    before = contents(run)
    checkpoint(run, 12)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    begun: list[str] = []

    def cut(what: str, path: str) -> Exception | None:
        if what == "write" and path not in begun:
            begun.append(path)
        if what == "write" and len(begun) > at:
            store.cut[path] = 3  # three bytes are there, and the connection breaks, each time
        return None

    store.on = cut
    found.push()
    assert found.wait(30)
    told = capsys.readouterr().err
    assert "not up to date" in told and "injected" in told and told.count("\n") == 1, told
    store.on, store.cut = lambda what, path: None, {}
    assert restore(tmp_path / "there", URL) and contents(tmp_path / "there") == before
    found.finish()  # and the next push mends it
    assert restore(tmp_path / "later", URL) and contents(tmp_path / "later") == contents(run)
    assert len(objects(tmp_path)) == len(contents(run)), "what was cut is removed or replaced"


def test_what_a_killed_upload_has_left_is_removed(store: Faulty, run: Path, tmp_path: Path) -> None:
    Mirror(run, URL).finish()
    (tmp_path / PLACE / "files" / "left@0123456789abcdef").write_text("half")
    Mirror(run, URL).finish()
    assert "left@0123456789abcdef" not in objects(tmp_path)


def test_the_end_of_a_run_that_cannot_go_up_is_an_error(
    store: Faulty, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Mirror(run, URL)
    store.on = lambda what, path: OSError("no route (injected)") if what == "write" else None
    with pytest.raises(UserError, match=rf"lacks the end of this run: .*injected.*All of it is in {run}"):
        found.finish()
    assert capsys.readouterr().err == "", "the error says it"


@pytest.mark.parametrize("lost", ["answer", "process"])
def test_a_state_whose_writing_was_not_confirmed_is_our_own(store: Faulty, run: Path, lost: str) -> None:
    found = Mirror(run, URL)
    found.finish()
    checkpoint(run, 12)
    done = found.store.write

    def write(name: str, data: bytes) -> None:
        done(name, data)
        raise UserError("the answer was lost (injected)")

    found.store.write = write  # type: ignore[method-assign]
    found.push()
    assert found.wait(30) and "injected" in found.failure
    found.store.write = done  # type: ignore[method-assign]
    (found if lost == "answer" else Mirror(run, URL)).finish()


def test_wrong_bytes_in_a_checkpoint_cost_that_checkpoint_and_elsewhere_are_refused(
    store: Faulty, run: Path, tmp_path: Path
) -> None:
    Mirror(run, URL).finish()
    (wrong,) = (tmp_path / PLACE / "files").glob("checkpoints/retrain/step-8/data/*")
    body = wrong.read_bytes()
    wrong.write_bytes(body[:-1] + b"?")
    said: list[str] = []
    assert restore(tmp_path / "there", URL, said.append)
    assert "wrong bytes; going on without checkpoints/retrain/step-8" in said[-1]
    verify(tmp_path / "there" / "checkpoints" / "retrain" / "step-4")
    assert not (tmp_path / "there" / "checkpoints" / "retrain" / "step-8").exists()
    wrong.write_bytes(body)
    (config,) = (tmp_path / PLACE / "files").glob("config.yaml@*")
    config.write_bytes(config.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"files/config.yaml@\w+: SHA-256 .*wrong bytes. Restore that object"):
        restore(tmp_path / "elsewhere", URL)
    assert not (tmp_path / "elsewhere").exists()


def test_wrong_bytes_in_the_only_checkpoint_are_refused(store: Faulty, run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(run / "checkpoints" / "retrain" / "step-4")
    Mirror(run, URL).finish()
    (wrong,) = (tmp_path / PLACE / "files").glob("checkpoints/retrain/step-8/data/*")
    wrong.write_bytes(wrong.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="there is no other checkpoint of checkpoints/retrain"):
        restore(tmp_path / "there", URL)


def test_a_fetch_that_was_cut_goes_on(store: Faulty, run: Path, tmp_path: Path) -> None:
    Mirror(run, URL).finish()
    there = tmp_path / "there"
    store.on = lambda what, path: OSError("no route (injected)") if "step-8/data" in path else None
    with pytest.raises(UserError, match="injected"):
        restore(there, URL)
    assert not there.exists()
    store.on, store.read = lambda what, path: None, {}
    assert restore(there, URL) and contents(there) == contents(run)
    assert not [p for p in store.read if "step-4/" in p], "it had come before"


def test_a_state_that_is_replaced_while_it_is_fetched_is_read_again(store: Faulty, run: Path, tmp_path: Path) -> None:
    """As a list of objects that is older than the objects: some are gone."""
    import shutil

    found = Mirror(run, URL)
    found.finish()

    def replace(what: str, path: str) -> Exception | None:
        if what == "read" and "step-4/" in path:
            store.on = lambda what, path: None
            shutil.rmtree(run / "checkpoints" / "retrain" / "step-4")
            checkpoint(run, 12)
            found.finish()
        return None

    store.on = replace
    assert restore(tmp_path / "there", URL) and contents(tmp_path / "there") == contents(run)


def test_a_mirror_is_of_one_run(store: Faulty, run: Path, tmp_path: Path) -> None:
    first = Mirror(run, URL)
    first.finish()
    other = tmp_path / "other"
    assert restore(other, URL)
    checkpoint(other, 12)
    Mirror(other, URL).finish()
    with pytest.raises(UserError, match=rf"{re.escape(str(run))} is not what it was made from. Move"):
        Mirror(run, URL)
    with pytest.raises(UserError, match="two runs must not have one mirror"):
        first.finish()


def test_a_run_that_starts_anew_replaces_the_state_and_the_trainings_below(
    store: Faulty, run: Path, tmp_path: Path
) -> None:
    Mirror(tmp_path, URL).finish()  # a state of another directory
    training = tmp_path / "training"
    training.mkdir()
    write_text(training / "config.yaml", "run: {}\n")
    Mirror(training, f"{URL}/retrain/ues-8").finish()
    Mirror(run, URL, overwrite=True).finish()
    assert restore(tmp_path / "there", URL) and contents(tmp_path / "there") == contents(run)
    assert not restore(tmp_path / "none", f"{URL}/retrain/ues-8")


def test_a_damaged_list_is_refused(store: Faulty, run: Path, tmp_path: Path) -> None:
    Mirror(run, URL).finish()
    path = tmp_path / PLACE / STATE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="state.json: not the list of a mirror"):
        restore(tmp_path / "there", URL)


def test_who_changes_something_in_a_run_directory_need_not_know_of_the_mirror(
    store: Faulty, run: Path, tmp_path: Path
) -> None:
    found = Mirror(run, URL)
    changed(run / "checkpoints")
    assert objects(tmp_path) == []
    with watched(found):
        changed(run / "retrain" / "other")
        assert found.wait(30) and objects(tmp_path) == []
        changed(run / "checkpoints")
        assert found.wait(30) and len(objects(tmp_path)) == len(contents(run))


def test_reports_go_up_under_their_own_names(store: Faulty, run: Path, tmp_path: Path) -> None:
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("<html>")
    push_once(run)
    assert (tmp_path / PLACE / "results" / "report" / "index.html").read_text() == "<html>"
