"""plan.py as a user starts it: the figures of a plan, the picture, and one line when nothing fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import PlannerConfig
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Field, Schema
from embsearch_dist.sharding import card
from embsearch_dist.sharding.card import Card
from embsearch_dist.sharding.dry_run import allocation_subject, make_plans
from embsearch_dist.sharding.plan import Topology
from embsearch_dist.sharding.plan_text import to_json
from launch.common import take_words
from launch.plan import main
from tests.factories import CONFIGS

ROWS = {"user": 2_000_000, "item": 300_000, "hour": 24}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A schema alone: the dry run reads no rows."""
    Schema("small", tuple(Field(n, r) for n, r in ROWS.items())).save(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_dry_run_of_64_ranks_in_a_process_of_its_own(tmp_path: Path, data: Path, run_script: Callable) -> None:
    schema = Schema.load(data)
    widths = {"user": 8, "item": 32, "hour": 0}
    allocation = Allocation(schema, widths, {"name": "adass"})
    allocation.save(tmp_path / "a.json")
    out, figures = tmp_path / "out", tmp_path / "plan.json"
    words = ["--world-size", 64, "--hbm-gb", 16, "--data", data / "schema.json", "--out", out, "--json", figures]
    # Another hash seed than here: the plan must not depend on it.
    done = run_script(
        "plan.py", *words, "--allocation", "ues-32", tmp_path / "a.json", env={"PYTHONHASHSEED": "1"}, fresh=True
    )
    assert done.stdout.startswith("64 rank(s) on 8 machines of 8, cuda: 16 GiB HBM a rank, 13.6 GiB of it for tables")
    gpu = "GPU memory: 16 GiB (dist.planner.hbm_gb), 1,899 GiB/s (the default: A100 80GB SXM)"
    assert done.stdout.splitlines()[1] == gpu
    for line in ("ues-32: 73,600,768 parameters", "adass: 25,600,000 parameters", "predicted step", "most memory"):
        assert line in done.stdout
    assert done.stdout.splitlines()[-1] == str(out / "plan.png")
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in done.stderr
    subjects = [allocation_subject("ues-32", Allocation.uniform(schema, 32)), allocation_subject("adass", allocation)]
    config = load_config(CONFIGS, None, ["dist.sharding=planner"], method="adass")
    plans = make_plans(subjects, Topology(64, 8, "cuda", PlannerConfig(hbm_gb=16.0)), config)
    expected = to_json(plans, {s.name: s.parameters for s in subjects}) | {"gpu": gpu}
    assert json.loads(figures.read_text()) == json.loads(json.dumps(expected))


def test_json_on_the_terminal_and_the_supernet(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--world-size", "4", "--device", "cpu", "--data", str(data), "--supernet", "--json", "-"]
    main([*words, "--search.candidates", "[0, 16, 64]", "--dist.tables.user", "row_wise"])
    body = json.loads(capsys.readouterr().out)
    supernet = body["allocations"]["supernet"]
    assert [(t["table"]["width"], t["kind"]) for t in supernet["tables"]][0] == (64, "row_wise")
    assert supernet["bytes"]["weights"] == 64 * 4 * sum(ROWS.values())
    assert body["topology"]["local_world_size"] == 4


def test_the_smallest_gpu_here_is_planned_for(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--world-size", "2", "--data", str(data), "--allocation", "ues-32", "--json", "-"]
    main(words)
    default = json.loads(capsys.readouterr().out)
    assert default["gpu"] == "GPU memory: 80 GiB (the default: A100 80GB SXM), 1,899 GiB/s (the default: A100 80GB SXM)"
    cards = [Card("H100", 79.2, 3120.0), Card("small", 2.0, 949.5)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(card, "read_card", cards.__getitem__)
    main(words)
    here = json.loads(capsys.readouterr().out)
    assert here["gpu"] == "GPU memory: 2 GiB (read from small), 950 GiB/s (read from small)"
    assert [b["topology"]["planner"]["hbm_gb"] for b in (default, here)] == [80, 2]
    # Half the default's bandwidth.
    assert here["allocations"]["ues-32"]["step_ms"] > 1.5 * default["allocations"]["ues-32"]["step_ms"]
    main([*words, "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["gpu"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--allocation", "ues-32", "--hbm-gb", "0.01"], "ues-32: no plan for 8 ranks .* table 'user'"),
        (["--allocation", "ues-32", "--world-size", "10"], "10 ranks cannot be spread over machines of 8"),
        (["--allocation", "ues-32", "--world-size", "some"], "--world-size some: expected a whole number"),
        (["--allocation", "ues-32", "--dist.tables.usr", "row_wise"], "names 'usr', .*did you mean 'user'"),
        (["--allocation", "nowhere.json"], "nowhere.json: no such file"),
        (["--allocations", "ues-32"], "unknown option --allocations .did you mean 'allocation'"),
        ([], "nothing to plan; give --allocation"),
    ],
)
def test_bad_options(data: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--data", str(data), *words])


def test_several_words_may_follow_an_option() -> None:
    words = ["--a", "1", "--allocation", "x", "y", "--b", "--allocation=z"]
    assert take_words(words, "--allocation") == (["--a", "1", "--b"], ["x", "y", "z"])


def test_the_fields_of_a_data_source_and_of_a_run_that_had_one(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "mine.py"
    module.write_text(
        "import numpy as np\nimport embsearch_dist as es\n\n\n"
        "@es.register_source('mine')\ndef mine():\n"
        "    rows = {'user': np.arange(10), 'label': np.arange(10) % 2}\n"
        "    return es.ArraySource(['user'], dict.fromkeys(('train', 'validation', 'test'), rows))\n"
    )
    words = ["--world-size", "2", "--allocation", "ues-4", "--json", "-"]
    main([*words, "--data.source", "mine", "--data.module", str(module)])
    assert json.loads(capsys.readouterr().out)["allocations"]["ues-4"]["parameters"] == 40
    (tmp_path / "config.yaml").write_text(
        "method: ues\ndata: {source: given}\n# edited\n"
    )  # a program's rows are not here
    Schema.load(data).save(tmp_path)
    main([*words, "--run", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["allocations"]["ues-4"]["parameters"] == 4 * sum(ROWS.values())
