"""Tutorial 3: from a search to ONNX. Run it in an empty folder: python 03_search_to_onnx.py"""

# %% [markdown]
# # From a search to ONNX
#
# This tutorial searches widths, trains the model, exports it, and runs it with onnxruntime alone. At the end it
# holds the ONNX scores against `es.load_model(...).predict`. It needs the packages of the extra `export` (`pip
# install --no-build-isolation -e ".[export]"`), writes into the current folder and takes about a minute on two
# cores.

# %%
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl

import embsearch_dist as es

ROWS = 20_000
rng = np.random.default_rng(0)
user, item, position = rng.integers(0, 200, ROWS), rng.integers(0, 100, ROWS), rng.integers(1, 9, ROWS)
logit = rng.normal(size=200)[user] + rng.normal(size=100)[item] - 0.2 * position
clicks = pl.DataFrame(
    {
        "clicked": (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int),
        "shown_at": np.arange(ROWS),
        "user": [f"u{n}" for n in user],
        "item": [f"i{n}" for n in item],
        "device": rng.choice(["phone", "tablet", "desktop"], ROWS),
        "position": position,
    }
)
clicks.write_csv("clicks.csv")
Path("source.yaml").write_text(
    "{name: clicks, files: [clicks.csv], label: clicked, time: shown_at,"
    " fields: {user: categorical, item: categorical, device: categorical, position: dense}}"
)


def embsearch(*words: str) -> None:
    """The command `embsearch`, as a shell would start it."""
    subprocess.run([sys.executable, "-m", "launch.cli", *words], check=True)


embsearch("prepare", "--format", "table", "--input", "source.yaml", "--out", "data", "--split", "time")

# %% [markdown]
# ## Search and train

# %%
settings = {
    "data.path": "data",
    "model.hidden": [32],
    "train.batch_size": 256,
    "train.epochs": 3,
    "search.candidates": [0, 2, 4, 8],
    "search.width": 8,
    "search.budget": "10%",
}
found = es.search(run_dir="run", settings=settings, method="utilities")
(name, figures), *_ = es.retrain("run").items()
print(found.widths, f"test AUC {figures['auc']:.4f}")

# %% [markdown]
# ## Export
#
# The export makes a directory that stands alone: weights, vocabulary, the ONNX program, and a card that says
# what was measured ([Into use](../docs/serving.md)).

# %%
embsearch("export", "--run", f"run/retrain/{name}", "--out", "exported", "--format", "onnx")
model = es.load_model("exported")

# %% [markdown]
# ## Raw rows
#
# `predict` takes raw rows: texts and numbers under the names of the columns. The last tenth of the rows is the
# test split.

# %%
rows = clicks.tail(ROWS // 10)
expected = model.predict(rows)

# %% [markdown]
# ## The ONNX program
#
# The program takes ids and standardised numbers, so a service without this package turns raw values into these.
# `model.json` names the id inputs in order, `vocabulary/FIELD.parquet` has the id of each value (all others get
# id 0), and `source.json` has the mean and deviation of each dense column.

# %%
exported = Path("exported")
described = json.loads((exported / "model.json").read_text())
dense = json.loads((exported / "source.json").read_text())["dense"]


def ids_of(field: str) -> np.ndarray:
    """The ids of a column of raw values, [N] int64."""
    table = pl.read_parquet(exported / "vocabulary" / f"{field}.parquet")
    known = dict(zip(table["value"], table["id"]))
    return np.array([known.get(value, 0) for value in rows[field]], np.int64)


feeds = {
    "ids": np.stack([ids_of(field) for field in described["ids"]], axis=1),
    "dense": np.stack([(rows[name] - of["mean"]) / of["std"] for name, of in dense.items()], axis=1).astype(np.float32),
}
session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
(scores,) = session.run(["probability"], feeds)

# %% [markdown]
# Both score the same rows. They add up in another order, so the last digits may differ.

# %%
difference = np.abs(scores - expected).max()
print(f"{len(scores):,} rows, largest difference of probabilities {difference:.1e}")
assert difference < 1e-5
