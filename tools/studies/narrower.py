"""What a trained model of one width is worth in narrower tables before its first step.

Columns are turned and what is cut stays at its mean, or are turned, or only cut.

    python tools/studies/narrower.py --from RUN/retrain/ues-16 --widths 12 8 4 --data PREPARED

Measures on all rows of ``--data`` (by default those that the model was trained on), which must have the same
cardinalities: other rows are prepared with --vocabulary and --vocabulary-new freeze. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.methods import CONFIGS
from embsearch_dist.ranks.context import start
from embsearch_dist.run import Run, open_data
from embsearch_dist.schema import SPLITS
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.warm.ids import Data
from embsearch_dist.train.warm.start import Start, begin


def whole(run: Run) -> BatchStream:
    """All rows of a run's data, in stored order."""
    size = run.config.train.eval_batch_size
    rows = run.stream(SPLITS[0], size, shuffle=False)
    for split in SPLITS[1:]:
        rows.extend(run.stream(split, size, shuffle=False))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="model", type=Path, required=True, help="directory of a training")
    parser.add_argument("--data", type=Path, help="prepared rows to measure on")
    parser.add_argument("--widths", type=int, nargs="+", required=True)
    args = parser.parse_args()
    earlier = Start.open(args.model, optimizer=False)
    words = ["run.device=cpu", f"run.dir={args.model}"]
    config = load_config(CONFIGS, args.model / "config.yaml", words)
    measured = load_config(CONFIGS, args.model / "config.yaml", [*words, f"data.path={args.data or config.data.path}"])
    print("| width | columns | AUC | logloss |", "| ---: | --- | ---: | ---: |", sep="\n", flush=True)
    with start(config.run, config.dist) as context:
        run = Run(config, open_data(config, context), context)
        rows = whole(Run(measured, open_data(measured, context), context))
        for width in args.widths:
            for turn, keep_means in ((True, True), (True, False), (False, False)):
                allocation = Allocation.uniform(run.schema, width).counted(config.model.extra)
                task = SubnetTask(config, allocation, context)
                optimizer = task.model.make_optimizer(config.optim)
                data = Data(Path(config.data.path), run.schema)
                told = begin(earlier, task, optimizer, task.settings, data, allocation, context, turn, keep_means)
                task.model.eval()
                found = evaluate(task.predict, rows.epoch(0), context)
                how = next(iter(told["fields"].values()))["how"] + ", mean kept" * ("means" in told)
                print(f"| {width} | {how} | {found['auc']:.5f} | {found['logloss']:.5f} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
