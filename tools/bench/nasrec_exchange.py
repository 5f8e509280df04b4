"""What exchanging the gradients of NASRec's supernet costs: slices beside DistributedDataParallel, in one run.

    torchrun --standalone --nproc-per-node 2 tools/bench/nasrec_exchange.py             Full space, Criteo's shape
    torchrun --standalone --nproc-per-node 2 tools/bench/nasrec_exchange.py --space small --steps 20

Three ways to train the same drawn networks on several ranks, each with forward, backward, exchange and Adagrad; they
take turns, so that a busy machine slows all of them:

- one network a step on all ranks, the gradients of its slices averaged (sampling.same_network true);
- a network for each rank, the union of their slices averaged (same_network false);
- DDP around the whole weights, as one would write it first: slices are views, and what a step does not use is found by
  find_unused_parameters. DDP exchanges every weight in every step, zeros for what was not used, and Adagrad reads all.

Prints a table in Markdown: ms per step (median over networks) and megabytes of gradients that a rank gives into it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation too

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from embsearch_dist.methods.nasrec.model import Blocks, SliceAdagrad, SlicedNetwork
from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.network import features, head
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.slices import Layout, slices_of
from embsearch_dist.networks.space import SPACES
from embsearch_dist.ranks.context import Context
from tools.bench.clock import now


class Whole(nn.Module):
    """The supernet for DDP: every weight a parameter, a network's slices cut out under autograd."""

    def __init__(self, network: SlicedNetwork) -> None:
        super().__init__()
        self.weights, self.layout = network.weights, network.layout

    def forward(self, blocks: Blocks, dense: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        taken = {n: s.take(self.weights[n]) for n, s in slices_of(blocks, self.layout).items()}
        return head(taken, *features(blocks, taken, dense, u.transpose(1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="full", choices=list(SPACES))
    parser.add_argument("--batch", type=int, default=512, help="rows of a step over all ranks")
    parser.add_argument("--columns", type=int, default=13, help="dense columns")
    parser.add_argument("--fields", type=int, default=26)
    parser.add_argument("--steps", type=int, default=12, help="networks, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    context = Context(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    space, generator = SPACES[args.space], np.random.default_rng(args.seed)
    network = SlicedNetwork(Layout(space, args.columns, args.fields))
    wrapped = DistributedDataParallel(Whole(network), find_unused_parameters=True, gradient_as_bucket_view=True)
    slices, whole = SliceAdagrad(network, 1e-4, 1e-2), torch.optim.Adagrad(network.parameters(), 1e-4, eps=1e-2)
    rows = args.batch // context.world_size
    dense, u = torch.randn(rows, args.columns), torch.randn(rows, args.fields, space.width)
    label = (torch.rand(rows) < 0.25).float()

    def step(
        forward: Callable[[], torch.Tensor], exchange: Callable[[], object], optimizer: torch.optim.Optimizer
    ) -> float:
        dist.barrier()
        started = now(u.device)
        binary_cross_entropy_with_logits(forward(), label).backward()
        exchange()
        optimizer.step()
        return now(u.device) - started

    times: dict[str, list[float]] = {
        "one network, its slices": [],
        "each its own, the union": [],
        "DDP of all weights": [],
    }
    sizes: dict[str, list[float]] = {name: [] for name in times}
    one, own, all_of = times
    for _ in range(args.steps):
        drawn = [prune(draw(space, SCHEMES[0], generator)) for _ in range(context.world_size)]
        first, mine = drawn[0], drawn[context.rank]
        ways: dict[str, tuple[Blocks, list[Blocks] | None]] = {one: (first, None), own: (mine, drawn)}
        for name, (blocks, others) in ways.items():
            found: list[int] = []

            def exchange(others: list[Blocks] | None = others, found: list[int] = found) -> None:
                found.append(sum(w.numel() for w in network.average(context, others)))

            times[name].append(step(lambda b=blocks: network(b, dense, u), exchange, slices))  # type: ignore[misc]
            sizes[name].append(4e-6 * found[0])
        whole.zero_grad(set_to_none=True)
        times[all_of].append(step(lambda b=first: wrapped(b, dense, u), lambda: None, whole))  # type: ignore[misc]
        sizes[all_of].append(4e-6 * sum(w.numel() for w in network.parameters()))
        whole.zero_grad(set_to_none=True)
    if context.rank == 0:
        print(table(times, sizes, context.world_size, args.batch))
    dist.destroy_process_group()


def table(times: dict[str, list[float]], sizes: dict[str, list[float]], ranks: int, batch: int) -> str:
    lines = [
        f"| {ranks} ranks, {batch} rows a step | ms per step | MB exchanged | against one network |",
        "| --- " * 4 + "|",
    ]
    least = statistics.median(next(iter(times.values())))
    for name, values in times.items():
        ms, size = statistics.median(values), statistics.fmean(sizes[name])
        lines.append(f"| {name} | {1000 * ms:.0f} | {size:.1f} | {ms / least:.1f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
