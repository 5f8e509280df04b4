"""Fields of any name are trained, continued, measured and shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_sealed
from embsearch_dist.schema import Schema
from launch.common import chosen_model
from tests.factories import command_line, write_config
from tests.renamed import ODD, renamed

PLAIN = [f"f{k}" for k in range(len(ODD))]
SHORT = ["--train.epochs", "1", "--search.supernet.epochs", "1", "--search.policy.steps", "2"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A field for each odd name, 1000 rows."""
    folder, rng = tmp_path_factory.mktemp("names"), np.random.default_rng(0)
    rows = [",".join(map(str, [int(rng.random() < 0.4), *rng.integers(0, 9, len(PLAIN))])) for _ in range(1000)]
    (folder / "r.csv").write_text("\n".join([",".join(["y", *PLAIN]), *rows]) + "\n")
    fields = ", ".join(f"{n}: categorical" for n in PLAIN)
    (folder / "r.yaml").write_text(f"files: r.csv\nlabel: y\nfields: {{{fields}}}\n")
    prepare("table", folder / "r.yaml", folder / "out", quiet=True, row_group_rows=64)
    return folder / "out"


@pytest.mark.parametrize(
    "sharding", [[], pytest.param(["--dist.sharding", "planner"], marks=pytest.mark.slow)], ids=["by hand", "planner"]
)
def test_odd_names_from_search_to_report(
    plain: Path, tmp_path: Path, run_script: Callable, sharding: list[str]
) -> None:
    data = renamed(plain, tmp_path / "data", dict(zip(PLAIN, ODD, strict=True)))
    config, run = write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    told = ["--dist.tables.a.b", "row_wise", *SHORT, *sharding]
    run_script("search.py", "--config", config, *command_line(data, run), *told)
    schema = Schema.load(data)
    assert set(Allocation.load(run / "allocation.json", schema).widths) == set(ODD)
    run_script("retrain.py", "--run", run, "--allocation", "ues-4", *SHORT)
    model = run / "retrain" / "ues-4"
    before = read_json(model / "evaluation.json")
    run_script("evaluate.py", "--run", model)
    assert read_json(model / "evaluation.json")["auc"] == before["auc"]
    run_script("report.py", run)
    page = (run / "report" / "index.html").read_text()
    assert "x$y_{$" in page and "&lt;b&gt;" in page
    assert "ünï <b>" not in page


def test_a_choice_names_a_model_of_its_own_run(tmp_path: Path) -> None:
    assert chosen_model(tmp_path) == tmp_path
    write_sealed(tmp_path / "final.json", {"name": "auto-x2", "model": "retrain/auto-x2"})
    assert chosen_model(tmp_path) == tmp_path / "retrain" / "auto-x2"
    write_sealed(tmp_path / "final.json", {"name": "../../elsewhere", "model": "retrain/auto"})
    with pytest.raises(UserError, match="cannot name a folder"):
        chosen_model(tmp_path)
