"""How long a network takes, from a table that is measured once and kept with the search.

Timing every candidate would make a search depend on what else the machine does, and a continued one on another day.
So some random networks of the space are timed, and a candidate's time is predicted from what each of its operators
costs: a time for each use and a time for each FLOP, fitted with weights that cannot be negative (ProxylessNAS, Cai et
al. 2019, adds up operators in the same way). The table lies in ``latency.json``; a search goes on with the one it began
with, so it ends as the unbroken one. Two searches measure two tables and may differ.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.models.model import seeded
from embsearch_dist.networks.architecture import DENSE_OPERATORS, SPARSE_OPERATORS, Architecture
from embsearch_dist.networks.cost import network_cost, operator_costs
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import Space
from embsearch_dist.run import Run

FILE = "latency.json"
ROWS = 512  # of the forward pass that is timed
NETWORKS, HELD_BACK = 80, 20  # timed, and of these not fitted but predicted, to say how far predictions are off
WARM, PASSES = 2, 9
PARTS = (*DENSE_OPERATORS, *SPARSE_OPERATORS, "dense_to_sparse", "fm")
_STREAM = 0x4C4154


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a forward pass of ``rows`` rows.

    Attributes:
        of: what it was measured for: space, columns and fields of the data, LayerNorms.
        where: device and threads, for people.
        rows: of the pass.
        base: ms of a network without any operator.
        use: operator or merger -> ms of each use.
        mflop: operator or merger, or ``head`` -> ms of each million FLOPs of the pass.
        error: median relative error on networks that were not fitted.
    """

    of: dict[str, Any]
    where: str
    rows: int
    base: float
    use: dict[str, float]
    mflop: dict[str, float]
    error: float

    def predict(self, architecture: Architecture, space: Space, columns: int, fields: int) -> float:
        """ms of a network on data of so many dense columns and fields."""
        weights = [self.base, *(self.use[p] for p in PARTS), *(self.mflop[p] for p in (*PARTS, "head"))]
        return float(_features(architecture, space, columns, fields, self.rows) @ np.array(weights))


def table_of(run: Run, space: Space, begun: bool) -> LatencyTable:
    """The run's table, on all ranks: the one that is there, or a new one that rank 0 measures.

    Args:
        begun: candidates have been scored by it, so it may not change any more.

    Raises:
        UserError: ``begun``, and it is gone or of something else.
    """
    context, path = run.context, run.dir / FILE
    columns, fields = len(run.schema.dense), len(run.schema.fields)
    layer_norm = run.config.model.layer_norm
    of = {"space": space.to_json(), "columns": columns, "fields": fields, "layer_norm": layer_norm}

    def make() -> dict[str, Any]:
        found = _read(path)
        if found is not None and found.of == of and (begun or found.where == where(context.device)):
            return asdict(found)
        if begun:
            raise UserError(
                f"{path} is gone, or of another space or data: the candidates so far were judged by it. Put it back, "
                "or delete evolution.json to search anew"
            )
        table = measure(space, columns, fields, context.device, layer_norm, run.config.run.seed)
        write_sealed(path, asdict(table))
        return asdict(table)

    body = context.share(context.first("measuring latencies", make))
    assert body is not None
    return LatencyTable(**body)


def measure(
    space: Space, columns: int, fields: int, device: torch.device, layer_norm: str = "all", seed: int = 0
) -> LatencyTable:
    """Time random networks of a space on a device and fit the table to them."""
    generator = np.random.default_rng([_STREAM, seed])
    architectures = [draw(space, SCHEMES[0], generator, "uniform") for _ in range(NETWORKS)]
    with seeded(seed):
        dense, u = torch.randn(ROWS, columns), torch.randn(ROWS, fields, space.width)
        networks = [ArchitectureNetwork(a, space, fields, columns, layer_norm) for a in architectures]
    dense, u = dense.to(device), u.to(device)
    times = np.array([milliseconds(n.to(device), u, dense) for n in networks])
    features = np.stack([_features(a, space, columns, fields, ROWS) for a in architectures])
    found = fit(features[:-HELD_BACK], times[:-HELD_BACK])
    error = np.abs(features[-HELD_BACK:] @ found / times[-HELD_BACK:] - 1)
    use, mflop = found[1 : len(PARTS) + 1], found[len(PARTS) + 1 :]
    return LatencyTable(
        of={"space": space.to_json(), "columns": columns, "fields": fields, "layer_norm": layer_norm},
        where=where(device),
        rows=ROWS,
        base=float(found[0]),
        use={p: float(x) for p, x in zip(PARTS, use, strict=True)},
        mflop={p: float(x) for p, x in zip((*PARTS, "head"), mflop, strict=True)},
        error=float(np.median(error)),
    )


def fit(features: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Weights ``[K]``, none below 0, with the least squared relative error of ``features [N, K]`` on ``times [N]``."""
    from scipy.optimize import nnls  # half a second to load, which only a search that minds latency needs

    return np.asarray(nnls(features / times[:, None], np.ones(len(times)))[0])


@torch.no_grad()
def milliseconds(network: torch.nn.Module, u: torch.Tensor, dense: torch.Tensor) -> float:
    """Median of some forward passes, after two that do not count."""
    found = []
    for number in range(WARM + PASSES):
        if u.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        network(u, dense)
        if u.is_cuda:
            torch.cuda.synchronize()
        if number >= WARM:
            found.append(1000 * (time.perf_counter() - started))
    return statistics.median(found)


def where(device: torch.device) -> str:
    """The device, as far as times depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} thread(s)"


def processor(told: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model as Linux tells it in the file ``told``; its architecture alone where nothing does."""
    try:
        lines = told.read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()} CPU"


def _features(architecture: Architecture, space: Space, columns: int, fields: int, rows: int) -> np.ndarray:
    """``[2 |PARTS| + 2]``: one, uses of each part, million FLOPs of each part and of the head."""
    uses, mflops = dict.fromkeys(PARTS, 0.0), dict.fromkeys((*PARTS, "head"), 0.0)
    for block in operator_costs(architecture, space, columns, fields):
        for name, cost in block.items():
            uses[name] += 1
            mflops[name] += rows * cost.flops / 1e6
    mflops["head"] = rows * network_cost(architecture, space, columns, fields).head.flops / 1e6
    return np.array([1.0, *uses.values(), *mflops.values()])


def _read(path: Path) -> LatencyTable | None:
    try:
        if not path.exists():
            return None
        return LatencyTable(**read_sealed(path))
    except TypeError:
        return None  # of another version
