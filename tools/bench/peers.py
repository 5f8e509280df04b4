"""Search stages of OptEmbed and OptFS beside the published code, in one run: samples/s of training steps, or
with --evolution candidates/s of OptEmbed's evolution.

    git clone https://github.com/fuyuanlyu/OptEmbed PEERS/OptEmbed
    git clone https://github.com/fuyuanlyu/OptFS PEERS/OptFS
    python tools/bench/peers.py --optembed PEERS/OptEmbed --optfs PEERS/OptFS
    python tools/bench/peers.py --optembed PEERS/OptEmbed --table-rows 5000000 --embedding adam
    python tools/bench/peers.py --optembed PEERS/OptEmbed --evolution --steps 4

Nothing is downloaded. Of a folder that is named the model alone is loaded (models/modules_*.py, modules/mask.py),
as the readers beside it need TensorFlow. So both sides get the same rows in memory: Criteo's shape (39 fields, made-up
Zipf ids), DeepFM with one MLP, one width, one process, one thread, on the CPU. A step of theirs is that of their
training loop: Adam over all rows of one table, with weight decay, SGD for OptEmbed's thresholds, and OptFS's penalty
on all gates. Their BatchNorm is taken out, since our MLP has none. A step of ours is that of the trainer, tables
learning by --embedding in the backward pass, OptFS's penalty taken off every eighth step. Sides take turns, so that a
busy machine slows them alike; figures are medians with quartiles, the ratio is taken turn by turn. Weights are
random: speed only.

A candidate of the evolution is a width for each field, and both sides give its AUC and logloss on the same held-out
rows. Theirs looks all rows up anew for each, in batches, and asks scikit-learn for the metrics, as their loop does.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation too

from embsearch_dist.ranks.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch: a training does so too

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.config.read import load_config
from embsearch_dist.errors import UserError
from embsearch_dist.methods.optembed.config import OptEmbedConfig
from embsearch_dist.methods.optembed.method import Prefix, PrefixTask, measured
from embsearch_dist.methods.optembed.rows import RowThreshold
from embsearch_dist.methods.optfs.config import OptFSConfig
from embsearch_dist.methods.optfs.gates import ValueGateTask
from embsearch_dist.methods.widest import Sample
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.run import Run
from embsearch_dist.schema import Field, Schema
from embsearch_dist.train.monitor import Monitor
from tools.bench.clock import now
from tools.bench.gates import Learner, MadeRun, Parts, in_turns, ratio, spread, table
from tools.bench.steps import BATCHES, Made, cardinalities, make_rows

METHODS = {"optembed": OptEmbedConfig, "optfs": OptFSConfig}
EVOLUTION = "optembed evolution"
FOUND_IN = {
    "optembed": ("models", "models.modules_super"),
    EVOLUTION: ("models", "models.modules_evo"),
    "optfs": ("modules", "modules.mask"),
}


def make_run(args: argparse.Namespace, context: Context, method: str) -> Run:
    """Rows in memory, and the config of a search with all of the method switched on."""
    fields = tuple(Field(f"f{i}", c) for i, c in enumerate(cardinalities(args.table_rows)))
    rows = dict.fromkeys(("train", "validation"), args.batch * BATCHES)
    words = ["model.backbone=deepfm", f"model.hidden={args.hidden}", f"optim.embedding={args.embedding}"]
    words += ["model.first_order=value", "search.thresholds=true"] if method == "optembed" else []
    words += [f"search.width={args.width}", f"search.training.batch_size={args.batch}"]
    words += ["run.device=cpu", "run.threads=1", "run.dir=not-written"]
    return MadeRun(load_config(METHODS, None, words, method), Schema("benchmark", fields, (), rows), context)


def mean_of(steps: int, step: Callable[[], object]) -> Parts:
    """Mean over some steps: what is done every few steps counts with its share."""
    begun = now()
    for _ in range(steps):
        step()
    return {"whole": (now() - begun) / steps}


class Ours(Learner):
    """Steps of our search, with what the task does after each."""

    def __init__(self, method: str, args: argparse.Namespace, context: Context) -> None:
        run = make_run(args, context, method)
        if method == "optembed":
            search = run.config.search
            task: Any = PrefixTask(run, Prefix(RowThreshold(len(run.schema.fields))), {}, search.threshold_lr)
        else:
            task = ValueGateTask(run, {})
        super().__init__(task, run, args)
        self.silent = Monitor("not-written", "benchmark", rank=1)

    def turn(self) -> Parts:
        return mean_of(self.steps, self.whole_step)

    def whole_step(self) -> None:
        self.step()
        self.task.after_step(self.done, self.silent)


class OurScores:
    """Candidates of our evolution."""

    def __init__(self, args: argparse.Namespace, context: Context) -> None:
        run = make_run(args, context, "optembed")
        self.fields, self.width, self.steps, self.context = len(run.schema.fields), args.width, args.steps, context
        mask = Prefix(RowThreshold(self.fields))
        self.model = PrefixTask(run, mask, {}, run.config.search.threshold_lr).model
        self.model.eval()
        made = Made(run.schema, args.batch)
        batches = (made.batch(k) for k in range(BATCHES))
        self.sample = Sample.of(self.model, batches, context.device, BATCHES)
        self.dice = np.random.default_rng(0)

    def turn(self) -> Parts:
        return mean_of(self.steps, self.score)

    def score(self) -> object:
        """AUC and logloss of the next candidate."""
        widths = self.dice.integers(1, self.width + 1, self.fields).tolist()
        return measured(self.model, self.sample, widths, self.context)


class TheirScores:
    """Candidates of the published evolution.

    Raises:
        UserError: the folder does not hold the code.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        sizes = cardinalities(args.table_rows)
        self.fields, self.width, self.steps = len(sizes), args.width, args.steps
        offsets = np.concatenate([[0], np.cumsum(sizes[:-1])])
        self.rows = [
            (torch.from_numpy((ids.T + offsets).astype(np.int64)), label)
            for ids, label in make_rows(sizes, args.batch, 0)
        ]
        torch.manual_seed(0)
        with published(EVOLUTION, folder) as module:
            self.model = module.DeepFM_evo(settings_of(sizes, args))
        without_norm(self.model)
        self.model.eval()
        self.model.prepare_sparse_feature()

    def turn(self) -> Parts:
        return mean_of(self.steps, self.score)

    @torch.no_grad()
    def score(self) -> tuple[float, float]:
        """AUC and logloss of the next candidate."""
        from sklearn.metrics import log_loss, roc_auc_score  # theirs asks for it, ours does not

        candidate = torch.randint(low=0, high=self.width, size=(self.fields,))
        answers = [torch.sigmoid(self.model(x, candidate)).numpy() for x, _ in self.rows]
        found, label = np.concatenate(answers).astype(np.float64), np.concatenate([y for _, y in self.rows])
        return roc_auc_score(label, found), log_loss(label, found)


class Theirs:
    """Steps of the published training loop on the published model.

    Raises:
        UserError: the folder does not hold the code.
    """

    def __init__(self, method: str, folder: Path, args: argparse.Namespace) -> None:
        sizes = cardinalities(args.table_rows)
        self.method, self.steps, self.done = method, args.steps, 0
        self.rows = make_rows(sizes, args.batch, 0)
        self.offsets = np.concatenate([[0], np.cumsum(sizes[:-1])])
        torch.manual_seed(0)
        with published(method, folder) as module:
            if method == "optembed":
                self.model, self.optimizers = optembed_of(module, sizes, args)
            else:
                self.model, self.optimizers = optfs_of(module, sizes, args)
        without_norm(self.model)
        self.model.train()

    def turn(self) -> Parts:
        return mean_of(self.steps, self.step)

    def step(self) -> float:
        """One step; gives its loss, as their loops ask for it."""
        ids, label = self.rows[self.done % BATCHES]
        self.done += 1
        x, y = torch.from_numpy((ids.T + self.offsets).astype(np.int64)), torch.from_numpy(label)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.method == "optembed":
            loss = binary_cross_entropy_with_logits(self.model(x, phase="train"), y)
            loss = loss + OptEmbedConfig().alpha * (-self.model.threshold).exp().sum()
        else:
            loss = binary_cross_entropy_with_logits(self.model(x).squeeze(1), y) + 1e-8 * self.model.reg()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach())


@contextmanager
def published(method: str, folder: Path) -> Iterator[Any]:
    """Their module, imported from a folder whose packages have names that others may have too."""
    package, name = FOUND_IN[method]
    file = folder / (name.replace(".", "/") + ".py")
    if not file.exists():
        raise UserError(f"--{method} {folder}: {file} does not exist; name a checkout of the published code")
    before = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == package}
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"--{method} {folder}: {file} cannot be imported ({e})") from e
    finally:
        sys.path.remove(str(folder))
        for k in [k for k in sys.modules if k.split(".")[0] == package]:
            del sys.modules[k]
        sys.modules.update(before)


def settings_of(sizes: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """What their DeepFM of OptEmbed is told."""
    return {
        "field_dim": list(sizes), "latent_dim": args.width, "mode_supernet": "all", "mode_threshold": "field",
        "mode_oov": "zero", "norm": 1, "mlp_dims": args.hidden, "mlp_dropout": 0.0, "use_cuda": False,
    }  # fmt: skip


def optembed_of(module: Any, sizes: Sequence[int], args: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """Their DeepFM supernet with thresholds and prefixes, and their optimizers at their rates."""
    model = module.DeepFM_super(settings_of(sizes, args))
    rest = [p for name, p in model.named_parameters() if name != "threshold"]
    adam = torch.optim.Adam(rest, lr=1e-4, weight_decay=5e-5)
    return model, [torch.optim.SGD([model.threshold], lr=3e-4), adam]


def optfs_of(module: Any, sizes: Sequence[int], args: argparse.Namespace) -> tuple[nn.Module, list[Any]]:
    """Their DeepFM with a gate for each value, and their optimizers."""
    model = module.MaskDeepFM(
        {
            "latent_dim": args.width, "feat_num": sum(sizes), "field_num": len(sizes), "mask_initial": 0.5,
            "mlp_dims": args.hidden, "mlp_dropout": 0.0, "use_bn": False,
        }
    )  # fmt: skip
    return model, module.getOptim(model, "adam", 1e-3, 1e-6)


def without_norm(model: nn.Module) -> None:
    """Every BatchNorm1d becomes nothing."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d):
                setattr(parent, name, nn.Identity())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optembed", type=Path, help="folder of the published code of OptEmbed")
    parser.add_argument("--optfs", type=Path, help="folder of the published code of OptFS")
    parser.add_argument("--table-rows", type=int, default=1_100_000, help="rows of all tables of a model together")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a training step")
    parser.add_argument("--width", type=int, default=16, help="embedding width")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 512, 256], help="MLP")
    parser.add_argument("--embedding", default="rowwise_adagrad", help="how our tables learn: optim.embedding")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side at most; 2 or more")
    parser.add_argument("--steps", type=int, default=8, help="training steps, or candidates, of a turn")
    parser.add_argument("--evolution", action="store_true", help="candidates of OptEmbed's evolution instead of steps")
    parser.add_argument("--seconds", type=float, default=120, help="after which no further round begins")
    parser.set_defaults(every=1)  # of a Learner: there is no outer step
    args = parser.parse_args(argv)
    peers = {m: folder for m in METHODS if (folder := getattr(args, m)) is not None}
    try:
        if not peers:
            raise UserError("name the folder of the published code: --optembed FOLDER, --optfs FOLDER or both")
        if args.evolution and list(peers) != ["optembed"]:
            raise UserError("--evolution is OptEmbed's: name --optembed FOLDER alone")
        compare(peers, args)
    except UserError as e:
        sys.exit(f"error: {e}")


def compare(peers: dict[str, Path], args: argparse.Namespace) -> None:
    """Print a line for each side."""
    theirs: dict[str, Theirs | TheirScores] = {
        method: TheirScores(folder, args) if args.evolution else Theirs(method, folder, args)
        for method, folder in peers.items()
    }
    first = load_config(METHODS, None, ["run.device=cpu", "run.threads=1", "run.dir=not-written"], "optfs")
    with start(first.run, first.dist) as context:
        sides: dict[str, Ours | Theirs | OurScores | TheirScores] = {}
        for method, side in theirs.items():
            sides[f"{method}, ours"] = OurScores(args, context) if args.evolution else Ours(method, args, context)
            sides[f"{method}, published"] = side
        found = in_turns({name: side.turn for name, side in sides.items()}, args.rounds, args.seconds)
    turns = len(next(iter(found.values())))
    print(f"\nDeepFM, MLP {'-'.join(map(str, args.hidden))}, width {args.width}, {args.table_rows:,} rows of tables,")
    if args.evolution:
        what, unit, each, form = f"{args.batch * BATCHES:,} held-out rows", "candidate", 1, ",.2f"
    else:
        what, unit, each, form = f"batch {args.batch}, our tables learn by {args.embedding}", "step", args.batch, ",.0f"
    print(f"{what}; {turns} turns of {args.steps} {unit}s; torch {torch.__version__}, one thread\n")
    lines = []
    for name, own in found.items():
        rate = spread([each / t["whole"] for t in own], form)
        against = found[f"{name.split(',')[0]}, published"]
        lines.append([name, rate, ratio(against, own), spread([1000 * t["whole"] for t in own], ".1f")])
    rated = "candidates/s" if args.evolution else "samples/s"
    table(["search stage", rated, "of the published code", f"ms a {unit}"], lines)


if __name__ == "__main__":
    main()
