"""Compare searches of any method with budgets, and uniform widths, at equal budgets: one recipe, seeds, a verdict.

    python tools/studies/compare_budgets.py --config configs/movielens_1m/adass_deepfm.yaml --data PREPARED \
        --out runs/compare --budgets 10%,25%,50%,80% --seeds 5 --jobs 2
    python tools/studies/compare_budgets.py ... --dry-run                                    list the commands
    python tools/studies/compare_budgets.py ... --methods utilities,mde,sseds,autofield,autodim
    python tools/studies/compare_budgets.py ... --variants plain:model.unify=mixed       uniform widths in this way too
    python tools/studies/compare_budgets.py ... --settings utilities:search.evidence=2   keys of one method's search
    python tools/studies/compare_budgets.py ... --first-seed 3 --seeds 2 --earlier FILE.csv      two more seeds
    python tools/studies/compare_budgets.py ... --finetuned      all once more, begun with the widest uniform model
    python tools/studies/compare_budgets.py ... --precision int8 --budgets ues-12,ues-28 --widths 12,28
                                                              judge by bytes and AUC of tables as served at int8

For each seed: the searches of --methods under every budget, a training of each found allocation and of each uniform
width, all with the config's own recipe (its train, optim and model sections; stopped on the validation split). The
`search` section of a method is that of the config METHOD_*.yaml beside --config (of the same backbone, if there are
several), or the method's defaults; `fdo` and `magnitude` are the two rules of `truncation`. Every run is an ordinary
run directory under OUT; what is finished is skipped, so a stopped comparison continues and one that is given more
seeds, budgets or methods keeps what it has. Another config, data, --extra or settings of a method need another OUT.
Widths that two searches of a seed have in common are trained once. With --finetuned each allocation and each uniform
width is trained a second time, not from fresh weights but from the model of the widest uniform width of its seed, whose
tables are cut to the new widths (retrain.py --from). That one itself is trained further, too, so that longer training
is not taken for a gain. Validation figures are those of the best epoch, test figures those of its weights.

What --earlier tells (a comparison.csv of the same recipe and data) is not run again and stands in the new tables, so
that a comparison can go on with more seeds, methods or budgets where its run directories are gone.

Leaves OUT/comparison.csv (a line per seed and model), comparison.md (verdicts and table), comparison.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.config.read import written
from embsearch_dist.methods.finetuning import FINETUNED as TUNED
from embsearch_dist.methods.widest import FOLDER
from tools.studies.allocations import Found, check_precision, check_under, fitting, names_of
from tools.studies.asked import body_of, keep_to, named, slug, words
from tools.studies.budget_tables import FINETUNED, Trained, write_all
from tools.studies.comparable import AUTO, RULES, USUAL, comparable, cuts_widest, section_of
from tools.studies.earlier import Earlier
from tools.studies.finals import Final
from tools.studies.jobs import Job, Pace, run_all, shown, trained_in

FRESH = ("--finetune", "false")  # whatever the method of --config does by itself


def parser() -> argparse.ArgumentParser:
    """The command line; its arguments are what a :class:`Plan` is made of."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--config", type=Path, required=True, help="config of an adass search, or of another method")
    add("--data", required=True, help="prepared data set")
    add("--out", type=Path, required=True)
    add("--budgets", default="10%,25%,50%,80%", help="as search.budget takes them")
    add("--seeds", type=int, default=5, help="how many")
    add("--first-seed", type=int, default=0, help="number of the first one")
    add("--earlier", type=Path, help="comparison.csv whose lines are not run again and join the tables")
    add("--methods", default=",".join(USUAL), help=f"some of {', '.join(comparable())}; empty = none")
    add("--widths", default="2,4,8,16,32", help="uniform widths")
    add("--variants", nargs="*", default=[], help="NAME:key=value,... further sets of uniform widths")
    add("--finetuned", action="store_true", help="everything once more, begun with the widest uniform model")
    add("--settings", nargs="*", default=[], help="METHOD:search.key=value,... of one search")
    add("--extra", nargs="*", default=[], help="further overrides for all runs, section.key=value")
    add("--precision", default="", help="fp32 | fp16 | int8 | int4: judge tables as served at it")
    add("--jobs", type=int, default=2, help="runs side by side, one thread each")
    add("--dry-run", action="store_true", help="print the commands and leave")
    add("--only-tables", action="store_true", help="run nothing: tables of what is there")
    return found


def main() -> None:
    args = parser().parse_args()
    plan = Plan(args)
    if args.dry_run:
        for job in plan.jobs():
            print(f"{job.name}: {shown(job)}")
        return
    if not args.only_tables:
        plan.carry_out()
    print(write_all(args.out, plan.trained(), plan.earlier.with_new))


class Plan:
    """All runs of a comparison, by the command line's arguments."""

    def __init__(self, args: argparse.Namespace, data_set: str = "") -> None:
        """
        Args:
            data_set: whose lines of ``--earlier`` count, where it is the file of a league.

        Raises:
            SystemExit: an argument that is not of its form; names it.
        """
        self.args, self.out = args, args.out
        self.seeds = range(args.first_seed, args.first_seed + args.seeds)
        self.earlier = Earlier.read(args.earlier, Path(args.data), data_set)
        self.budgets = words(args.budgets)
        self.methods, self.widths = words(args.methods), [int(w) for w in words(args.widths)]
        if args.finetuned and not self.widths:
            raise SystemExit("--finetuned begins with the widest uniform width: name one or more under --widths")
        for method in self.methods:
            if method not in comparable():
                raise SystemExit(f"--methods {method}: none of {', '.join(comparable())}")
        self.variants = {"": [], **named("--variants", args.variants)}
        self.settings = named("--settings", args.settings)
        for method in self.settings:
            if method not in self.methods:
                raise SystemExit(f"--settings {method}: not among the methods {', '.join(self.methods)}")
        # Its chain ends with a choice of its own; what it finds before that is what utilities find.
        self.methods, self.chooses = [m for m in self.methods if m != AUTO], AUTO in self.methods
        self.body: dict[str, Any] = written(args.config)
        if "adass" in self.methods and self.body.get("method") != "adass":
            raise SystemExit(f"--methods adass: {args.config} is a config of {self.body.get('method')}")
        self.precisions = {method: self.precision_of(method) for method in [*self.methods, *([AUTO] * self.chooses)]}

    def jobs(self) -> list[Job]:
        """All that is still to be run, searches first; trainings that may turn out to be the same are all here."""
        chains = [*self.searches(), *self.uniforms(), *self.trainings(), *self.tuned(), *self.choices()]
        return [job for chain in chains for job in chain]

    def carry_out(self) -> None:
        """Run what is not finished, and say how much is left.

        Raises:
            SystemExit: a command failed; names its log. Or what :meth:`trained` and :meth:`keep_to` refuse, before
                anything is run.
        """
        self.trained()
        self.keep_to()
        logs, side_by_side = self.out / "logs", self.args.jobs
        pace = Pace(self.jobs(), logs, side_by_side)
        run_all(self.searches() + self.uniforms(), logs, side_by_side, pace)
        steps = [self.trainings(), self.tuned(), self.choices()]
        pace.keep([job for chains in steps for chain in chains for job in chain])
        for chains in steps:
            run_all(chains, logs, side_by_side, pace)

    def keep_to(self) -> None:
        """Note what the results in OUT depend on. Seeds, budgets, methods, widths and variants may be added later.

        Raises:
            SystemExit: OUT has results of another recipe, of other data or of other settings of a search or variant.
        """
        told: dict[str, Any] = {
            "config": body_of(self.args.config.name, {k: v for k, v in self.body.items() if k != "search"}),
            "data": Path(self.args.data, "schema.json"),
            "extra": self.args.extra,
        }
        for method in [*self.methods, *([AUTO] * self.chooses)]:
            told[f"search of {method}"] = body_of("section", self.section(method))
            told[f"settings of {method}"] = self.settings.get(method, [])
        told |= {f"variant {name}": own for name, own in self.variants.items() if name}
        keep_to(self.out, **told)

    def config_of(self, method: str) -> Path:
        """A file with the config's recipe and the search section of another method."""
        if method == "adass":
            return self.args.config
        named_method = "truncation" if method in RULES else method
        body = {**self.body, "method": named_method, "search": self.section(method)}
        path = self.out / "configs" / f"{method}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(body, sort_keys=False))
        return path

    def section(self, method: str) -> dict[str, Any]:
        """Keys of a method's ``search`` section that are not its defaults."""
        return self.body.get("search", {}) if method == "adass" else section_of(self.args.config, self.body, method)

    def found(self, seed: int) -> list[Found]:
        return [found for method in self.methods for found in self.found_by(method, seed)]

    def found_by(self, method: str, seed: int) -> list[Found]:
        """One for each budget. What is not there yet has the place that the next search, for all such, will give it."""
        folder, precision = self.search_dir(method, seed) / "allocations", self.precisions[method]
        files = {budget: fitting(folder, method, budget, precision) for budget in self.budgets}
        lacking = [b for b, file in files.items() if file is None and not self.told(seed, method, b)]
        names = dict(zip(lacking, names_of(method, lacking, precision), strict=True))
        found = []
        for budget, file in files.items():
            name = names.get(budget) or names_of(method, [budget], precision)[0]
            place = file or folder / f"{name}.json"
            found.append(Found(method, budget, seed, place, precision, file is not None))
        return found

    def precision_of(self, method: str) -> str:
        """The precision at which the budgets of a method's search count bytes; empty where they do not."""
        told = [f"search.precision={self.section(method).get('precision') or ''}", *self.overrides()]
        told += self.settings.get(method, [])
        return [value for key, _, value in (text.partition("=") for text in told) if key == "search.precision"][-1]

    def search_dir(self, method: str, seed: int) -> Path:
        """Methods that cut the widest model down share one run directory, and so the model."""
        return self.out / f"seed{seed}" / ("widest" if cuts_widest(method) else method)

    def shared(self, method: str, seed: int) -> Path | None:
        """What the training of the widest model leaves, for the methods that share it."""
        return self.search_dir(method, seed) / FOLDER / "training.json" if cuts_widest(method) else None

    def searches(self) -> list[list[Job]]:
        """A chain per seed and run directory. A search whose results are there is not started."""
        chains: dict[Path, list[Job]] = {}
        for seed in self.seeds:
            for method in self.methods:
                directory = self.search_dir(method, seed)
                found = self.found_by(method, seed)
                lacking = [f for f in found if not f.there and not self.told(seed, method, f.budget)]
                if not lacking:
                    continue
                # What is there is not searched again: trainings refer to it.
                first, pareto = lacking[0], "[" + ", ".join(json.dumps(f.budget) for f in lacking[1:]) + "]"
                own = [f"search.name={first.allocation.stem}", f"search.budget={first.budget}"]
                own.append(f"search.pareto={pareto}")
                arguments = ["--config", str(self.config_of(method)), *self.common(directory, seed)]
                arguments += [f"--{x}" for x in [*own, *self.settings.get(method, [])]]
                name, shared = f"seed{seed}-search-{method}", self.shared(method, seed)
                job = Job(name, "launch/search.py", arguments, None, shared=shared)
                chains.setdefault(directory, []).append(job)
        return list(chains.values())

    def common(self, directory: Path, seed: int) -> list[str]:
        where = [f"data.path={self.args.data}", f"run.dir={directory}", f"run.seed={seed}"]
        return [f"--{x}" for x in [*where, *self.overrides()]]

    def overrides(self) -> list[str]:
        """Of all runs, as section.key=value."""
        return [*([f"search.precision={self.args.precision}"] if self.args.precision else []), *self.args.extra]

    def uniforms(self) -> list[list[Job]]:
        return [
            [self.training(seed, uniform_name(width, variant), f"ues-{width}", overrides)]
            for seed in self.seeds
            for variant, overrides in self.variants.items()
            for width in self.widths
            if not self.known(seed, uniform_method(variant), width)
            or (not variant and width == max(self.widths) and next(self.to_tune(seed), None))  # others begin with it
        ]

    def trainings(self) -> list[list[Job]]:
        """The found allocations; of equal ones of a seed the first."""
        self.check()
        chains = []
        for seed in self.seeds:
            for found in self.found(seed):
                if self.owner(found) == found.name and not self.known(seed, found.method, found.budget):
                    chains.append([self.training(seed, found.name, str(found.allocation), [])])
        return chains

    def check(self) -> None:
        """Refuse finished trainings of other tables than are asked: their places have the same names.

        Raises:
            SystemExit: names the folder and the cure.
        """
        for final in (f for seed in self.seeds for f in self.finals(seed) if f.file.exists()):
            check_under(final.run_dir / "allocation.json", final.budget, self.precisions[AUTO], final.run_dir)
        for found in (f for seed in self.seeds for f in self.found(seed) if self.owner(f) == f.name):
            for name in (found.name, *([found.name + TUNED] if self.args.finetuned else [])):
                found.check(self.place(found.seed, name))

    def tuned(self) -> list[list[Job]]:
        """Uniform widths and found allocations once more, each begun with the widest uniform model of its seed."""
        chains: list[list[Job]] = []
        for seed in self.seeds if self.args.finetuned else ():
            widest = ["--from", str(self.place(seed, uniform_name(max(self.widths), ""))), "--from-optimizer", "false"]
            for name, allocation in self.to_tune(seed):
                chains.append([self.training(seed, name + TUNED, allocation, [], widest)])
        return chains

    def finals(self, seed: int) -> list[Final]:
        """One for each budget, where auto is compared."""
        home, shared = self.out / f"seed{seed}", self.shared("utilities", seed)
        alike = "utilities" in self.methods and self.settings.get("utilities") == self.settings.get(AUTO)
        searched = f"seed{seed}-search-utilities" if alike else ""
        names = [(b, slug(b)) for b in self.budgets] if self.chooses else []
        return [Final(seed, budget, name, home / f"{AUTO}-{name}", shared, searched) for budget, name in names]

    def choices(self) -> list[list[Job]]:
        """The chain of auto for each seed and budget."""
        chains = []
        for final in (f for seed in self.seeds for f in self.finals(seed) if not self.known(seed, AUTO, f.budget)):
            options = ["--config", str(self.config_of(AUTO)), *self.common(final.run_dir, final.seed)]
            options += [f"--{x}" for x in self.settings.get(AUTO, [])]
            chains.append(final.chain(options))
        return [chain for chain in chains if chain]

    def to_tune(self, seed: int) -> Iterator[tuple[str, str]]:
        """(name, allocation) of what is to be fine-tuned, without what an earlier comparison tells."""
        if not self.args.finetuned:
            return
        for width in self.widths:
            if not self.known(seed, uniform_method("") + FINETUNED, width):
                yield uniform_name(width, ""), f"ues-{width}"
        for found in self.found(seed):
            if self.owner(found) == found.name and not self.known(seed, found.method + FINETUNED, found.budget):
                yield found.name, str(found.allocation)

    def known(self, seed: int, method: str, label: str | int) -> bool:
        """Whether an earlier comparison has a line of this budget or width."""
        return (seed, method, str(label)) in self.earlier.keys

    def told(self, seed: int, method: str, budget: str) -> bool:
        """Whether an earlier comparison has all lines that would come of what is found under a budget."""
        methods = [method, *([method + FINETUNED] if self.args.finetuned else [])]
        return all(self.known(seed, m, budget) for m in methods)

    def training(
        self, seed: int, name: str, allocation: str, overrides: list[str], start: Sequence[str] = FRESH
    ) -> Job:
        arguments = ["--config", str(self.args.config), *self.common(self.out / f"seed{seed}" / "models", seed)]
        arguments += [f"--{x}" for x in overrides]
        arguments += ["--allocation", allocation, "--name", name, *start]
        return Job(f"seed{seed}-{name}", "launch/retrain.py", arguments, self.place(seed, name) / "evaluation.json")

    def place(self, seed: int, name: str) -> Path:
        return trained_in(self.out / f"seed{seed}" / "models", name, seed, self.body.get("run", {}).get("seed", 0))

    def owner(self, found: Found) -> str:
        """The name under which these tables are trained in this seed."""
        tables = found.tables
        if tables is None:
            return found.name
        widths, values = tables
        width = next(iter(widths.values()))
        uniform = not values and len(set(widths.values())) == 1 and width in self.widths
        if uniform and not self.known(found.seed, uniform_method(""), width):
            return uniform_name(width, "")
        alike = (f for f in self.found(found.seed) if f.tables == tables)
        return next((f.name for f in alike if not self.known(f.seed, f.method, f.budget)), found.name)

    def trained(self) -> list[Trained]:
        """Every model of the comparison, finished or not.

        Raises:
            SystemExit: a finished one is of other tables than are asked, or was not measured at the precision.
        """
        self.check()
        models = []
        for seed in self.seeds:
            for variant in self.variants:
                for width in self.widths:
                    name = uniform_name(width, variant)
                    method = uniform_method(variant)
                    models.append(Trained(method, "", seed, self.place(seed, name), f"seed{seed}-{name}", "", width))
            for width in self.widths if self.args.finetuned else ():
                name = uniform_name(width, "") + TUNED
                place = self.place(seed, name)
                models.append(Trained(uniform_method("") + FINETUNED, "", seed, place, f"seed{seed}-{name}", "", width))
            for found in self.found(seed):
                name, search = self.owner(found), f"seed{seed}-search-{found.method}"
                place = self.place(seed, name)
                shared = self.shared(found.method, seed)
                first = Trained(found.method, found.budget, seed, place, f"seed{seed}-{name}", search, 0, shared)
                models.append(first)
                if self.args.finetuned:
                    place, job = self.place(seed, name + TUNED), first.job + TUNED
                    method = found.method + FINETUNED
                    models.append(dataclasses.replace(first, method=method, place=place, job=job))
            models += [final.trained() for final in self.finals(seed)]
        for model in models:
            check_precision(model.place, self.args.precision)
        return models


def uniform_method(variant: str) -> str:
    """What the CSV calls uniform widths that are trained in this way."""
    return f"uniform {variant}".strip()


def uniform_name(width: int, variant: str) -> str:
    return f"ues-{width}" + (f"-{variant}" if variant else "")


if __name__ == "__main__":
    main()
