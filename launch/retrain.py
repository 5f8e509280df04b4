"""Train the model of an allocation from scratch or from an earlier one, sharded by TorchRec, and evaluate it on the
test split.

    python launch/retrain.py --run runs/my                              what the search found
    python launch/retrain.py --run runs/my --allocation ues-32        the uniform baseline
    python launch/retrain.py --run runs/my --allocation bracket       the uniform widths around what was found
    python launch/retrain.py --run runs/my --or-uniform               what was found, or the uniform width if better
    python launch/retrain.py --run runs/my --finetune                 begin with the widest model, cut down
    python launch/retrain.py --run runs/my --allocation runs/my/allocations/small.json
    python launch/retrain.py --run runs/my --model.backbone fm --name other    another model behind what was found
    python launch/retrain.py --run runs/my --model.architecture runs/my/architectures/rank-2.json --name second
    python launch/retrain.py --config configs/movielens_1m/adass_deepfm.yaml --allocation ues-32
    python launch/retrain.py --run runs/my --best 5 --refit    the five best networks, and the winner of them
    python launch/retrain.py --from runs/my/retrain/adass --data.path TODAY --name today    begin with that model
    torchx run dist.ddp -j 1x2 retrain.py --run runs/my       two processes

Options: --run DIR or --config FILE, --allocation FILE, ues-WIDTH or bracket (default: model.allocation, or the run's
allocation.json or groups.json), --name NAME of the result under RUN/retrain (default: from the allocation; -seedN is
added for a seed other than the run's), --or-uniform, --best K to train the K best networks that a search kept and keep
the one of least validation logloss, --refit to train that one again on training and validation rows,
--finetune to begin with the widest uniform model, cut down to the widths (that of the search, or one that is trained
first; the default of utilities and auto where columns can be turned; --finetune false for fresh weights), --from OLD
to begin with the tables, the dense part and the state of the optimizers of an earlier training (without --run or
--config its config and widths are taken too; docs/daily.md), --from-optimizer false for its weights alone,
--section.key VALUE (train, optim and model keys may be new ones).
Leaves RUN/retrain/NAME/{allocation.json, evaluation.json, metrics.jsonl, checkpoints}; of a search that found
groups, one such training per group in RUN/retrain/NAME/group-K, and in RUN/retrain/NAME the evaluation of all as
one model. With --or-uniform the widest uniform width that fits the allocation's budget is trained too (where what was
found is fine-tuned, from fresh weights and fine-tuned); the better one on the validation split is named, with the
reason, in RUN/final.json. With --best the winner is in RUN/retrain/NAME with choice.json, the others in NAME-rank-K;
NAME ends in -best unless it is given. A killed training continues when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.ranks.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.config.read import split_arguments
from embsearch_dist.errors import UserError
from embsearch_dist.rundir import check_text
from embsearch_dist.stores.states import restore
from launch.common import DEFAULT_CONFIG, known_options, override, read_config, run_main


def main(argv: Sequence[str]) -> None:
    plain, overrides = split_arguments(argv)
    beginnings = ["from", "from-optimizer", "finetune"]
    known_options(plain, ["run", "config", "allocation", "name", "or-uniform", "best", "refit", *beginnings], overrides)
    from embsearch_dist.allocation import REFERENCE_WIDTH, Allocation  # torch: not needed for --help
    from embsearch_dist.methods.results import searched_network, seed_suffix
    from embsearch_dist.methods.wish import Wish
    from embsearch_dist.ranks.context import start
    from embsearch_dist.running import continuing, retrain
    from embsearch_dist.train.metrics import shown

    wish = Wish.of(plain, overrides)
    goes_on = bool(wish.start) and "run" not in plain and "config" not in plain
    if goes_on:
        wish, plain, overrides = continuing(wish, plain, overrides)
    if "run" in plain and (mirror := override(overrides, "run.mirror")):
        restore(Path(plain["run"]), mirror)
    if "run" in plain and not (Path(plain["run"]) / "config.yaml").exists():
        raise UserError(f"--run {plain['run']}: no config.yaml there, so it is not a run directory of search.py")
    file = Path(plain["run"]) / "config.yaml" if "run" in plain else plain.get("config", DEFAULT_CONFIG)
    if "run" in plain:
        check_text(Path(file))
    base = read_config(file, [o for o in overrides if o.startswith(("run.dir=", "model.module="))])
    run_dir = Path(plain.get("run", base.run.dir))
    config = read_config(file, [*([] if goes_on else searched_network(run_dir, overrides)), *overrides])
    with start(config.run, config.dist) as context:
        done = retrain(config, context, run_dir, wish, seed_suffix(config, base))
        whole = Allocation.uniform(done.schema, REFERENCE_WIDTH).counted(config.model.extra).total("parameters")
        for label, result in done.results.items() if context.rank == 0 else ():
            size, place = result["embedding_parameters"], run_dir / "retrain" / label.split(" (router")[0]
            print(
                f"{label}: test auc {shown(result['auc'])}  logloss {shown(result['logloss'])}  embedding parameters "
                f"{size:,} ({size / whole:.1%} of UES-{REFERENCE_WIDTH})  -> {place}"
            )


if __name__ == "__main__":
    run_main(main, __doc__, searching=False)
