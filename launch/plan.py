"""Predict where tables would lie on any number of ranks, their bytes and the time of a step. Needs no GPU.

    python launch/plan.py --world-size 64 --data PREPARED --allocation runs/my/allocation.json ues-32 ues-64
    python launch/plan.py --world-size 16 --hbm-gb 80 --cardinalities user=5e7,item=2e6,age=8 --allocation ues-64
    python launch/plan.py --world-size 8 --supernet --config configs/criteo/adass_deepfm.yaml
    python launch/plan.py --world-size 2 --local-world-size 2 --device cpu --run runs/my --dist.sharding auto

Allocations are compared with the first. The plan is that of TorchRec's planner (dist.sharding: planner);
`--dist.sharding auto` and the other values show the plan a run with that setting makes by hand.

Options: --world-size N [8], --local-world-size N of one machine [8, or all], --device cuda|cpu [cuda],
--hbm-gb, --ddr-gb, --batch-size (rows a rank) and every other key as --dist.planner.KEY. Without --hbm-gb the GPU
is the smallest one here, and an A100 80GB where there is none; the output says which. The fields: --data (a
prepared data set or a schema.json), --cardinalities NAME=ROWS,..., or the data of --config or --run.
The widths: --allocation FILE or ues-WIDTH, several allowed, or --supernet (with search.candidates). With
--cardinalities an allocation found on other data gives its widths. --out DIR draws plan.png, --json FILE
(- for the terminal) writes all figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.config.options import one_of
from embsearch_dist.config.read import split_arguments
from embsearch_dist.rundir import check_text
from launch.common import DEFAULT_CONFIG, known_options, read_config, run_main, take_words, whole_number

SHORT = {"hbm-gb": "hbm_gb", "ddr-gb": "ddr_gb", "batch-size": "batch_size"}
OPTIONS = ["world-size", "local-world-size", "device", "data", "cardinalities", "config", "run", "supernet", "out"]


def main(argv: Sequence[str]) -> None:
    argv, allocations = take_words(argv, "--allocation")
    plain, overrides = split_arguments(argv)
    known_options(plain, [*OPTIONS, *SHORT, "json", "allocation"], overrides)
    short = [f"dist.planner.{SHORT[k]}={v}" for k, v in plain.items() if k in SHORT]
    file = Path(plain["run"]) / "config.yaml" if "run" in plain else plain.get("config", DEFAULT_CONFIG)
    if "run" in plain:
        check_text(Path(file))
    config = read_config(file, ["dist.sharding=planner", *short, *overrides])
    import torch  # not needed to refuse a config

    from embsearch_dist.sharding.card import fill, origin, read_card, smallest
    from embsearch_dist.sharding.dry_run import Subject, asked_schema, make_plans, read_subjects, supernet_subject
    from embsearch_dist.sharding.plan import Topology
    from embsearch_dist.sharding.plan_text import comparison, heading, plan_text, to_json

    device = plain.get("device", "cuda")
    one_of("--device", device, ["cuda", "cpu"])
    world = whole_number(plain, "world-size", 8)
    card = smallest([read_card(i) for i in range(torch.cuda.device_count())]) if device == "cuda" else None
    gpu = origin(config.dist.planner, card) if device == "cuda" else ""
    local = whole_number(plain, "local-world-size", min(8, world))
    topology = Topology(world, local, device, fill(config.dist.planner, card))
    schema = asked_schema(config.data, plain)
    subjects: list[Subject] = []
    if "supernet" in plain:
        subjects.append(supernet_subject(schema, config))
    if allocations or not subjects:
        found = [str(Path(plain["run"]) / "allocation.json")] if "run" in plain and not subjects else []
        subjects += read_subjects(allocations or found, schema, "cardinalities" in plain, config.model.extra)
    plans = make_plans(subjects, topology, config)
    parameters = {s.name: s.parameters for s in subjects}
    figures = to_json(plans, parameters) | {"gpu": gpu}
    if plain.get("json") == "-":
        print(json.dumps(figures, indent=2))
    else:
        print("\n".join([heading(topology), *([gpu] if gpu else [])]))
        for name, plan in plans.items():
            print(f"\n{plan_text(name, plan, parameters[name])}")
        if len(plans) > 1:
            print(f"\n{comparison(plans, parameters)}")
        if "json" in plain:
            Path(plain["json"]).write_text(json.dumps(figures, indent=2) + "\n")
    if "out" in plain:
        from embsearch_dist.report.plan_picture import draw_plans  # matplotlib: only for a picture

        print(draw_plans(plans, Path(plain["out"])), file=sys.stderr if plain.get("json") == "-" else sys.stdout)


if __name__ == "__main__":
    run_main(main, __doc__)
