"""How often repeated searches give each field the same width (AdaS&S Fig. 4).

    python tools/studies/stability.py --run runs/my --searches 100          from one supernet, new search seeds
    python tools/studies/stability.py --across runs/cmp/seed*/allocations/adass-E.json --out runs/cmp    from several

The first form writes RUN/stability.json (the report draws it), the second OUT/stability.json and prints the
same table. All searches of one supernet share the archive of scored subnets, which changes no result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.config.read import load_config
from embsearch_dist.files import write_json
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.adass.search_stage import budgets_of, make_searcher
from embsearch_dist.ranks.context import start
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory with a finished supernet")
    parser.add_argument("--searches", type=int, default=100)
    parser.add_argument("--across", type=Path, nargs="*", default=[], help="allocation files of one data set")
    parser.add_argument("--out", type=Path, help="where --across writes")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the searches of --run")
    args = parser.parse_args()
    if args.run:
        names, candidates, found = search_again(args.run, args.searches, args.overrides)
        out = args.run
    elif args.across and args.out:
        names, found = across(args.across)
        out = args.out
        candidates = sorted({w for widths in found for w in widths})
    else:
        parser.error("give --run DIR, or --across FILES with --out DIR")
    counts = [[sum(w[f] == d for w in found) for d in candidates] for f in range(len(names))]
    write_json(
        out / "stability.json", {"candidates": candidates, "fields": names, "counts": counts, "runs": len(found)}
    )
    print("| field | " + " | ".join(map(str, candidates)) + " | most frequent |")
    print("| --- |" + " --- |" * (len(candidates) + 1))
    for name, row in zip(names, counts, strict=True):
        print(f"| {name} | " + " | ".join(map(str, row)) + f" | {max(row) / len(found):.0%} |")


def across(files: Sequence[Path]) -> tuple[list[str], list[list[int]]]:
    """Field names, and the widths ``[files, F]`` of allocations, each found by its field's name.

    Raises:
        SystemExit: one has other fields than the first.
    """
    bodies = [json.loads(p.read_text())["widths"] for p in files]
    names = list(bodies[0])
    for path, body in zip(files, bodies, strict=True):
        if body.keys() != bodies[0].keys():
            raise SystemExit(f"{path} has other fields than {files[0]}. Give allocations of one data set")
    return names, [[body[n] for n in names] for body in bodies]


def search_again(directory: Path, searches: int, overrides: list[str]) -> tuple[list[str], list[int], list[list[int]]]:
    """Field names, candidates and the found widths ``[searches, F]`` of new searches of one supernet."""
    sections = {n: m.config for n, m in METHODS.items()}
    config = load_config(sections, directory / "config.yaml", overrides)
    with start(config.run, config.dist) as context:
        schema = Schema.load(config.data.path)
        searcher = make_searcher(Run(config, schema, context))
        _, budget = budgets_of(config.search, schema, config.model.extra)[0]
        found = []
        for seed in range(searches):
            choice = searcher.find(1_000_000 + seed, budget).choice
            found.append([searcher.candidates[j] for j in choice])
            scored = len(searcher.scorer.archive)
            print(f"search {seed + 1}/{searches}: {found[-1]}  ({scored:,} scored)", file=sys.stderr, flush=True)
        return schema.names, list(searcher.candidates), found


if __name__ == "__main__":
    main()
