"""NASRec through the scripts: from a config file to the report, after kills, with architectures and allocations from
files, and with files that are wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from embsearch_dist.allocation import Allocation
from embsearch_dist.networks.canonical import key
from embsearch_dist.networks.cost import network_cost
from embsearch_dist.networks.space import load as load_architecture
from embsearch_dist.schema import Schema
from launch import retrain, search
from launch.common import run_main
from tests.factories import command_line, recorded
from tests.launch.processes import LAUNCH, ROOT, TORCHRUN, finish
from tests.ranks import fork, run_ranks
from tests.scripts import _run, read

CONFIG = """
method: nasrec
model: {init_std: 0.1}
optim: {embedding: adagrad, embedding_lr: 0.05, dense: adagrad, dense_lr: 0.05, clip_norm: 5}
train: {batch_size: 256, eval_batch_size: 200, epochs: 1, log_every: 1, patience: 0, schedule: cosine, warmup: 0.1}
search:
  space: {blocks: 3, dense_widths: [8, 16], sparse_widths: [4, 6], tokens: 2, width: 8}
  supernet: {batch_size: 256, eval_batch_size: 200, epochs: 1, log_every: 1, save_every: 3, schedule: cosine}
  scoring: {rows: 300, tune_rows: 500, tune_steps: 20, tune_batch: 128}
  evolution: {population: 8, generations: 30, parents: 4, children: 2, keep: 3}
"""
SHORT = ["search.evolution.generations=2", "search.supernet.steps=4"]
MIXED = {"left": 4, "big": 2, "right": 8, "idle": 0}


def write(folder: Path) -> Path:
    (folder / "nasrec.yaml").write_text(CONFIG)
    return folder / "nasrec.yaml"


def words_for(folder: Path, data: Path, run: Path, *overrides: str) -> list[str]:
    return ["--config", str(write(folder)), *command_line(data, run, *overrides)]


def call_search(rank: int, world_size: int, words: list[str]) -> None:
    search.main(words)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a finished search that nobody has killed; not to be written to."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_ranks(call_search, 1, folder, words_for(folder, data, folder / "run"), init=False)
    return folder / "run"


@pytest.fixture
def run(unbroken: Path, tmp_path: Path) -> Path:
    """The same in a directory of the test's own."""
    copy = Path(shutil.copytree(unbroken, tmp_path / "run"))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(unbroken), str(copy)) + "# edited\n")
    return copy


def test_from_search_to_report(data: Path, tmp_path: Path, run_script: Callable) -> None:
    run = tmp_path / "run"
    done = run_script("search.py", *words_for(tmp_path, data, run, *SHORT))
    assert f"next: python launch/retrain.py --run {run}" in done.stdout
    architecture, space = load_architecture(run / "architecture.json", searched=True)
    assert (space.blocks, space.width) == (3, 8)

    done = run_script("retrain.py", "--run", run)
    own = run / "retrain" / "nasrec"
    assert f"-> {own}" in done.stdout
    result = json.loads((own / "evaluation.json").read_text())
    cost = network_cost(architecture, space, n_dense=1, fields=4, layer_norm="attention").total
    assert (result["name"], result["backbone"], result["split"]) == ("nasrec", "nasrec", "test")
    assert (result["dense_parameters"], result["flops_per_sample"]) == (cost.parameters, cost.flops)
    assert set(result["widths"].values()) == {8}
    assert result["auc"] > 0.55
    assert len(recorded(own, "retrain", "loss")) == 12
    (run / "architecture.json").rename(run / "elsewhere.json")
    shown = run_script("evaluate.py", "--run", own)
    assert json.loads(shown.stdout)["auc"] == result["auc"]
    run_script("evaluate.py", "--run", own, "--split", "validation")
    validation = json.loads((own / "evaluation-validation.json").read_text())
    assert validation["auc"] == max(recorded(own, "retrain", "auc", "validation"))
    (run / "elsewhere.json").rename(run / "architecture.json")

    page = run_script("report.py", run)
    assert "Traceback" not in page.stderr
    assert "nasrec" in Path(page.stdout.strip()).read_text()
    again = run_script("search.py", "--run.dir", run)
    assert "stage supernet: done before, skipped" in again.stdout
    assert "stage evolution: done before, skipped" in again.stdout
    again = run_script("retrain.py", "--run", run)
    assert "continuing from" in again.stdout
    assert len(recorded(own, "retrain", "loss")) == 12


@contextlib.contextmanager
def searching(words: list[str], folder: Path) -> Any:
    """``search.py`` in a process that ends, at the latest, with this block."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = fork(_run, (str(LAUNCH / "search.py"), words, str(ROOT), env, str(folder)))
    try:
        yield process
    finally:
        process.kill()
        process.join()


def kill_when(process: BaseProcess, come: Callable[[], bool], folder: Path) -> None:
    """SIGKILL as soon as ``come`` holds, while the script still runs."""
    deadline = time.monotonic() + 120
    while not come():
        assert process.is_alive() and time.monotonic() < deadline, read(folder, "out") + read(folder, "err")
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def state(run: Path) -> dict[str, Any]:
    path = run / "evolution.json"
    return dict(json.loads(path.read_text())) if path.exists() else {"generation": 0, "seen": []}


@pytest.mark.slow  # the continuation of either stage is tested in one process, to the bit
def test_a_search_killed_twice_ends_as_the_unbroken_one(
    data: Path, tmp_path: Path, unbroken: Path, run_script: Callable
) -> None:
    """Once in the supernet, once in the evolution."""
    run, words = tmp_path / "run", words_for(tmp_path, data, tmp_path / "run")
    printed = tmp_path / "printed"
    with searching(words, printed) as process:
        checkpoints = run / "checkpoints" / "supernet"
        kill_when(process, lambda: bool(list(checkpoints.glob("step-[36]/manifest.json"))), printed)
    assert not (run / "evolution.json").exists()
    assert not (checkpoints / "step-12").exists()
    with searching(words, printed) as process:
        kill_when(process, lambda: state(run)["generation"] >= 4, printed)
        assert "continuing from" in read(printed, "out")
    before = state(run)
    assert 4 <= before["generation"] < 31
    assert not (run / "architecture.json").exists()
    done = run_script("search.py", *words)
    assert f"continuing with generation {before['generation']} ({len(before['seen'])} scored)" in done.stdout
    assert "stage supernet: done before, skipped" in done.stdout
    for name in ("evolution.json", "architecture.json", "pareto.json", "architectures/rank-3.json"):
        assert (run / name).read_bytes() == (unbroken / name).read_bytes(), name
    for column in ("step", "loss", "lr"):
        assert recorded(run, "supernet", column) == recorded(unbroken, "supernet", column)


@pytest.mark.slow  # bitwise continuation is tested above, and without scripts
def test_a_random_search_goes_on_as_well(data: Path, tmp_path: Path, run: Path, run_script: Callable) -> None:
    """In a directory where another search ended: with the first generations of the new one, as a kill leaves them."""
    words = ["search.py", "--run.dir", run, "--search.evolution.strategy", "random"]
    done = run_script(*words, "--search.evolution.generations", 6)
    assert "stage supernet: done before, skipped" in done.stdout
    whole = (run / "evolution.json").read_bytes()
    body = {k: v for k, v in json.loads(whole).items() if k != "sha256"}
    assert body["signature"]["evolution"]["strategy"] == "random" and len(body["seen"]) == 20
    body["generation"], body["seen"], body["population"] = 3, body["seen"][:12], [*range(4, 12)]
    (run / "evolution.json").write_text(json.dumps(body))
    (run / "stages" / "evolution.json").unlink()
    again = run_script(*words, "--search.evolution.generations", 6)
    assert "continuing with generation 3 (12 scored)" in again.stdout
    assert (run / "evolution.json").read_bytes() == whole


@pytest.mark.slow
def test_two_ranks_under_torchrun(data: Path, tmp_path: Path, start: Callable, run_script: Callable) -> None:
    run = tmp_path / "run"
    words = words_for(tmp_path, data, run, *SHORT, "search.sampling.same_network=false")
    told = finish(start(*TORCHRUN, "--", LAUNCH / "search.py", *words))
    assert "2 rank(s) on cpu" in told and "Traceback" not in told
    assert told.count("; next: ") == 1
    assert len(state(run)["seen"]) == 12
    run_script("retrain.py", "--run", run, "--train.steps", 2)
    assert json.loads((run / "retrain" / "nasrec" / "evaluation.json").read_text())["backbone"] == "nasrec"


def test_a_mixed_allocation_behind_the_architecture(run: Path, run_script: Callable) -> None:
    schema = Schema.load(run)
    Allocation(schema, MIXED, {"method": "adass", "name": "mixed"}).save(run / "mixed.json")
    run_script("retrain.py", "--run", run, "--allocation", run / "mixed.json")
    own = run / "retrain" / "mixed"
    result = json.loads((own / "evaluation.json").read_text())
    architecture, space = load_architecture(run / "architecture.json")
    cost = network_cost(architecture, space, 1, fields=3, layer_norm="attention").total  # one field is dropped
    assert (result["widths"], result["backbone"]) == (MIXED, "nasrec")
    assert result["embedding_parameters"] == Allocation(schema, MIXED).total("parameters")
    maps = sum(w * 8 for w in (4, 2, 8)), 3 * 8  # to the width of the space, with a bias for each width
    assert result["dense_parameters"] == cost.parameters + sum(maps)
    assert result["flops_per_sample"] == cost.flops + 2 * maps[0]
    shown = run_script("evaluate.py", "--run", own)
    assert json.loads(shown.stdout)["auc"] == result["auc"]


def test_one_config_names_an_allocation_and_an_architecture(run: Path, tmp_path: Path, run_script: Callable) -> None:
    Allocation(Schema.load(run), MIXED, {"method": "adass", "name": "mixed"}).save(tmp_path / "mixed.json")
    body = yaml.safe_load((run / "config.yaml").read_text())
    model = {"backbone": "nasrec", "architecture": str(run / "architecture.json"), "unify": "always"}
    body["model"] |= model | {"transform": "width", "unified_width": 8, "allocation": str(tmp_path / "mixed.json")}
    body["run"]["dir"] = str(tmp_path / "run")
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(body))
    run_script("retrain.py", "--config", tmp_path / "both.yaml", "--train.steps", 2)
    result = json.loads((tmp_path / "run" / "retrain" / "mixed" / "evaluation.json").read_text())
    assert (result["widths"], result["backbone"]) == (MIXED, "nasrec")
    run_script("retrain.py", "--config", tmp_path / "both.yaml", "--train.steps", 2, "--allocation", "ues-8")
    other = json.loads((tmp_path / "run" / "retrain" / "nasrec-ues-8" / "evaluation.json").read_text())
    assert set(other["widths"].values()) == {8}


def test_another_architecture_under_another_name(run: Path, run_script: Callable) -> None:
    second = run / "architectures" / "rank-2.json"
    words = ["retrain.py", "--run", run, "--model.architecture", second, "--name", "second"]
    run_script(*words)
    own = run / "retrain" / "second"
    result = json.loads((own / "evaluation.json").read_text())
    architecture, space = load_architecture(second)
    cost = network_cost(architecture, space, n_dense=1, fields=4, layer_norm="attention").total
    assert (result["name"], result["dense_parameters"]) == ("second", cost.parameters)
    kept = load_architecture(own / "architecture.json")[0]
    assert key(kept) == key(architecture) != key(load_architecture(run / "architecture.json")[0])
    second.unlink()
    assert json.loads(run_script("evaluate.py", "--run", own).stdout)["auc"] == result["auc"]
    words[4] = own / "architecture.json"  # what is left of it, which overwriting must not delete first
    run_script(*words, "--run.overwrite", True, "--train.steps", 1)
    assert key(load_architecture(own / "architecture.json")[0]) == key(architecture)


def test_a_training_survives_a_search_that_found_something_else(run: Path, run_script: Callable) -> None:
    """The same name for another architecture, or one in a space of other merged tokens, is refused, and what was
    trained can still be evaluated."""
    run_script("retrain.py", "--run", run)
    own = run / "retrain" / "nasrec"
    before = json.loads((own / "evaluation.json").read_text())
    second = json.loads((run / "architectures" / "rank-2.json").read_text())
    body = json.loads((run / "architecture.json").read_text())
    body["space"]["tokens"] += 1
    for other in (second, body):
        del other["sha256"]  # a person's file
        (run / "architecture.json").write_text(json.dumps(other))
        refused = run_script("retrain.py", "--run", run, check=False)
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.strip().splitlines()[-1].startswith(f"error: {own} holds another training; give --name")
    shown = run_script("evaluate.py", "--run", own)
    assert json.loads(shown.stdout)["auc"] == before["auc"]


def with_block(number: int, **changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["blocks"][number - 1].update(changes)


def double(body: dict[str, Any]) -> None:
    body["blocks"].append(body["blocks"][0])


# What is done to the file, and what the message has to say.
BAD_FILES: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    "unknown operator": (
        with_block(2, dense="convolution"),
        ['block 2, key "dense": unknown operator "convolution"', "allowed: fc, dot_product, gating, sum"],
    ),
    "misspelt operator": (with_block(1, sparse="atention"), ['block 1, key "sparse"', "did you mean 'attention'"]),
    "source from a later block": (
        with_block(2, sparse_sources=[0, 3]),
        ['block 2, key "sparse_sources": block 3 comes later', "0 (the input) to 1"],
    ),
    "source from itself": (
        with_block(1, left=1, dense="sum", right=0),
        ['block 1, key "left": block 1 is the block itself'],
    ),
    "source from a missing block": (
        with_block(3, dense="fc", dense_sources=[0, 7]),
        ['block 3, key "dense_sources": there is no block 7'],
    ),
    "width outside the space": (
        with_block(3, sparse_width=5),
        ['block 3, key "sparse_width": width 5 is not in the space', "allowed: 4, 6"],
    ),
    "no blocks": (lambda b: b.update(blocks=[]), ['"blocks" must be a list of at least one block']),
    "a block too many": (double, ["block 4 is outside the space", "3 blocks"]),
    "missing key": (lambda b: b["blocks"][0].pop("fm"), ['block 1: key "fm" is missing; write true or false']),
    "no space": (lambda b: b.pop("space"), ['key "space" is missing']),
    "space of its own": (lambda b: b["space"].update(widht=8), ["space: unknown key 'widht'", "did you mean 'width'"]),
    "another kind": (lambda b: b.update(kind="allocation"), ['"kind" is \'allocation\', it must be "architecture"']),
    "another format": (lambda b: b.update(format=2), ['"format" is 2, this version reads format 1']),
}
UNREADABLE = {"cut short": b'{"format": 1, "ki', "not text": b"\x80\xff", "a list": b"[]"}
SETTINGS = {
    "unified width": (
        ["model.transform=width", "model.unified_width=4"],
        ["its space has embeddings of width 8", "--model.unified_width 8"],
    ),
    "always unified to another": (
        ["model.unify=always", "model.transform=width", "model.unified_width=16"],
        ["its space has embeddings of width 8, and here they come with 16", "--model.unified_width 8"],
    ),
}


def call_retrain(rank: int, world_size: int, commands: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Exit code and error output of each command line, as ``retrain.py`` would have given them."""
    found = {}
    for name, words in commands.items():
        errors, code = io.StringIO(), 0
        with mock.patch.object(sys, "argv", ["retrain.py", *words]), contextlib.redirect_stderr(errors):
            try:
                # A rank that has ended its work leaves in a hurry, which must not end this process.
                with mock.patch.object(os, "_exit", lambda code: None):
                    run_main(retrain.main, "")
            except SystemExit as e:
                code = int(str(e.code))
            except BaseException:
                code = 1
                traceback.print_exc(file=errors)
        found[name] = (code, errors.getvalue())
    return found


@pytest.fixture(scope="module")
def refused(unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """All wrong files and settings, one after the other in one process."""
    folder = tmp_path_factory.mktemp("refused")
    run = Path(shutil.copytree(unbroken, folder / "run"))
    Allocation(Schema.load(run), MIXED).save(run / "mixed.json")
    commands: dict[str, list[str]] = {}
    for name, (change, _) in BAD_FILES.items():
        body = json.loads((run / "architecture.json").read_text())
        del body["sha256"]
        change(body)
        (folder / f"{name}.json").write_text(json.dumps(body))
    for name, content in UNREADABLE.items():
        (folder / f"{name}.json").write_bytes(content)
    for name in [*BAD_FILES, *UNREADABLE, "missing file"]:
        commands[name] = ["--run", str(run), "--name", name, "--model.architecture", str(folder / f"{name}.json")]
    for name, (overrides, _) in SETTINGS.items():
        own = ["--run", str(run), "--name", name, "--allocation", str(run / "mixed.json")]
        commands[name] = [*own, *(f"--{o}" for o in overrides)]
    right = ["--run", str(run), "--train.steps", "1", "--model.architecture", str(run / "architectures/rank-2.json")]
    for name in ("unknown operator", "unified width"):
        commands[f"{name}, put right"] = [*right, "--name", name]
    commands["ues-32"] = ["--run", str(run), "--name", "ues-32", "--allocation", "ues-32"]
    commands["own result"] = ["--run", str(folder / "damaged"), "--name", "own result"]
    damaged = Path(shutil.copytree(run, folder / "damaged"))
    (damaged / "architecture.json").write_text('{"format": 1')
    return folder, run_ranks(call_retrain, 1, folder, commands, init=False)[0]


def assert_refused(found: tuple[int, str], *parts: str) -> None:
    code, told = found
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2, told
    assert len(errors) == 1 and "Traceback" not in told, told
    for part in parts:
        assert part in errors[0]


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_wrong_architecture_is_named(refused: tuple[Path, dict[str, tuple[int, str]]], case: str) -> None:
    assert_refused(refused[1][case], str(refused[0] / f"{case}.json"), *BAD_FILES[case][1])


@pytest.mark.parametrize("case", [*UNREADABLE, "missing file"])
def test_an_architecture_that_cannot_be_read_is_named(
    refused: tuple[Path, dict[str, tuple[int, str]]], case: str
) -> None:
    assert_refused(refused[1][case], str(refused[0] / f"{case}.json"))


def test_a_damaged_result_is_named(refused: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    assert_refused(refused[1]["own result"], str(refused[0] / "damaged" / "architecture.json"), "not valid JSON")


@pytest.mark.parametrize("case", SETTINGS)
def test_embeddings_of_another_width_than_the_space(
    refused: tuple[Path, dict[str, tuple[int, str]]], case: str
) -> None:
    assert_refused(refused[1][case], "architecture.json", *SETTINGS[case][1])


def test_a_uniform_width_that_is_not_the_spaces_is_told_how_to_get_there(
    refused: tuple[Path, dict[str, tuple[int, str]]],
) -> None:
    assert_refused(refused[1]["ues-32"], "width 8, and here they come with 32", "--model.unify always")


@pytest.mark.parametrize("case", ["unknown operator", "unified width"])
def test_a_refused_training_can_be_put_right_under_its_name(
    refused: tuple[Path, dict[str, tuple[int, str]]], case: str
) -> None:
    code, told = refused[1][f"{case}, put right"]
    assert code == 0, told
    result = json.loads((refused[0] / "run" / "retrain" / case / "evaluation.json").read_text())
    assert result["backbone"] == "nasrec"


def test_an_architecture_without_its_backbone(run: Path, run_script: Callable) -> None:
    words = ["--run", run, "--model.backbone", "fm", "--model.architecture", run / "architecture.json", "--name", "x"]
    done = run_script("retrain.py", *words, check=False)
    assert_refused((done.returncode, done.stderr), "model.architecture: belongs to model.backbone nasrec")
    run_script("retrain.py", "--run", run, "--model.backbone", "fm", "--name", "fm", "--train.steps", 1)
    result = json.loads((run / "retrain" / "fm" / "evaluation.json").read_text())
    assert result["backbone"] == "fm" and set(result["widths"].values()) == {8}
    assert not (run / "retrain" / "fm" / "architecture.json").exists()
