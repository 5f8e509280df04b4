"""The stages of a search: which are done, which go on, which were made with other settings.

A stage leaves ``stages/<name>.json`` in the run directory. Marked *done* with the same inputs it is
skipped; marked *running* it continues from its own checkpoints. A stage whose inputs changed is run again
when that is cheap (``repeatable``), and is an error that names the changed keys otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol

from embsearch_dist import written
from embsearch_dist.config.sections import SAFETY_KEYS, S, TrainConfig
from embsearch_dist.config.settings import changed_settings, flatten, tell_changed
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.run import Run
from embsearch_dist.schema import differs
from embsearch_dist.stores import mirror
from embsearch_dist.train.lines import compare_lines, lines_of


class Stage(ABC, Generic[S]):
    """One step of a search of a method whose settings are ``S``. A ``repeatable`` stage is cheap: with changed inputs
    it just runs again."""

    name: ClassVar[str]
    repeatable: ClassVar[bool] = False

    def inputs(self, run: Run[S]) -> dict[str, Any]:
        """Everything the result depends on, JSON-able; compared with what an earlier run used. Here: the fields, the
        seed and the whole ``search`` section, for a stage that trains nothing."""
        return {"schema": run.schema.fingerprint, "run.seed": run.config.run.seed, "search": run.config.search}

    @abstractmethod
    def run(self, run: Run[S]) -> None:
        """Do the work, on every rank; continue from checkpoints if there are any."""

    def lacks(self, run: Run[S]) -> str:
        """What of a finished stage is lost beside the files that its mark lists, in words; rank 0 calls this."""
        return ""


class Staged(Protocol):
    """What has stages: a method."""

    def stages(self) -> list[Stage]: ...

    def check(self, run: Run) -> None: ...


def check_stages(method: Staged, run: Run) -> None:
    """Find out whether the stages can run at all, on every rank, before anything is written.

    Raises:
        UserError: a setting is impossible for this data, or the run directory holds a stage that was made
            with other settings and is too costly to be repeated without being asked.
    """
    with run.context.together("checking the settings"):
        method.check(run)
        for stage in method.stages():
            inputs, old = inputs_of(stage, run), read_mark(run, stage)
            keys = changed(old["inputs"], inputs, run) if old else []
            if old and keys and not stage.repeatable and not run.config.run.overwrite:
                if keys == ["data"]:
                    raise UserError(_other_data(run, stage.name, old["inputs"]["data"]))
                raise UserError(_changed(run.dir, stage.name, tell_changed(old["inputs"], inputs, keys)))


def run_stages(method: Staged, run: Run) -> None:
    """Run what is not done yet.

    Everything is checked once more first: a caller that has opened the run directory meanwhile, or has
    forgotten :func:`check_stages`, must not train over a stage made with other settings.

    Raises:
        UserError: what :func:`check_stages` finds.
    """
    check_stages(method, run)
    for stage in method.stages():
        mark = run.dir / "stages" / f"{stage.name}.json"
        inputs, old = inputs_of(stage, run), read_mark(run, stage)
        same = old and not changed(old["inputs"], inputs, run)
        if old and old["state"] == "done" and same and not _lost(run, stage, old):
            if run.context.rank == 0:
                print(f"stage {stage.name}: done before, skipped", flush=True)
            continue
        # Everybody has compared the mark before rank 0 touches it.
        run.context.share(None)
        body = {"state": "running", "inputs": inputs}
        run.context.first("marking a stage", write_sealed, mark, body)
        begun = len(written.log())
        stage.run(run)
        run.context.first("marking a stage", _finish, run, stage, mark, inputs, begun)


def read_mark(run: Run, stage: Stage) -> dict[str, Any] | None:
    """What ``stages/<name>.json`` says: state and inputs; None when the stage was never begun.

    Raises:
        UserError: it was changed or cannot be read.
    """
    path = run.dir / "stages" / f"{stage.name}.json"
    if not path.exists() and not path.is_symlink():
        return None
    mend = "Delete it: the stage goes on from its checkpoints then"
    body = read_sealed(path, mend)
    if not isinstance(body.get("inputs"), dict) or not isinstance(body.get("state"), str):
        raise UserError(f"{path}: not the mark of a stage. {mend}")
    return body


def training_inputs(run: Run, key: str, training: TrainConfig, *later: str) -> dict[str, Any]:
    """What every training inside a search depends on.

    Args:
        key: of the section ``training``.
        later: its keys that say what is read of the result later, not what it is.
    """
    c = run.config
    return {
        "schema": run.schema.fingerprint,
        "run.seed": c.run.seed,
        "data.window_rows": c.data.window_rows,
        "optim": c.optim,
        key: {k: v for k, v in vars(training).items() if k not in (*SAFETY_KEYS, *later)},
    }


def inputs_of(stage: Stage, run: Run) -> dict[str, Any]:
    """What a stage's mark remembers: its inputs, flat, and the data they were read from."""
    return flatten(stage.inputs(run)) | ({"data": run.schema.data} if run.schema.data else {})


def changed(old: dict[str, Any], new: dict[str, Any], run: Run) -> list[str]:
    """Keys of a mark that differ; data that one of them does not tell are not compared."""
    keys = [k for k in changed_settings(old, new, type(run.config.search)) if k != "data"]
    return keys + (["data"] if differs(old.get("data", ""), new.get("data", "")) else [])


def _finish(run: Run, stage: Stage, mark: Path, inputs: dict[str, Any], begun: int) -> None:
    """Mark a stage as done, with the files it has left and what its curves are. Checkpoints are not among them: who
    deletes them to save room wants nothing trained again."""
    home = run.dir.absolute()
    left = {p.absolute() for p in written.log()[begun:] if p.exists()}
    names = {str(p.relative_to(home)) for p in left if p.is_relative_to(home)} - {"schema.json"}
    # Whoever reads a config.yaml checks it by the checksum in its last line.
    own = (n for n in names if Path(n).name != "config.yaml" and "checkpoints" not in Path(n).parts)
    files = sorted(n for n in own if not n.startswith("stages/"))
    body = {"state": "done", "inputs": inputs, "files": files, "lines": lines_of(run.dir, stage.name)}
    write_sealed(mark, body)
    mirror.changed(run.dir)


def _lost(run: Run, stage: Stage, mark: dict[str, Any]) -> bool:
    """Whether something that a finished stage has left is gone or damaged; said on rank 0, the same on all ranks."""

    def look() -> str:
        for name in mark.get("files", []):
            path = run.dir / name
            if not path.exists():
                return f"{path} is gone"
            try:
                read_sealed(path) if path.suffix == ".json" else written.check_file(path, "")
            except (UserError, OSError) as e:
                return str(e).split(". ")[0]
        return stage.lacks(run)

    found = str(run.context.share(run.context.first("looking at what a stage has left", look)) or "")
    if found and run.context.rank == 0:
        print(f"stage {stage.name}: {found}; made again", flush=True)
    elif run.context.rank == 0:
        for text in compare_lines(run.dir, stage.name, mark.get("lines")):
            print(text, flush=True)
    return bool(found)


def _other_data(run: Run, stage: str, before: str) -> str:
    return (
        f"run directory {run.dir} holds stage {stage!r} that was made from data {before}, {run.config.data.place} is "
        f"{run.schema.data}: the same fields, but other rows or ids. Give the data it was made from (--data.path), use "
        "another --run.dir, or start anew with --run.overwrite true"
    )


def _changed(directory: Path, stage: str, shown: str) -> str:
    return (
        f"run directory {directory} holds stage {stage!r} made with other settings: {shown}. "
        "Use another --run.dir, put the settings back, or start anew with --run.overwrite true"
    )
