"""Which group a row belongs to: base tables, gates, nearest centre (iHAS section 3.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.methods.ihas.gates_stage import GatesTask, load_gates
from embsearch_dist.methods.ihas.kmeans import KMeans
from embsearch_dist.run import Run

ROUTER = "groups/router.json"


class CentreRouter:
    """The router of the paper. It needs the search's tables and gates, at inference too.

    Attributes:
        on: what K-means sees: ``embeddings`` (masked), ``scaled`` (masked, each field divided by the root mean square
            of its embeddings), ``masks`` or ``probabilities``.
        scale: ``[F]`` those root mean squares; ones for the other kinds.
        kmeans: with its centres ``[K, C]``.
    """

    def __init__(self, task: GatesTask, on: str, kmeans: KMeans, scale: torch.Tensor | None = None) -> None:
        self.task, self.on, self.kmeans = task, on, kmeans
        fields = len(task.run.schema.fields)
        self.scale = torch.ones(fields) if scale is None else scale
        self.scale = self.scale.to(task.run.context.device)

    @torch.no_grad()
    def measure(self, batch: Batch) -> None:
        """Set ``scale`` from one batch of all ranks (kind ``scaled``)."""
        if self.on == "scaled":
            u = self.task.model.embed(batch).double()
            sums = torch.cat([u.square().mean(2).sum(0), u.new_tensor([len(u)])])
            self.task.run.context.sum(sums)
            self.scale = (sums[:-1] / sums[-1]).sqrt().clamp(min=1e-12).float()

    @torch.no_grad()
    def look(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Features for K-means and the deterministic masks, each ``[B, C]``."""
        u = self.task.model.embed(batch)
        masks = self.task.masks(u)
        if self.on == "masks":
            return masks, masks
        if self.on == "probabilities":
            return torch.sigmoid(self.task.logits(u)), masks
        if self.on == "scaled":
            u = u / self.scale[:, None]
        return u.reshape(len(u), -1) * masks, masks

    def assign(self, batch: Batch) -> torch.Tensor:
        """Group of each row, ``[B]`` int64. All ranks call it together: it looks embeddings up."""
        return self.kmeans.assign(self.look(batch)[0])

    def parameters(self) -> int:
        """Numbers that must be loaded to route: base tables, gates, centres."""
        task = self.task
        tables = task.model.width * sum(task.run.schema.cardinalities)
        gates = sum(p.numel() for p in task.model.bare_selector.parameters())
        return tables + gates + int(self.kmeans.alive.sum()) * self.kmeans.width

    def flops_per_sample(self) -> float:
        """Multiply-adds times two of the products of one row: gates and distances."""
        columns = self.kmeans.width
        gates = 0 if self.task.gates.shared else columns * columns
        return 2.0 * (gates + columns * int(self.kmeans.alive.sum()))

    def state(self) -> dict[str, Any]:
        """JSON-able, but for tables and gates, which are in the search's checkpoint."""
        return {"on": self.on, "scale": self.scale.tolist(), "kmeans": self.kmeans.state()}


def load_router(run: Run) -> CentreRouter:
    """The router of a finished search.

    Raises:
        UserError: a part of it is missing or damaged.
    """
    path = Path(run.dir) / ROUTER
    with run.context.together("reading the router"):
        body = read_sealed(path)
        try:
            on, scale, state = body["on"], torch.tensor(body["scale"], dtype=torch.float32), body["kmeans"]
            k, columns = len(state["centres"]), len(state["centres"][0])
        except (KeyError, TypeError, IndexError) as e:
            raise UserError(f"{path}: not a router of iHAS ({e!r}). Run search.py again") from e
    kmeans = KMeans(k, columns, run.context, run.config.run.seed)
    kmeans.load_state(state)
    return CentreRouter(load_gates(run), on, kmeans, scale)
