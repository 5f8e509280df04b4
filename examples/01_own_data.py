"""Tutorial 1: widths for your own data. Run it in an empty folder: python 01_own_data.py"""

# %% [markdown]
# # Your own data
#
# This tutorial takes a CSV file of clicks, searches the embedding widths of its columns, trains the model with
# the found widths and with a uniform width, and compares the two. Replace `clicks.csv` and `source.yaml` by
# your own files to do the same with your data. It writes into the current folder and takes about a minute on
# two cores.
#
# The script makes its file first, so that we know what there is to find: `user` and `item` decide about the
# click, each alone and as a pair, while `device` and `price` do nothing.

# %%
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl

import embsearch_dist as es

ROWS = 40_000
rng = np.random.default_rng(0)
user, item = rng.integers(0, 200, ROWS), rng.integers(0, 100, ROWS)
taste, kind = rng.normal(size=(200, 2)), rng.normal(size=(100, 2))
logit = -1.5 + 0.7 * taste[user, 0] + 0.7 * kind[item, 0] + 0.5 * (taste[user] * kind[item]).sum(axis=1)

pl.DataFrame(
    {
        "clicked": (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int),
        "shown_at": np.arange(ROWS),
        "user": [f"u{n}" for n in user],
        "item": [f"i{n}" for n in item],
        "device": rng.choice(["phone", "tablet", "desktop"], ROWS),
        "price": rng.gamma(2.0, 10.0, ROWS).round(2),
        "position": rng.integers(1, 9, ROWS),
    }
).write_csv("clicks.csv")

# %% [markdown]
# ## Say what the columns are
#
# A source file names the label, the time and the fields. `categorical` fields get an embedding table,
# `bucketed` numbers become categories, and `dense` numbers stay numbers. [What your file may look
# like](../docs/your_data.md) has all forms.

# %%
Path("source.yaml").write_text(
    """
name: my_clicks
files: [clicks.csv]
label: clicked
time: shown_at
fields: {user: categorical, item: categorical, device: categorical, price: bucketed, position: dense}
"""
)

# %% [markdown]
# ## Prepare
#
# Preparing counts the values, gives each an id, and splits the rows by time: the first 80% train, the next 10%
# validate, and the last 10% test. In a shell this is `embsearch prepare --format table --input source.yaml
# --out data --split time --min-count 3`.

# %%
embsearch = [sys.executable, "-m", "launch.cli"]
words = ["--format", "table", "--input", "source.yaml", "--out", "data", "--split", "time", "--min-count", "3"]
subprocess.run([*embsearch, "prepare", *words], check=True)

data = es.open_data("data")
for field in data.schema.fields:
    print(f"{field.name}: {field.cardinality} values")

# %% [markdown]
# ## Search
#
# AdaS&S trains one supernet that holds every candidate width, and then searches it. The result never has more
# than half of the parameters that width 32 for every field would have. Settings are the keys of a config file
# ([Configuration](../docs/config.md)).

# %%
settings = {
    "data.path": "data",
    "model.backbone": "deepfm",
    "model.hidden": [64, 32],
    "train.batch_size": 256,
    "train.epochs": 6,
    "search.candidates": [0, 2, 4, 8, 16, 32],
    "search.sampling.warmup": 0.5,
    "search.supernet.batch_size": 256,
    "search.supernet.epochs": 6,
    "search.supernet.patience": 0,
    "search.policy.resource": "parameters",
    "search.policy.reward_weight": 50,
    "search.budget": "50%",
}
found = es.search(run_dir="run", settings=settings, method="adass")
print(found.widths)

# %% [markdown]
# ## Train, and compare
#
# A found allocation has to beat the uniform widths, so train one of these, too. A difference on one seed may be
# luck: repeat with `"run.seed": 1` before you believe it.

# %%
figures = es.retrain("run") | es.retrain("run", "ues-16")
for name, of in figures.items():
    print(f"{name}: {of['embedding_parameters']:,} parameters, test AUC {of['auc']:.4f}, logloss {of['logloss']:.4f}")

# %% [markdown]
# `run/` holds all that was made. The report is one HTML page: `embsearch report run` in a shell.

# %%
subprocess.run([*embsearch, "report", "run"], check=True)
