"""Check 2: look-up and fused optimizers against plain torch, in float64 and by the formulas of the papers.

One table per width, lists of every length with repeated ids, half of the batches weighted. The rows that a step does
not look up must not move at all, under any optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torchrec import KeyedJaggedTensor

from embsearch_dist.ranks.context import Context
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.tables import Table
from tools.gpucheck.lab import Lab

WIDTHS = (4, 8, 16, 64, 128, 256, 512, 1024)
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
ROWS, BATCH, STEPS, LR = 60, 24, 3, 0.05
TOLERANCE = 1e-5
BETA1, BETA2 = 0.9, 0.999
Bags = list[tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class Reference:
    """One table in float64 with its optimizer's state; only rows with a gradient are touched.

    ``w -= lr * g`` (SGD); Adagrad (Duchi et al. 2011) with one sum per number or, row-wise, the mean over a row;
    Adam (Kingma & Ba 2015), whose step count is that of the table.
    """

    optimizer: str
    weight: torch.Tensor
    eps: float = 1e-8
    step: int = 0
    state: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = [torch.zeros_like(self.weight) for _ in range(2)]

    def look_up(self, bags: Bags, mean: bool) -> torch.Tensor:
        """Pooled rows ``[B, width]``; zeros for an empty bag."""
        rows = []
        for ids, weights in bags:
            taken = self.weight[ids] * (1.0 if weights is None else weights.double()[:, None])
            rows.append(taken.sum(0) / (max(1, len(ids)) if mean else 1))
        return torch.stack(rows)

    def update(self, bags: Bags, mean: bool, gradient: torch.Tensor) -> None:
        """One step with the gradient ``[B, width]`` of the pooled rows."""
        g, seen = torch.zeros_like(self.weight), torch.zeros(len(self.weight), dtype=torch.bool)
        for k, (ids, weights) in enumerate(bags):
            part = gradient[k].expand(len(ids), -1) / (max(1, len(ids)) if mean else 1)
            g.index_add_(0, ids, part * (1.0 if weights is None else weights.double()[:, None]))
            seen[ids] = True
        self.step += 1
        first, second = self.state
        g = g[seen]
        if self.optimizer == "sgd":
            change = g
        elif self.optimizer == "adam":
            first[seen] = BETA1 * first[seen] + (1 - BETA1) * g
            second[seen] = BETA2 * second[seen] + (1 - BETA2) * g.square()
            size = (second[seen] / (1 - BETA2**self.step)).sqrt() + self.eps
            change = first[seen] / (1 - BETA1**self.step) / size
        else:
            square = g.square()
            first[seen] += square.mean(1, keepdim=True) if self.optimizer == "rowwise_adagrad" else square
            change = g / (first[seen].sqrt() + self.eps)
        self.weight[seen] -= LR * change


def draw_bags(generator: torch.Generator, weighted: bool) -> Bags:
    """One list of 0 to 5 ids a row, small ids often and the last ten never."""
    bags: Bags = []
    for length in torch.randint(0, 6, (BATCH,), generator=generator).tolist():
        ids = (torch.rand(length, generator=generator).square() * (ROWS - 10)).long()
        bags.append((ids, torch.rand(length, generator=generator) + 0.5 if weighted else None))
    return bags


def jagged(bags: Sequence[Bags], names: Sequence[str]) -> KeyedJaggedTensor:
    """The lists of all tables as TorchRec wants them."""
    every = [b for table in bags for b in table]
    weights = [w for _, w in every if w is not None]
    return KeyedJaggedTensor(
        list(names),
        torch.cat([ids for ids, _ in every]).int(),
        torch.cat(weights) if weights else None,
        lengths=torch.tensor([len(ids) for ids, _ in every], dtype=torch.int32),
    )


def compare(lab: Lab, context: Context, optimizer: str, weighted: bool) -> float:
    """Train tables of all widths for some steps; the largest difference of anything from the reference."""
    generator = torch.Generator().manual_seed(OPTIMIZERS.index(optimizer) * 2 + weighted)
    tables = [
        Table(f"w{w}", ROWS, w, mean=not weighted and k % 2 == 1, weighted=weighted) for k, w in enumerate(WIDTHS)
    ]
    config = lab.config(f"optim.embedding={optimizer}", f"optim.embedding_lr={LR}")
    ours = ShardedTables(tables, context, config.dist, config.optim, 0, 0.1)
    names = [t.name for t in tables]
    live = {s.table.name: s.tensor for s in ours.local_shards()}
    theirs = {n: Reference(optimizer, live[n].detach().cpu().double()) for n in names}
    worst = 0.0
    for _ in range(STEPS):
        bags = [draw_bags(generator, weighted) for _ in tables]
        pooled = ours(jagged(bags, names).to(lab.device)).to_dict()
        ours.zero_grad()
        gradients = [torch.randn(BATCH, t.width, generator=generator) for t in tables]
        for t, own in zip(tables, bags, strict=True):
            worst = max(worst, apart(pooled[t.name], theirs[t.name].look_up(own, t.mean)))
        sum((pooled[n] * g.to(lab.device)).sum() for n, g in zip(names, gradients, strict=True)).backward()  # type: ignore[union-attr]
        ours.step()
        for t, own, g in zip(tables, bags, gradients, strict=True):
            theirs[t.name].update(own, t.mean, g.double())
            worst = max(worst, apart(live[t.name], theirs[t.name].weight))
    return worst


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, against the largest number if that is above 1."""
    scale = max(1.0, float(wanted.abs().max()))
    return float((found.detach().cpu().double() - wanted).abs().max()) / scale


def against_torch(lab: Lab) -> None:
    """All optimizers, with and without weights."""
    with lab.opened() as context:
        worst: dict[str, float] = {}
        for optimizer in OPTIMIZERS:
            worst[optimizer] = max(compare(lab, context, optimizer, weighted) for weighted in (False, True))
            lab.note(**{optimizer: worst[optimizer]})
        bad = [f"{name} {value:.2g}" for name, value in worst.items() if not value <= TOLERANCE]
        lab.expect(not bad, f"further than {TOLERANCE:g} from plain torch: {', '.join(bad)}")
