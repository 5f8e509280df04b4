"""The example of docs/library.md: a backbone of one's own is searched, retrained, measured, exported and predicts."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import yaml

import embsearch_dist as es
from embsearch_dist.files import read_json
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.trial import overrides
from tests.factories import options
from tests.launch.processes import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
OWN = ["model.module=my_backbone.py", "model.backbone=weighed", "model.options.squeeze=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module of the docs in it."""
    home = tmp_path_factory.mktemp("own")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    (example,) = (b for b in blocks if "@es.register_backbone" in b)
    assert len(example.splitlines()) < 40
    (home / "my_backbone.py").write_text(example)
    return home


def words(method: str, data: Path, *more: str) -> list[str]:
    own = ["run.dir=run", f"data.path={data}", "run.device=cpu", "run.threads=1", *overrides(METHODS[method].trial)]
    return ["--method", method, *options([*own, *OWN, *more])]


@pytest.fixture(scope="module")
def empty(folder: Path) -> Path:
    (folder / "empty.yaml").write_text("{}\n")
    return folder / "empty.yaml"


@pytest.mark.slow
def test_searched_retrained_measured_exported_and_predicted(
    folder: Path, empty: Path, data: Path, run_script: Run
) -> None:
    def call(script: str, *arguments: object) -> str:
        return run_script(script, *arguments, cwd=folder).stdout

    told = call("search.py", "--config", empty, *words("adass", data, "search.budget=60%"))
    assert "found: " in told
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["model"]["options"] == {"squeeze": 3}
    call("retrain.py", "--run", "run")
    trained = folder / "run" / "retrain" / "adass"
    kept = sum(1 for w in read_json(trained / "allocation.json")["widths"].values() if w)
    figures = read_json(trained / "evaluation.json")
    assert figures["backbone"] == "weighed" and 0.4 < figures["auc"] < 1
    width = max(read_json(trained / "allocation.json")["widths"].values())
    inputs = kept * width + 1  # zeros fill up to the widest
    assert figures["dense_parameters"] == kept * 3 + 3 + 3 * kept + kept + (inputs + 1) * 8 + 8 + 1
    (folder / "moved").mkdir()
    (folder / "my_backbone.py").rename(folder / "moved" / "my_backbone.py")
    moved = ["--model.module", "moved/my_backbone.py"]
    assert "stage search: done before" in call("search.py", "--run.dir", "run", *moved)
    call("retrain.py", "--run", "run", *moved)
    assert read_json(trained / "evaluation.json")["auc"] == figures["auc"]
    (folder / "moved" / "my_backbone.py").rename(folder / "my_backbone.py")
    call("evaluate.py", "--run", trained, "--model.module", "my_backbone.py")
    assert read_json(trained / "evaluation.json")["auc"] == figures["auc"]
    out = folder / "model"
    call("export.py", "--run", trained, "--out", out, "--format", "torch", "--model.module", "my_backbone.py")
    body = read_json(out / "model.json")
    assert body["measured"]["bitwise"] and body["measured"]["torch"]["max_difference"] < 1e-5
    assert body["model"]["module"] == "my_backbone.py"

    raw = data.parent / "clicks.csv"
    arguments = ["--model", out, "--input", raw, "--out", folder / "scores.parquet", "--quiet"]
    refused = run_script("predict.py", *arguments, cwd=folder, check=False)
    assert refused.returncode == 2 and "holds no code. Give --module my_backbone.py" in refused.stderr
    call("predict.py", *arguments, "--module", "my_backbone.py", "--processes", 2)
    scores = pl.read_parquet(folder / "scores.parquet")["probability"]
    model = es.load_model(out, module=folder / "my_backbone.py")
    some = model.predict(pl.read_csv(raw, infer_schema=False).head(50))
    assert some.tolist() == pytest.approx(scores.head(50).to_list(), abs=1e-6)


def test_two_ranks_find_and_train_with_it_what_one_does(
    folder: Path, empty: Path, data: Path, tmp_path: Path, run_script: Run, on_two_ranks: Callable
) -> None:
    """By utilities, through the widest model."""
    found = []
    for ranks in (1, 2):
        more = ["search.budget=60%", f"run.dir={tmp_path / str(ranks)}", "optim.dense_lr=0.001"]
        search = ["--config", str(empty), *words("utilities", data, *more)]
        retrain = ["--run", str(tmp_path / str(ranks))]
        for script, arguments in (("search.py", search), ("retrain.py", retrain)):
            if ranks == 1:
                run_script(script, *arguments, cwd=folder)
            else:
                on_two_ranks(script, *arguments, cwd=folder)
        place = tmp_path / str(ranks) / "retrain" / "utilities"
        found.append((read_json(place / "allocation.json")["widths"], read_json(place / "evaluation.json")["logloss"]))
    assert found[1][0] == found[0][0]
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.module=nowhere.py", "model.module: nowhere.py cannot be read (No such file or directory)"),
        ("model.module=no_such.module", "model.module: no_such.module cannot be imported: no module of that name"),
        ("model.module=broken.py", "model.module: broken.py fails when it is imported (ZeroDivisionError"),
        ("model.backbone=weighd", "(did you mean 'weighed'?); my_backbone.py registers no class of that name"),
        ("model.options.squeze=3", "unknown config key 'model.options.squeze' (did you mean 'squeeze'?)"),
        ("model.precision=bfloat16", "model.precision: weighed has products in float32 alone"),
    ],
)
def test_what_cannot_be_is_one_line(
    override: str, said: str, folder: Path, empty: Path, data: Path, run_script: Run
) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    done = run_script("search.py", "--config", empty, *words("adass", data, override), cwd=folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("error: "))
    assert said in line
