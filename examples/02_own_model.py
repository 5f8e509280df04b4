"""Tutorial 2: found widths in your own model. Run it in an empty folder: python 02_own_model.py"""

# %% [markdown]
# # Your own model
#
# You have a model and a training loop, and want only the widths. This tutorial searches widths under a budget,
# builds the embedding tables from the result, and trains a model of our own in a plain PyTorch loop. It writes
# into the current folder and takes about a minute on two cores.
#
# The data are made up, as in tutorial 1: `user` and `item` decide, each alone and as a pair; `device` and
# `hour` do nothing.

# %%
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingBagCollection

import embsearch_dist as es

ROWS = 40_000
rng = np.random.default_rng(0)
user, item = rng.integers(0, 200, ROWS), rng.integers(0, 100, ROWS)
taste, kind = rng.normal(size=(200, 2)), rng.normal(size=(100, 2))
logit = -1.5 + 0.7 * taste[user, 0] + 0.7 * kind[item, 0] + 0.5 * (taste[user] * kind[item]).sum(axis=1)

pl.DataFrame(
    {
        "clicked": (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int),
        "user": user,
        "item": item,
        "device": rng.choice(["phone", "tablet", "desktop"], ROWS),
        "hour": rng.integers(0, 24, ROWS),
        "position": rng.integers(1, 9, ROWS),
    }
).write_csv("clicks.csv")
Path("source.yaml").write_text(
    "{name: clicks, files: [clicks.csv], label: clicked, fields: {user: categorical, item: categorical,"
    " device: categorical, hour: categorical, position: dense}}"
)
words = ["--format", "table", "--input", "source.yaml", "--out", "data"]
subprocess.run([sys.executable, "-m", "launch.cli", "prepare", *words], check=True)
data = es.open_data("data")

# %% [markdown]
# ## Search
#
# `method: utilities` trains one wide model, measures what each field loses at each width, and spends the budget
# by that ([Width utilities](../docs/utilities.md)). The budget is a quarter of what width 32 for every field
# would take.

# %%
settings = {
    "data.path": "data",
    "model.unified_width": 16,
    "train.batch_size": 256,
    "train.epochs": 5,
    "search.candidates": [0, 2, 4, 8, 16],
    "search.width": 16,
    "search.budget": "25%",
}
es.search(run_dir="run", settings=settings, method="utilities")
found = es.Allocation.load("run/allocation.json")
print({name: width for name, width in found.widths.items() if width})

# %% [markdown]
# `run/allocation.json` is all that your program needs: it names the fields, their numbers of values and their
# widths. From it come TorchRec's configs, one for each kept field, ready for an `EmbeddingBagCollection` or for
# sharding:

# %%
collection = EmbeddingBagCollection(tables=found.embedding_bag_configs())
print(collection)

# %% [markdown]
# ## A model of your own
#
# `to_torch()` gives plain `nn.EmbeddingBag` modules by field. Tables of different widths do not add up, so this
# model brings each to a common width with a linear layer, and feeds products of pairs (as an FM does) and the
# embeddings to an MLP.


# %%
class MyModel(nn.Module):
    """Pair products and an MLP over tables of any widths."""

    def __init__(self, allocation: es.Allocation, common: int = 8) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(allocation.to_torch())
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.05)
        self.to_common = nn.ModuleDict({n: nn.Linear(t.embedding_dim, common) for n, t in self.tables.items()})
        inputs = common * (len(self.tables) + 1) + len(allocation.schema.dense)
        self.mlp = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, batch) -> torch.Tensor:
        parts = []
        for name, table in self.tables.items():
            ids = batch.sparse[name]  # one jagged tensor a field: values, and where each row begins
            parts.append(self.to_common[name](table(ids.values(), ids.offsets()[:-1])))
        stacked = torch.stack(parts)
        pairs = (stacked.sum(0) ** 2 - (stacked**2).sum(0)) / 2
        return self.mlp(torch.cat([*parts, pairs, batch.dense], dim=1)).squeeze(1)


# %% [markdown]
# ## Your own training loop
#
# `data.batches` gives what the entry scripts train on: ids by field, dense columns, labels.


# %%
def train(allocation: es.Allocation, epochs: int = 5) -> float:
    """Train MyModel with an allocation; its AUC on the test split."""
    torch.manual_seed(0)
    model = MyModel(allocation)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for epoch in range(epochs):
        for batch in data.batches("train", batch_size=256, shuffle=True, seed=epoch):
            loss = nn.functional.binary_cross_entropy_with_logits(model(batch), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        parts = [(model(batch), batch.label) for batch in data.batches("test")]
    logits, labels = (torch.cat(column) for column in zip(*parts))
    return float(binary_auroc(logits, labels.int()))


allocations = {"found": found} | {f"ues-{width}": es.Allocation.uniform(data.schema, width) for width in (8, 16)}
for name, allocation in allocations.items():
    print(f"{name}: {allocation.total('parameters'):,} parameters, test AUC {train(allocation):.4f}")
