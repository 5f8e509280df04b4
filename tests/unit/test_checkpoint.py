"""Checkpoints: damage is found and named before anything is loaded, and old ones make room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.models.ctr import SubnetModel
from embsearch_dist.train.checkpoint import Checkpointer, verify
from tests.factories import one_rank, random_batch, small_config, small_schema, whole_tables

SCHEMA = small_schema(20, 9)


def checkpointer(root: Path, *overrides: str, seed: int = 0) -> Checkpointer:
    config = small_config("no-data", root, f"run.seed={seed}", *overrides)
    model = SubnetModel(config, Allocation(SCHEMA, {"f0": 6, "f1": 2}), one_rank())
    optimizer = torch.optim.Adam(model.bare_head.parameters(), lr=0.01)
    return Checkpointer(root, model, optimizer, one_rank())


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


def test_a_checkpoint_restores_weights_optimizers_and_state(saved: Checkpointer) -> None:
    at_two = weights(saved)
    step(saved)
    after_three = weights(saved)
    fresh = checkpointer(saved.root, seed=7)
    assert fresh.load(2) == {"number": 2}
    assert all(torch.equal(v, at_two[k]) for k, v in weights(fresh).items())
    step(fresh)  # only right with the optimizers' state
    assert all(torch.equal(v, after_three[k]) for k, v in weights(fresh).items())


def test_weights_can_be_had_without_the_optimizers(saved: Checkpointer) -> None:
    fresh = checkpointer(saved.root, "optim.embedding=adagrad", seed=7)
    fresh.load(2, optimizers=False)
    assert all(torch.equal(v, weights(saved)[k]) for k, v in weights(fresh).items())


def test_another_optimizer_than_the_checkpoints_is_refused(saved: Checkpointer) -> None:
    fresh = checkpointer(saved.root, "optim.embedding=adagrad", seed=7)
    with pytest.raises(UserError, match=r"step-2 of 1 rank\(s\) does not fit.*fused_optimizer"):
        fresh.load(2)


@pytest.mark.parametrize("name", ["state.json", "data/.metadata", "data/__0_0.distcp"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_nothing_is_loaded(saved: Checkpointer, name: str, damage: str) -> None:
    path = saved.root / "step-2" / name
    body = bytearray(path.read_bytes())
    if damage == "flip":
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    elif damage == "cut":
        path.write_bytes(body[:-1])
    else:
        path.unlink()
    fresh = checkpointer(saved.root, seed=7)
    before = weights(fresh)
    problem = "missing" if damage == "remove" else "damaged"
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
