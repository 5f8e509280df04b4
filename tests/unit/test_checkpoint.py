"""Checkpoints: damage is found and named before anything is loaded, and old ones make room."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_json
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.train.checkpoint import Checkpointer, SaveError, verify
from embsearch_dist.train.faults import SAVE_POINTS, Faults, parse
from embsearch_dist.train.manifest import write_manifest
from tests.factories import one_rank, random_batch, small_config, small_schema, whole_tables

SCHEMA = small_schema(20, 9)


def checkpointer(root: Path, *overrides: str, seed: int = 0, **options: Any) -> Checkpointer:
    config = small_config("no-data", root, f"run.seed={seed}", *overrides)
    model = SubnetModel(config, Allocation(SCHEMA, {"f0": 6, "f1": 2}), one_rank())
    optimizer = torch.optim.Adam(model.bare_head.parameters(), lr=0.01)
    return Checkpointer(root, model, optimizer, one_rank(), **options)


def step(checkpoints: Checkpointer) -> None:
    """One step of training, so that every optimizer has a state."""
    checkpoints.optimizer.zero_grad()
    checkpoints.model.sharded.zero_grad()
    checkpoints.model(random_batch(SCHEMA))[0].square().sum().backward()
    checkpoints.optimizer.step()
    checkpoints.model.sharded.step()


def weights(checkpoints: Checkpointer) -> dict[str, torch.Tensor]:
    model = checkpoints.model
    found = whole_tables(model.sharded) | dict(model.bare_head.state_dict())
    return {k: v.detach().clone() for k, v in found.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpointer:
    """Two checkpoints: ``step-1`` and ``step-2``."""
    checkpoints = checkpointer(tmp_path / "ck")
    for number in (1, 2):
        step(checkpoints)
        checkpoints.save(number, {"number": number})
    return checkpoints


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :func:`saved` leaves, made once; to be copied."""
    checkpoints = checkpointer(tmp_path_factory.mktemp("twice") / "ck")
    for number in (1, 2):
        step(checkpoints)
        checkpoints.save(number, {"number": number})
    return checkpoints.root


@pytest.fixture
def folder(twice: Path, tmp_path: Path) -> Path:
    """A copy of ``step-1`` and ``step-2`` to damage."""
    return Path(shutil.copytree(twice, tmp_path / "folder"))


def reader(root: Path, said: list[str] | None = None) -> Checkpointer:
    """One that only looks at files; it needs no model for that."""
    say = (lambda text: None) if said is None else said.append
    return Checkpointer(root, None, None, one_rank(), say=say)  # type: ignore[arg-type]


def test_a_checkpoint_restores_weights_optimizers_and_state(saved: Checkpointer) -> None:
    at_two = weights(saved)
    step(saved)
    after_three = weights(saved)
    fresh = checkpointer(saved.root, seed=7)
    assert fresh.load(2) == {"number": 2}
    assert all(torch.equal(v, at_two[k]) for k, v in weights(fresh).items())
    step(fresh)  # only right with the optimizers' state
    assert all(torch.equal(v, after_three[k]) for k, v in weights(fresh).items())


def test_adam_goes_on_counting_where_the_checkpoint_was(saved: Checkpointer) -> None:
    fresh = checkpointer(saved.root, seed=7)
    fresh.load(2)
    assert int(fresh.model.sharded.adam.steps) == 2
    states = []
    for count in (2, 0):  # the count matters: with another one the next step is another
        fresh.load(2)
        fresh.model.sharded.adam.steps.fill_(count)
        step(fresh)
        states.append(weights(fresh))
    step(saved)
    after_three = weights(saved)
    same = [all(torch.equal(v, after_three[k]) for k, v in found.items()) for found in states]
    assert same == [True, False]


def test_a_checkpoint_of_the_adam_that_moved_every_row_is_for_evaluation_alone(folder: Path) -> None:
    settings = {"settings": {"optim.embedding": "adam"}}
    facts = {"format": 2, "step": 2, "world_size": 1, "sharding": {}, "schema": "", **settings}
    write_manifest(folder / "step-2", facts)
    with pytest.raises(UserError, match="step-2 was made when optim.embedding adam moved every row.*Start anew"):
        checkpointer(folder, **settings).load(2)
    assert checkpointer(folder, **settings).load(2, optimizers=False) == {"number": 2}


def test_weights_can_be_had_without_the_optimizers(saved: Checkpointer) -> None:
    fresh = checkpointer(saved.root, "optim.embedding=adagrad", seed=7)
    fresh.load(2, optimizers=False)
    assert all(torch.equal(v, weights(saved)[k]) for k, v in weights(fresh).items())


def test_another_optimizer_than_the_checkpoints_is_refused(saved: Checkpointer) -> None:
    fresh = checkpointer(saved.root, "optim.embedding=adagrad", seed=7)
    with pytest.raises(UserError, match=r"step-2 of 1 rank\(s\) does not fit.*fused_optimizer"):
        fresh.load(2)


def damage(path: Path, how: str) -> None:
    body = bytearray(path.read_bytes())
    if how == "flip":
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    elif how == "cut":
        path.write_bytes(body[:-3])
    else:
        path.unlink()


DAMAGES = pytest.mark.parametrize("how", ["flip", "cut", "remove"])


@pytest.mark.parametrize("name", ["state.json", "data/.metadata", "data/__0_0.distcp"])
@DAMAGES
def test_damage_is_named_and_nothing_is_loaded(saved: Checkpointer, name: str, how: str) -> None:
    damage(saved.root / "step-2" / name, how)
    fresh = checkpointer(saved.root, seed=7)
    before = weights(fresh)
    problem = "missing" if how == "remove" else "damaged"
    with pytest.raises(UserError, match=f"checkpoint file .*step-2/{name} is {problem}"):
        fresh.load(2)
    assert all(torch.equal(v, before[k]) for k, v in weights(fresh).items())
    assert fresh.load(1) == {"number": 1}  # the one before is whole


def test_every_file_but_the_manifest_has_a_checksum(saved: Checkpointer) -> None:
    folder = saved.root / "step-2"
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files - set(json.loads((folder / "manifest.json").read_text())["files"]) == {"manifest.json"}


def test_a_directory_without_manifest_does_not_count(saved: Checkpointer) -> None:
    (saved.root / "step-2" / "manifest.json").unlink()
    (saved.root / "step-\u00b2").mkdir()
    assert saved.steps() == [1]
    with pytest.raises(UserError, match="step-2 is not a whole checkpoint: manifest.json is missing"):
        saved.load(2)


def test_a_half_written_checkpoint_does_not_count_and_is_written_over(saved: Checkpointer) -> None:
    partial = saved.root / "step-3.partial"
    shutil.copytree(saved.root / "step-2", partial)
    assert saved.steps() == [1, 2]
    saved.save(3, {"number": 3})
    assert saved.steps() == [2, 3]
    assert not partial.exists()
    verify(saved.root / "step-3")


def test_a_checkpoint_of_the_same_step_is_replaced(saved: Checkpointer) -> None:
    step(saved)
    saved.save(2, {"number": 22})
    assert saved.load(2) == {"number": 22}


def test_the_last_two_and_the_best_stay(saved: Checkpointer) -> None:
    saved.mark_best(1)
    for number in (3, 4, 5):
        saved.save(number, {})
    assert saved.steps() == [1, 4, 5]
    saved.mark_best(5)
    saved.save(6, {})
    assert saved.steps() == [5, 6]
    assert saved.best() == 5


def test_there_is_no_best_before_one_is_marked(tmp_path: Path) -> None:
    fresh = checkpointer(tmp_path / "none")
    assert fresh.best() is None
    assert fresh.steps() == []


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "rowwise_adagrad", "sgd"])
def test_the_state_of_each_optimizer_is_in_the_checkpoint(tmp_path: Path, optimizer: str) -> None:
    checkpoints = checkpointer(tmp_path, f"optim.embedding={optimizer}")
    for _ in range(3):
        step(checkpoints)
    checkpoints.save(3, {})
    step(checkpoints)
    expected = weights(checkpoints)
    fresh = checkpointer(tmp_path, f"optim.embedding={optimizer}", seed=7)
    fresh.load(3)
    step(fresh)
    assert all(torch.equal(v, expected[k]) for k, v in weights(fresh).items())


def test_restoring_keeps_the_optimizers_learning_rate(saved: Checkpointer, tmp_path: Path) -> None:
    fresh = checkpointer(saved.root, seed=7)
    for group in fresh.optimizer.param_groups:
        group["lr"] = 0.5
    fresh.load(2)
    assert fresh.optimizer.param_groups[0]["lr"] == 0.5


def test_a_broken_state_is_found_before_the_tables_are_touched(
    saved: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order matters: DCP's own metadata is a pickle, so checksums come first."""
    import torch.distributed.checkpoint as dcp

    called: list[str] = []
    original: Callable[..., None] = dcp.load
    monkeypatch.setattr(dcp, "load", lambda *a, **k: (called.append("load"), original(*a, **k)))
    (saved.root / "step-2" / "data" / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="damaged"):
        saved.load(2)
    assert called == []
    saved.load(1)
    assert called == ["load"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "data/.metadata", "data/__0_0.distcp"])
@DAMAGES
def test_the_newest_whole_checkpoint_is_found_and_damage_set_aside(folder: Path, name: str, how: str) -> None:
    damage(folder / "step-2" / name, how)
    said: list[str] = []
    assert reader(folder, said).newest_whole() == 1
    assert len(said) == 1
    assert f"step-2/{name} is" in said[0] or "step-2 is not a whole checkpoint: manifest.json is missing" in said[0]
    assert said[0].endswith("set aside as step-2.damaged, going back to the checkpoint before")
    assert reader(folder).newest() == 1
    assert (folder / "step-2.damaged").is_dir()


def test_an_error_only_when_no_whole_checkpoint_is_left(folder: Path) -> None:
    for number in (1, 2):
        damage(folder / f"step-{number}" / "state.json", "flip")
    with pytest.raises(UserError, match="no whole checkpoint is left under .*step-2/state.json is damaged.*delete"):
        reader(folder).newest_whole()
    assert reader(folder).steps() == [1, 2]  # nothing was moved
    assert reader(folder / "nothing").newest_whole() is None


def test_any_flipped_byte_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / "step-2" / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole) - 1):  # the last one is the end of the line
        body = bytearray(whole)
        body[place] ^= 1
        path.write_bytes(body)
        if json.loads(whole) == _or_none(body):
            continue  # another kind of white space
        with pytest.raises(UserError, match="step-2"):
            verify(folder / "step-2")


def _or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


IDENTITY = {"schema": "abc", "settings": {"optim.embedding": "adam", "batch_size": 256}}


def test_the_manifest_says_what_the_checkpoint_was_made_for(tmp_path: Path) -> None:
    checkpointer(tmp_path, **IDENTITY).save(7, {})
    body = read_json(tmp_path / "step-7" / "manifest.json")
    assert (body["step"], body["world_size"], body["schema"]) == (7, 1, "abc")
    assert body["sharding"] == {"f0": "table_wise", "f1": "table_wise"}
    assert body["settings"] == IDENTITY["settings"]
    assert len(body["config"]) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "xyz"}, r"another schema \(abc, now xyz\); set --data.path"),
        (
            {"settings": {"optim.embedding": "sgd", "batch_size": 256}},
            "optim.embedding was 'adam', now 'sgd'. Put them",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_what_differs(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    checkpointer(tmp_path, **IDENTITY).save(7, {})
    with pytest.raises(UserError, match=message):
        checkpointer(tmp_path, **(IDENTITY | change)).load(7)


def test_a_renamed_checkpoint_is_refused(folder: Path) -> None:
    (folder / "step-2").rename(folder / "step-20")
    with pytest.raises(UserError, match="step-20 is of step 2.*its name step-2"):
        checkpointer(folder).load(20)


def test_a_manifest_of_an_older_version_still_loads(folder: Path) -> None:
    path = folder / "step-2" / "manifest.json"
    write_json(path, {k: v for k, v in read_json(path).items() if k in ("world_size", "files")})
    assert checkpointer(folder, **IDENTITY).load(2) == {"number": 2}


@pytest.mark.parametrize("point", SAVE_POINTS[:4])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_old_checkpoints_and_no_half_one(
    saved: Checkpointer, point: str, background: bool
) -> None:
    saved.faults = Faults(parse(f"raise error=ENOSPC save={point}"), 0, "")
    with pytest.raises(SaveError, match=r"step-3 could not be written: .*No space left.*MB are free.*step-2") as caught:
        saved.save(3, {"number": 3}, background=background)
        saved.wait()
    assert caught.value.step == 3
    assert sorted(p.name for p in saved.root.iterdir()) == ["step-1", "step-2"]
    saved.save(4, {"number": 4}, background=background)  # there is room again
    saved.wait()
    assert saved.steps() == [2, 4]


def test_a_write_that_the_system_refuses_is_told(saved: Checkpointer) -> None:
    """A real one: no file of this process may grow beyond 1000 bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(SaveError, match="step-3 could not be written"):
            saved.save(3, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(p.name for p in saved.root.iterdir()) == ["step-1", "step-2"]
    assert saved.load(2) == {"number": 2}


def test_a_save_in_the_background_holds_what_was_there_when_it_began(
    saved: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    write = Checkpointer._write
    monkeypatch.setattr(Checkpointer, "_write", lambda *a: (go.wait(30), write(*a))[1])
    step(saved)
    at_three, state = weights(saved), {"list": [3]}
    saved.save(3, state, best=True, background=True)
    step(saved)
    state["list"].append(4)
    assert saved.steps() == [1, 2]
    go.set()
    assert saved.wait() == 3
    assert saved.best() == 3
    fresh = checkpointer(saved.root, seed=7)
    assert fresh.load(3) == {"list": [3]}
    assert all(torch.equal(v, at_three[k]) for k, v in weights(fresh).items())
    step(fresh)
    assert all(torch.equal(v, weights(saved)[k]) for k, v in weights(fresh).items())


def test_without_memory_for_a_copy_training_waits(saved: Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    said: list[str] = []
    saved.say = said.append
    for number in (3, 4):
        saved.save(number, {}, background=True)
        assert saved.newest() == number
    assert len(said) == 1
    assert "does not fit into the free memory" in said[0]
