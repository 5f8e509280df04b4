"""What a training step of NASRec's supernet costs: sliced, masked, and the drawn networks alone, in one run.

    python tools/bench/nasrec.py                              Full space, Criteo's shape, batch 512, one thread
    python tools/bench/nasrec.py --space small --batch 1024 --networks 40

The same random architectures (single-operator, any-connection, no warm-up) are trained three ways on random rows: as
slices of the supernet, as the published supernet does it (everything computed, zeros where nothing is chosen), and each
as a network of its own. A step is forward, backward and Adagrad of the dense part; embeddings are given, and get their
gradient. Ways take turns, so that a busy machine slows all of them; the fastest of --repeats counts for each network.
Prints a table in Markdown, and the largest difference between the logits of the three ways.
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

from embsearch_dist.methods.nasrec.model import SliceAdagrad, SlicedNetwork
from embsearch_dist.networks.canonical import canonical, prune
from embsearch_dist.networks.cost import network_cost
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.slices import Layout
from embsearch_dist.networks.space import SPACES, full
from tools.bench.clock import now
from tools.bench.masked import MaskedNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="full", choices=list(SPACES))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--columns", type=int, default=13, help="dense columns")
    parser.add_argument("--fields", type=int, default=26)
    parser.add_argument("--networks", type=int, default=30, help="architectures, drawn with --seed")
    parser.add_argument("--masked", type=int, default=3, help="of those, how many are also run masked: it takes long")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    space = SPACES[args.space]
    generator = np.random.default_rng(args.seed)
    drawn = [draw(space, SCHEMES[0], generator) for _ in range(args.networks)]
    dense = torch.randn(args.batch, args.columns)
    u = torch.randn(args.batch, args.fields, space.width).requires_grad_()
    label = (torch.rand(args.batch) < 0.25).float()

    def step(forward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
        started = now(u.device)
        optimizer.zero_grad(set_to_none=True)
        u.grad = None
        torch.nn.functional.binary_cross_entropy_with_logits(forward(), label).backward()
        optimizer.step()
        return now(u.device) - started

    sliced = SlicedNetwork(Layout(space, args.columns, args.fields))
    masked = MaskedNetwork(sliced)
    slices, whole = SliceAdagrad(sliced, 1e-4, 1e-2), torch.optim.Adagrad(sliced.parameters(), 1e-4, eps=1e-2)
    times: dict[str, list[float]] = {"sliced": [], "alone": [], "masked": []}
    worst, flops = 0.0, []
    for k, architecture in enumerate(drawn):
        blocks = prune(architecture)
        own = ArchitectureNetwork(architecture, space, args.fields, args.columns)
        with torch.no_grad():
            renumbered = sliced.copies(canonical(architecture).blocks)
            for name, w in own.weights.items():
                w.copy_(renumbered[name])
            expected = sliced(canonical(architecture).blocks, dense, u)
            worst = max(worst, float((own(u, dense) - expected).abs().max()))
            if k < args.masked:
                worst = max(worst, float((masked(blocks, dense, u) - sliced(blocks, dense, u)).abs().max()))
        adagrad = torch.optim.Adagrad(own.parameters(), 1e-4, eps=1e-2)
        best = {"sliced": np.inf, "alone": np.inf}
        for _ in range(args.repeats):
            best["sliced"] = min(best["sliced"], step(lambda b=blocks: sliced(b, dense, u), slices))  # type: ignore[misc]
            best["alone"] = min(best["alone"], step(lambda o=own: o(u, dense), adagrad))  # type: ignore[misc]
        for name, value in best.items():
            times[name].append(float(value))
        if k < args.masked:
            steps = [step(lambda b=blocks: masked(b, dense, u), whole) for _ in range(2)]  # type: ignore[misc]
            times["masked"].append(min(steps))
        flops.append(network_cost(architecture, space, args.columns, args.fields).total.flops / 2e6)
    everything = network_cost(full(space), space, args.columns, args.fields).total
    weights = sum(p.numel() for p in sliced.parameters())
    print(f"{args.space}: {weights / 1e6:.1f} M weights, {everything.flops / 2e6:.0f} M multiply-adds a row in all; ")
    print(f"drawn networks: {statistics.fmean(flops):.2f} M (median {statistics.median(flops):.2f}); largest ")
    print(
        f"difference of logits {worst:.1e}; torch {torch.__version__}, {args.threads} thread(s), batch {args.batch}\n"
    )
    print(table(times, args.batch, args.threads))


def table(times: dict[str, list[float]], batch: int, threads: int) -> str:
    """Seconds per step of each way -> rows per core-second, as means over the networks (that is what training pays)."""
    lines = ["| way | ms per step, mean | rows per core-second | against masked |", "| --- | --- | --- | --- |"]
    masked = statistics.fmean(times["masked"]) if times["masked"] else float("nan")
    for name, values in times.items():
        if values:
            mean = statistics.fmean(values)
            rate = batch / mean / threads
            lines.append(f"| {name} | {1000 * mean:.1f} | {rate:,.0f} | {masked / mean:.1f}x |")
    ratio = statistics.fmean(times["alone"]) / statistics.fmean(times["sliced"])
    return "\n".join(lines) + f"\n\nsliced runs at {ratio:.2f} of the speed of the networks alone"


if __name__ == "__main__":
    main()
