"""What is trained of a search's result: what was found, uniform widths beside it, and the choice between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import Diverged, UserError
from embsearch_dist.files import write_sealed
from embsearch_dist.grouped import GroupedAllocation
from embsearch_dist.methods.fallback import LOWER, Trained, bracket, choose_of, predictions, uniform_like, widest_within
from embsearch_dist.methods.finetuning import FINETUNED, by_default, widest_start
from embsearch_dist.methods.results import read_result
from embsearch_dist.methods.widening import climb
from embsearch_dist.methods.widest import FOLDER
from embsearch_dist.methods.wish import BRACKET, Wish
from embsearch_dist.precision import MIXED, served
from embsearch_dist.ranks.context import Context
from embsearch_dist.ranks.shared import open_shared
from embsearch_dist.run import Run
from embsearch_dist.rundir import plain_word
from embsearch_dist.schema import Schema
from embsearch_dist.stores.mirror import below
from embsearch_dist.stores.mirroring import mirroring
from embsearch_dist.train.directories import open_retraining
from embsearch_dist.train.figures import DIFFERENCE, Wanted
from embsearch_dist.train.metrics import Predictions
from embsearch_dist.train.metrics import predictions as all_predictions
from embsearch_dist.train.retrain import SubnetTask, evaluate_model, load_best, retrain
from embsearch_dist.train.served import evaluate_served, rounded_tables
from embsearch_dist.train.warm.start import DONE, Start, read_record

Found = Allocation | GroupedAllocation
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Retraining:
    """One call of retrain.py.

    Attributes:
        wish: what the command line asks for.
        run: config, data and ranks; its directory is not that of a training.
        run_dir: the search's, or where ``retrain/`` is to be.
        name: of the result.
        suffix: behind the name of every result, for a seed that is not the run's.
        found: what is trained, unless the wish says otherwise.
        start: the earlier training that it begins with.
        begin: sets the initial weights of the model of ``found``, given with its task; of no other.
    """

    wish: Wish
    run: Run
    run_dir: Path
    name: str
    suffix: str
    found: Found
    start: Start | None = None
    begin: Callable[[Allocation, SubnetTask], None] | None = None

    def run_in(self, name: str = "") -> Run:
        """The run of one training, with a config of its own: its directory is ``RUN/retrain/NAME`` and the suffix."""
        config = copy.deepcopy(self.run.config)
        directory = self.run_dir / "retrain" / ((name or self.name) + self.suffix)
        config.run.dir, config.run.mirror = str(directory), below(config.run.mirror, self.run_dir, directory)
        return Run(config, self.run.schema, self.run.context)


def read_wish(wish: Wish, config: Config, run_dir: Path, schema: Schema) -> tuple[str, Found]:
    """Name and widths of what is trained.

    Raises:
        UserError: nothing was found yet, or groups of models where the wish is for one.
    """
    text = wish.allocation or config.model.allocation
    text = "" if wish.allocation == BRACKET else text
    name, found = read_result(text, run_dir, schema, carried=bool(wish.start))
    if isinstance(found, GroupedAllocation):
        if wish.start or wish.finetune:
            option = "--from" if wish.start else "--finetune"
            raise UserError(
                f"{option} begins one model; this run has found groups. Give --allocation, or leave {option} out"
            )
        if wish.best:
            raise UserError("--best: groups of rows have widths of their own, and no network. Leave it out")
        if wish.or_uniform or wish.allocation == BRACKET:
            option = "--or-uniform" if wish.or_uniform else f"--allocation {BRACKET}"
            raise UserError(f"{option} compares the widths of one model; this run has found groups. Leave it out")
    if config.model.architecture and name.startswith("ues-"):
        name = f"nasrec-{name}"  # not the uniform baseline: a found network stands behind its tables
    called = wish.name or (f"{name}-best" if wish.best else name)
    plain_word(called, "--name" if wish.name else "the name in the allocation's provenance (--name gives another)")
    return called, found.counted(config.model.extra)


def taken(wish: Wish, config: Config, run_dir: Path, name: str, found: Found) -> str:
    """A line that says which of a run's results is trained, by what search it was found, and what else there is."""
    told = found.provenance
    parts = [f"found by the search of seed {told['seed']}"] if "seed" in told else []
    parts += [f"under the budget {told['budget']}"] if "budget" in told else []
    if told.get("seed", config.run.seed) != config.run.seed:
        parts.append(f"trained with seed {config.run.seed}")
    others = sorted(p.stem for p in (run_dir / "allocations").glob("*.json") if p.stem != told.get("name"))
    more = ""
    if not wish.allocation and not config.model.allocation and others and isinstance(found, Allocation):
        more = f"; {len(others)} more in {run_dir / 'allocations'} (--allocation FILE): {', '.join(others[:6])}"
    return f"retraining {name}{': ' if parts else ''}{', '.join(parts)}{more}"


def is_uniform_of_budget(found: Allocation) -> bool:
    """Whether what was found is the widest uniform width of its budget: all rows, and no table at another precision
    than uniform widths are served at."""
    plain = not found.values and set(found.precisions.values()) <= {"int8"}
    return plain and set(found.widths.values()) == {widest_within(found)}


def beside(found: Allocation, widest: Start | None, start: Start | None) -> dict[str, tuple[Allocation, Start | None]]:
    """Name -> the widest uniform allocation of the budget of ``found`` and a beginning, in each way that the choice
    is to know; see :func:`planned`. Nothing where no width fits, or where it would be the model of ``found`` again."""
    width, same = widest_within(found), is_uniform_of_budget(found)
    if not width or (same and widest is None):
        return {}
    name, uniform = f"ues-{width}", uniform_like(found, width)
    fresh: dict[str, tuple[Allocation, Start | None]] = {name: (uniform, start)}
    return fresh if same or widest is None else fresh | {name + FINETUNED: (uniform, widest)}


def finetunes(job: Retraining) -> bool:
    """Whether what is trained begins with the widest model. By default a uniform width that is asked for by name does
    not: it is what others are compared with.

    Raises:
        UserError: the wish names another beginning, too.
    """
    wish = job.wish
    if wish.finetune and wish.start:
        raise UserError(f"finetune begins with the widest model, start with {wish.start}. Give one of them")
    if wish.finetune is not None:
        return wish.finetune
    by_name = (wish.allocation or job.run.config.model.allocation).startswith("ues-")
    return not wish.start and not by_name and by_default(job.run.config)


def planned(job: Retraining, widest: Start | None) -> dict[str, tuple[Allocation, Start | None]]:
    """Name -> allocation and beginning of each model of the wish.

    Args:
        widest: what is fine-tuned begins with; uniform widths beside it are trained in both ways. Where what was found
            is the uniform width itself, it is that one fine-tuned, and from fresh weights it stands beside it.

    Raises:
        UserError: the name of the result is that of a uniform width beside it.
    """
    wish, found = job.wish, job.found
    assert isinstance(found, Allocation)  # groups are their method's
    name = job.name
    if widest is not None and not wish.name and name.startswith("ues-"):
        name += FINETUNED
    if wish.allocation == BRACKET:
        models = {f"ues-{w}": (uniform_like(found, w), job.start) for w in bracket(found)}
        return models | ({n + FINETUNED: (a, widest) for n, (a, _) in models.items()} if widest else {})
    others = beside(found, widest, job.start) if wish.or_uniform else {}
    if name in others:
        raise UserError(f"--name {name} is that of the uniform width which is trained beside it. Give another")
    return {name: (found, widest or job.start), **others}


def retrain_models(job: Retraining) -> Results:
    """Train what was found, or what the wish puts in its place or beside it; with ``or_uniform`` choose one of them, in
    ``final.json``."""
    wish, found = job.wish, job.found
    widest = None
    if finetunes(job):
        beside = f"{FOLDER}-{job.name}{job.suffix}"
        widest = widest_start(job.run, job.run_dir, beside, retrain_one)
    done = Trainings(job)
    for name, (allocation, start) in planned(job, widest).items():
        done.train(name, allocation, start)
    if wish.or_uniform:
        assert isinstance(found, Allocation)
        own, *uniform = done.answers
        kept = own
        if wish.widen:
            train = partial(_train_wider, done, widest)
            candidates, metric = job.run.config.search.candidates, job.run.config.train.metric
            agreed = job.run.context.share
            kept = climb(job.name, kept, found, candidates, train, done.labels, metric, widest is not None, agreed)
        _choose(done, kept, uniform, kept is own and is_uniform_of_budget(found))
    return done.results


class Trainings:
    """The trainings of one call, one after the other.

    Attributes:
        results: evaluations by the name of their directory.
        answers: where one model is to be chosen: what each answers to validation rows, whose labels are ``labels``.
    """

    def __init__(self, job: Retraining) -> None:
        self.job = job
        self.results: Results = {}
        self.answers: list[Trained] = []
        self.labels: Any = None

    def train(self, name: str, allocation: Allocation, start: Start | None) -> None:
        """Train and measure an allocation in ``RUN/retrain/NAME``."""
        run, job = self.job.run_in(name), self.job
        with mirroring(run.config, run.context):
            begin = job.begin if allocation is job.found else None
            try:
                task, result = retrain_one(run, allocation, run.dir, run.dir.name, start, begin)
            except Diverged as e:
                if not job.wish.or_uniform:
                    raise
                if run.context.rank == 0:
                    print(f"{run.dir.name} has diverged and will not be chosen: {e}", flush=True)
                size, unit = _size(allocation, run)
                self.answers.append(Trained(run.dir.name, size, np.array([np.nan]), unit))
                return
        self.results[run.dir.name] = result
        if job.wish.or_uniform:
            one, self.labels = _as_chosen_from(task, allocation, run)
            self.answers.append(one)


def _train_wider(done: Trainings, widest: Start | None, name: str, allocation: Allocation, fresh: bool) -> Trained:
    done.train(name, allocation, None if fresh else widest or done.job.start)
    return done.answers[-1]


def _as_chosen_from(task: SubnetTask, allocation: Allocation, run: Run) -> tuple[Trained, Any]:
    """A trained model as the choice sees it, and the labels of the validation split."""
    validation = run.stream("validation", run.config.train.eval_batch_size, shuffle=False)
    precision = getattr(run.config.search, "precision", "")
    with rounded_tables(task, allocation, precision, run.context) if precision else nullcontext():
        logits, labels = predictions(task, validation, run.context)
    size, unit = _size(allocation, run)
    return Trained(run.dir.name, size, logits, unit), labels


def _size(allocation: Allocation, run: Run) -> tuple[int, str]:
    """Of the tables, as the search counts them, and its unit in words."""
    precision = getattr(run.config.search, "precision", "")
    if not precision:
        return allocation.total("parameters"), "parameters"
    return allocation.total(served(precision)), f"bytes at {precision}{' precisions' * (precision == MIXED)}"


def _choose(done: Trainings, found: Trained, uniform: list[Trained], alike: bool) -> None:
    """``alike``: what was found is the uniform width, so that they differ by their beginning alone."""
    job = done.job
    if not uniform and found.diverged:
        raise UserError(f"{found.name} has diverged, and no uniform width fits its budget: {LOWER}", everywhere=True)
    final: dict[str, Any] = {"name": found.name, "fallback": False, "reason": "no other uniform width fits its budget"}
    if uniform:
        final = choose_of(found, uniform, done.labels, job.run.config.train.metric, alike)
        final["size"] = {m.name: m.size for m in done.answers}
    final["model"] = f"retrain/{final['name']}"
    file = job.run_dir / f"final{job.suffix}.json"
    whole = copy.deepcopy(job.run.config)
    whole.run.dir, whole.run.overwrite = str(job.run_dir), False
    with mirroring(whole, job.run.context):
        job.run.context.first("writing final.json", lambda: write_sealed(file, final))
    if job.run.context.rank == 0:
        print(f"final model: {final['reason']}")


def retrain_one(
    run: Run,
    allocation: Allocation,
    directory: Path,
    name: str,
    start: Start | None = None,
    begin: Callable[[Allocation, SubnetTask], None] | None = None,
) -> tuple[SubnetTask, dict[str, Any]]:
    """Train one allocation, from fresh weights, a ``start`` or what ``begin`` sets, and evaluate its best weights on
    the test split."""
    config, context = run.config, run.context
    make = partial(open_retraining, config, run.schema, allocation, directory, start)
    open_shared(context, directory, "opening the run directory", make)
    training = run.stream("train", config.train.batch_size, shuffle=True)
    validation = run.stream("validation", config.train.eval_batch_size, shuffle=False)
    test = run.stream("test", config.train.eval_batch_size, shuffle=False)
    first = partial(begin, allocation) if begin else None
    task = retrain(config, allocation, training, validation, context, directory, begin=first, start=start)
    result = evaluate_model(task, test, context, config, name, allocation)
    result |= as_served(task, allocation, test, "test", run)
    result |= {} if start is None else {"start": start.facts()}
    context.first("writing evaluation.json", lambda: write_sealed(directory / "evaluation.json", result))
    return task, result


def as_served(
    task: SubnetTask, allocation: Allocation, stream: BatchStream, split: str, run: Run, precision: str = ""
) -> dict[str, Any]:
    """``served``: the figures at a precision, by default ``search.precision``; nothing where neither is told."""
    precision = precision or getattr(run.config.search, "precision", "")
    if not precision:
        return {}
    return {"served": evaluate_served(task, allocation, precision, stream, split, run.context)}


def evaluate_single(
    run: Run, directory: Path, split: str, precision: str = "", wanted: Wanted | None = None
) -> dict[str, Any]:
    """Measure the model of one allocation in ``directory``, and leave the figures in :func:`evaluation_file`.

    Raises:
        UserError: nothing is trained there, or a file is damaged.
    """
    task, allocation, stream = _open_single(run, directory, split)
    result = evaluate_model(task, stream, run.context, run.config, directory.name, allocation, wanted)
    result |= as_served(task, allocation, stream, split, run, precision)
    if begun := read_record(directory):
        result["start"] = {key: begun[key] for key in begun if key not in DONE}
    return leave_evaluation(run.context, directory, split, result)


def predict_single(run: Run, directory: Path, split: str) -> Predictions:
    """Answers of the model of one allocation in ``directory``, in stored order."""
    task, _, stream = _open_single(run, directory, split)
    task.model.eval()
    return all_predictions(task.predict, stream.epoch(0), run.context).in_stored_order(run.context)


def _open_single(run: Run, directory: Path, split: str) -> tuple[SubnetTask, Allocation, BatchStream]:
    config, context = run.config, run.context
    with context.together("reading the allocation"):
        allocation = Allocation.load(directory / "allocation.json", run.schema)
    stream = run.stream(split, config.train.eval_batch_size, shuffle=False)
    return load_best(config, allocation, context, directory), allocation, stream


def leave_evaluation(
    context: Context, directory: Path, split: str, result: dict[str, Any], kind: str = ""
) -> dict[str, Any]:
    """Write the figures to :func:`evaluation_file`, and a difference to another model to :func:`difference_file`."""
    own = {k: v for k, v in result.items() if k != DIFFERENCE}

    def write() -> None:
        write_sealed(evaluation_file(directory, split, kind), own)
        if DIFFERENCE in result:
            body = {k: own[k] for k in ("name", "seed", "split", "rows")} | {"router": kind} | result[DIFFERENCE]
            write_sealed(difference_file(directory, body["against"], split, kind), body)

    context.first("writing the evaluation", write)
    return result


def difference_file(directory: Path, against: str, split: str, kind: str = "") -> Path:
    """Beside the evaluation: ``difference-to-ues-16.json``, with the split and ``kind`` in its name as there."""
    return directory / evaluation_file(directory, split, kind).name.replace("evaluation", f"difference-to-{against}", 1)


def evaluation_file(directory: Path, split: str, kind: str = "") -> Path:
    """``evaluation.json`` for the test split; another split, and ``kind`` of a model of several, are named in it."""
    parts = ["evaluation", *([] if split == "test" else [split]), *([kind] if kind else [])]
    return directory / f"{'-'.join(parts)}.json"
