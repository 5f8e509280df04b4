"""Evaluate a retrained model: exact AUC, logloss and calibration over all ranks, parameters, bytes, FLOPs.

    python launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass
    python launch/evaluate.py --run runs/my            the model that retrain.py chose there (method auto, --or-uniform)
    python launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass --split validation
    python launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass --precision int8     tables as served
    python launch/evaluate.py --run runs/my/retrain/ihas --router fields       models of groups, the cheap router
    python launch/evaluate.py --run runs/my/retrain/adass --group user_id      AUC inside each user's rows, too
    python launch/evaluate.py --run runs/my/retrain/adass --intervals          how far the figures may be off
    python launch/evaluate.py --run runs/my/retrain/adass --against runs/my/retrain/ues-16    the difference, and
                                                                               whether the test rows can tell it
    torchrun --standalone --nproc-per-node 2 -- launch/evaluate.py --run runs/synthetic_adass_deepfm/retrain/adass

Options: --run DIR (a directory that retrain.py wrote, or a run directory with its choice, final.json), --split
test|validation|train, --section.key VALUE; --precision
fp32|fp16|int8|int4|mixed adds figures with tables rounded as an export at it serves them (default: search.precision);
for models of groups --router centres|fields: the search's own (default) or one that looks at a few raw fields.
--group FIELD (or train.group): the mean AUC inside the values of a field; --intervals [RESAMPLES]: 95% bootstrap
intervals, over rows, or with --group over the field's values; --against DIR: the figures of this model minus those of
another one on the same rows, with intervals. docs/metrics.md says what each figure is.
Prints the figures as JSON and leaves them in DIR/evaluation.json, -SPLIT and -fields in its name where they are not
of the test split or the default router, and a difference in DIR/difference-to-NAME.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.ranks.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.config.options import one_of
from embsearch_dist.config.read import split_arguments
from embsearch_dist.methods import METHODS
from embsearch_dist.precision import MIXED, PRECISIONS
from embsearch_dist.rundir import hold
from embsearch_dist.schema import SPLITS
from launch.common import chosen_model, known_options, run_main


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    known_options(plain, ["run", "split", "router", "precision", "group", "intervals", "against"], overrides)
    directory, split = chosen_model(Path(plain.get("run", ""))), plain.get("split", "test")
    router, precision = plain.get("router", ""), plain.get("precision", "")
    one_of("--split", split, SPLITS)
    one_of("--precision", precision, ("", *PRECISIONS, MIXED))
    from embsearch_dist.ranks.context import start  # torch: not needed for --help
    from embsearch_dist.run import Run, open_data
    from embsearch_dist.running import answers_of, trained_config
    from embsearch_dist.stores.mirroring import mirroring
    from embsearch_dist.train.figures import Wanted, resamples_of
    from embsearch_dist.train.metrics import check_group

    overrides += [f"train.group={plain['group']}"] if "group" in plain else []
    config = trained_config(directory, "--run", overrides)
    method = METHODS[config.method]()
    method.check_evaluation(directory, router, precision)
    resamples = resamples_of(plain.get("intervals", "true" if "against" in plain else None))
    with start(config.run, config.dist) as context, mirroring(config, context):
        run = Run(config, open_data(config, context), context)
        check_group(run.schema, config.train.group)
        context.first("opening the directory", lambda: hold(directory, "evaluate.py"))
        other = answers_of(chosen_model(Path(plain["against"])), run, split) if "against" in plain else None
        wanted = Wanted(config.train.group, resamples, config.run.seed, other)
        figures = method.evaluate(run, directory, split, router, precision, wanted)
        if context.rank == 0:
            print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_main(main, __doc__, searching=False)
