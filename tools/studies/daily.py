"""Day after day on MovieLens-1M by time: training that goes on from yesterday's model, against training anew.

    python tools/studies/daily.py --ratings RAW/ratings.dat --movielens RAW/ml-1m --out runs/daily --days 5 --seeds 3

The ratings in order of time are cut into an initial period (``--first``, a share) and days of equal numbers of rows. On
each day but the last these models are trained, and measured on all rows of the NEXT day, of which none was trained on:

    stale        the model of the initial period, never trained again
    warm         yesterday's warm model, trained on today's rows alone, for the steps of ``--epochs`` epochs of them
    warm-state   the same, and the state of the optimizers is taken along
    warm-replay  as warm, in the same steps, with ``--replay`` earlier rows drawn for each of today's
    cold         fresh weights, for as many steps, on all rows so far
    cold-full    fresh weights, all rows so far, for as many epochs as the initial model needed to be best on day 1

Data of warm models keep yesterday's ids (prepare.py --vocabulary); those of cold ones are prepared anew. Rows to
measure on are prepared with a frozen vocabulary. OUT gets daily.csv, daily.md and daily.png; what is there is not done
again. More seeds and other arms may follow in it, other settings need another OUT.
"""

from __future__ import annotations

import argparse
import gzip
import math
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_json
from embsearch_dist.methods import CONFIGS
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.run import Run, open_data
from embsearch_dist.schema import SPLITS
from embsearch_dist.train.directories import open_retraining
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.retrain import load_best, retrain
from embsearch_dist.train.warm.start import Start
from tools.studies.asked import keep_to
from tools.studies.daily_tables import write_tables
from tools.studies.jobs import ROOT, commit

ARMS = ("stale", "warm", "warm-state", "warm-replay", "cold", "cold-full")
CONFIG = ROOT / "configs" / "movielens_1m" / "ues_deepfm.yaml"


def read_lines(path: Path) -> list[bytes]:
    """Ratings in order of time; equal times keep their order.

    Raises:
        UserError: the file is missing or has a line without a time.
    """
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
        lines = text.splitlines()
        times = np.array([int(line.rsplit(b"::", 1)[1]) for line in lines])
    except OSError as e:
        raise UserError(f"--ratings {path}: cannot be read ({e.strerror or e})") from e
    except (IndexError, ValueError) as e:
        raise UserError(f"--ratings {path}: a line has no time behind its last '::' ({e})") from e
    return [lines[i] for i in np.argsort(times, kind="stable")]


def cut(lines: list[bytes], first: float, days: int) -> list[list[bytes]]:
    """The initial period and the days after it."""
    begin = round(len(lines) * first)
    ends = [begin + round((len(lines) - begin) * k / days) for k in range(days + 1)]
    return [lines[:begin], *(lines[a:b] for a, b in zip(ends, ends[1:], strict=False))]


@dataclass
class Study:
    """The periods, and where everything lies.

    Attributes:
        parts: lines of the initial period and of each day.
    """

    args: argparse.Namespace
    parts: list[list[bytes]]
    context: Context

    def data(self, name: str, lines: list[bytes], vocabulary: Path | None = None, new: str = "extend") -> Path:
        """Prepared data of some rows; made once. Notes the seconds it took."""
        out = self.args.out / "data" / name
        if not (out / "schema.json").exists():
            raw = self.args.out / "raw" / name
            raw.mkdir(parents=True, exist_ok=True)
            for file in ("users.dat", "movies.dat"):
                shutil.copy(self.args.movielens / file, raw / file)
            (raw / "ratings.dat").write_bytes(b"\n".join(lines) + b"\n")
            begun = time.monotonic()
            prepare("movielens_1m", raw, out, quiet=True, vocabulary=vocabulary, vocabulary_new=new)
            write_json(self.args.out / "seconds" / f"{name}.json", {"seconds": time.monotonic() - begun})
            shutil.rmtree(raw)
        return out

    def day(self, k: int) -> Path:
        """Rows of day k (0: the initial period), with the ids of all days before."""
        return self.data(f"day-{k}", self.parts[k], self.day(k - 1) if k else None)

    def replayed(self, k: int) -> Path:
        """Rows of day k and a draw of earlier ones; ids as in :meth:`day`."""
        earlier = [line for part in self.parts[:k] for line in part]
        count = min(len(earlier), round(self.args.replay * len(self.parts[k])))
        drawn = np.random.default_rng(k).choice(len(earlier), count, replace=False)
        return self.data(f"replay-{k}", [*self.parts[k], *(earlier[i] for i in sorted(drawn))], self.day(k), "freeze")

    def so_far(self, k: int) -> Path:
        """All rows up to day k, prepared anew."""
        return self.data(f"all-{k}", [line for part in self.parts[: k + 1] for line in part]) if k else self.day(0)

    def next_day(self, k: int, data: Path) -> Path:
        """All rows of day k + 1 as a model of ``data`` sees them."""
        return self.data(f"after-{k}-of-{data.name}", self.parts[k + 1], data, "freeze")

    def config(self, data: Path, directory: Path, seed: int, *more: str) -> Config:
        words = [f"data.path={data}", f"run.dir={directory}", f"run.seed={seed}", "run.device=cpu", "run.threads=1"]
        training = ["train.patience=0", "train.lr_cut=1", "train.log_every=100000"]
        return load_config(CONFIGS, self.args.config, [*words, *training, *self.args.set, *more])

    def stream(self, run: Run, batch: int, shuffle: bool) -> BatchStream:
        """All rows of a data set: the splits of prepare.py do not matter here."""
        whole = run.stream(SPLITS[0], batch, shuffle)
        for split in SPLITS[1:]:
            whole.extend(run.stream(split, batch, shuffle))
        return whole

    def open(self, config: Config) -> Run:
        return Run(config, open_data(config, self.context), self.context)

    def batches(self, data: Path) -> int:
        """Steps of an epoch."""
        run = self.open(self.config(data, self.args.out, 0))
        return self.stream(run, run.config.train.batch_size, shuffle=True).batches_per_epoch

    def train(
        self, name: str, data: Path, seed: int, steps: int, begin: Start | None = None, judged: Path | None = None
    ) -> Path:
        """Train for so many steps, or until the evaluations on ``judged`` have had a best one; its directory."""
        directory = self.args.out / f"seed-{seed}" / "retrain" / name
        if (directory / "training.json").exists():
            return directory
        epochs = math.ceil(steps / self.batches(data))
        config = self.config(data, directory, seed, f"train.steps={steps}", f"train.epochs={epochs}")
        run = self.open(config)
        validation = None
        if judged is not None:
            config.train.evals_per_epoch, config.train.patience = 2, 3
            other = self.open(self.config(judged, directory, seed))
            validation = self.stream(other, config.train.eval_batch_size, shuffle=False)
        allocation = Allocation.uniform(run.schema, self.args.width)
        open_retraining(config, run.schema, allocation, directory, begin)
        training = self.stream(run, config.train.batch_size, shuffle=True)
        retrain(config, allocation, training, validation, self.context, directory, quiet=True, start=begin)
        return directory

    def measure(self, directory: Path, data: Path, k: int, seed: int) -> dict[str, Any]:
        """AUC and logloss on the day after day k of a model that was trained on ``data``."""
        file = self.args.out / f"seed-{seed}" / "measured" / f"{directory.name}-after-{k}.json"
        if not file.exists():
            config = self.config(data, directory, seed)
            own = self.open(config)
            task = load_best(config, Allocation.uniform(own.schema, self.args.width), self.context, directory)
            task.model.eval()
            other = self.open(self.config(self.next_day(k, data), directory, seed))
            rows = self.stream(other, config.train.eval_batch_size, shuffle=False)
            metrics = evaluate(task.predict, rows.epoch(0), self.context)
            write_json(file, {key: metrics[key] for key in ("auc", "logloss", "rows")} | {"commit": commit()})
        return read_json(file)

    def seed(self, seed: int) -> list[dict[str, Any]]:
        """All models of one seed."""
        out: list[dict[str, Any]] = []
        first, judged = self.day(0), self.next_day(0, self.day(0))
        steps = self.args.most_epochs * self.batches(first)
        initial = self.train("initial", first, seed, steps, judged=judged)
        best = read_json(initial / "training.json")["best_step"]
        epochs = best / self.batches(first)
        before = dict.fromkeys(ARMS, initial)
        for k in range(1, len(self.parts) - 1):
            short = math.ceil(self.args.epochs * self.batches(self.day(k)))
            for arm in self.args.arms:
                data = {"cold": self.so_far, "cold-full": self.so_far, "warm-replay": self.replayed}.get(arm, self.day)(
                    k
                )
                if arm == "stale":
                    directory, data = initial, first
                elif arm.startswith("warm"):
                    begin = Start.open(before[arm], optimizer=arm == "warm-state")
                    directory = self.train(f"{arm}-{k}", data, seed, short, begin)
                else:
                    count = short if arm == "cold" else max(1, round(epochs * self.batches(data)))
                    directory = self.train(f"{arm}-{k}", data, seed, count)
                before[arm] = directory
                out.append(self.line(arm, k, seed, directory, data))
                print(" ".join(f"{key}={out[-1][key]}" for key in ("seed", "day", "arm", "auc", "logloss")), flush=True)
        return out

    def line(self, arm: str, k: int, seed: int, directory: Path, data: Path) -> dict[str, Any]:
        """A row of the CSV file."""
        found, trained = self.measure(directory, data, k, seed), read_json(directory / "training.json")
        prepared = read_json(self.args.out / "seconds" / f"{data.name}.json")["seconds"]
        stale = arm == "stale"
        return {
            "seed": seed,
            "day": k,
            "arm": arm,
            "auc": round(found["auc"], 6),
            "logloss": round(found["logloss"], 6),
            "rows": int(found["rows"]),
            "steps": 0 if stale else trained["steps"],
            "train_s": 0.0 if stale else round(trained["seconds"], 2),
            "prepare_s": 0.0 if stale else round(prepared, 2),
            "commit": found["commit"],
            "command": shlex.join(["python", "tools/studies/daily.py", *sys.argv[1:]]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="ratings.dat, or its .gz, with times")
    parser.add_argument("--movielens", type=Path, required=True, help="folder with users.dat and movies.dat")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--first", type=float, default=0.6, help="share of the initial period (default 0.6)")
    parser.add_argument("--days", type=int, default=5, help="days after it; the last is only measured on")
    parser.add_argument("--epochs", type=float, default=1.0, help="of a day's rows, for warm and cold (default 1)")
    parser.add_argument("--most-epochs", type=int, default=4, help="of the initial period (default 4)")
    parser.add_argument("--replay", type=float, default=1.0, help="earlier rows for each of today's (default 1)")
    parser.add_argument("--width", type=int, default=16, help="of every table (default 16)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further config keys")
    args = parser.parse_args()
    if args.days < 2 or not 0 < args.first < 1:
        parser.error("--days must be at least 2, and --first between 0 and 1")
    lines = read_lines(args.ratings)
    own = ("first", "days", "epochs", "most_epochs", "replay", "width", "set")
    keep_to(args.out, config=args.config, ratings=len(lines), **{k: getattr(args, k) for k in own})
    (args.out / "seconds").mkdir(exist_ok=True)
    parts = cut(lines, args.first, args.days)
    config = load_config(CONFIGS, args.config, ["run.device=cpu", "run.threads=1"])
    found: list[dict[str, Any]] = []
    with start(config.run, config.dist) as context:
        for seed in range(args.seeds):
            found += Study(args, parts, context).seed(seed)
            write_tables(args.out, found)
    print((args.out / "daily.md").read_text())


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
