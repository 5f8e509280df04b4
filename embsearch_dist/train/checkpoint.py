"""Checkpoints: DCP for tensors, JSON for the rest, a manifest of checksums written last.

Layout: ``<root>/step-N/{data/*, state.json, manifest.json}``. A save writes into ``step-N.partial`` and
renames it when the manifest is there; what is to go is renamed to ``.old`` first. So a directory
``step-N`` is whole unless something outside this program damaged it, and that the checksums tell before
anything is read. A damaged one is set aside as ``step-N.damaged`` when training goes on from an older one.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.optimizer import Optimizer

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, read_sealed, write_json, write_sealed
from embsearch_dist.models.model import CTRModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.stores import mirror
from embsearch_dist.train import manifest
from embsearch_dist.train.faults import Faults
from embsearch_dist.train.manifest import verify
from embsearch_dist.train.tensors import HostMemory, check_parts, copies, hearing_signals, local_bytes, tensors_of

__all__ = ["Checkpointer", "SaveError", "verify"]

SPARE_MEMORY = 1.5  # a save in the background wants this many times its copy to be free


class SaveError(UserError):
    """A checkpoint could not be written; the ones before are as they were. All ranks raise it alike."""

    def __init__(self, step: int, text: str, disk: bool = False) -> None:
        """``disk``: the system refused to write, so that room on the disk may be what is lacking."""
        super().__init__(text, everywhere=True)
        self.step, self.disk = step, disk


class Checkpointer:
    """Saves and restores a model, its optimizers and a JSON-able state under ``root``.

    The last ``keep`` checkpoints and the best one stay.
    """

    def __init__(
        self,
        root: Path,
        model: CTRModel,
        head_optimizer: Optimizer | None,
        context: Context,
        keep: int = 2,
        *,
        schema: str = "",
        data: str = "",
        settings: dict[str, Any] | None = None,
        faults: Faults | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            head_optimizer: None for a model that is only read; nothing can be saved then.
            schema, data, settings: what the manifest records and compares, see ``manifest.facts_of``.
            say: shows a line to the user.
        """
        self.root, self.model, self.optimizer, self.context, self.keep = root, model, head_optimizer, context, keep
        self.schema, self.data, self.settings = schema, data, settings or {}
        self.faults, self.say = faults, say
        self._thread: threading.Thread | None = None
        self._step = 0
        self._failure: BaseException | None = None
        self._group: dist.ProcessGroup | None = None
        self._told = False
        self._memory = HostMemory()

    def save(self, step: int, state: dict[str, Any], best: bool = False, background: bool = False) -> Path:
        """Write ``step-N``; it counts from the moment it has its name.

        Args:
            best: mark it as the best one.
            background: copy the tensors and return; a thread writes, hashes and seals. Call ``wait``
                before: what went wrong with an earlier save is told there.

        Raises:
            SaveError: it could not be written; nothing of it is left, and older checkpoints are as they were.
        """
        self.wait()
        final, partial = self.root / f"step-{step}", self.root / f"step-{step}.partial"
        self._step = step
        self._together(step, lambda: self._begin(partial) if self.context.rank == 0 else None)
        tensors = self._tensors()
        if background and self._may_copy(tensors):
            if self._group is None:
                # Its collectives run beside those of training, so they need a group of their own.
                self._group = dist.new_group(backend="gloo")
            tensors, state = copies(tensors, self._group, self._memory), copy.deepcopy(state)
            arguments = (tensors, state, partial, final, best)
            self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
            return final
        try:
            self._write(tensors, partial, self.context.group)
        except CheckpointException as e:  # DCP tells all ranks
            self._fail(step, _reasons(e), e)
        self._together(step, lambda: self._seal(partial, final, state, best))
        return final

    def wait(self) -> int | None:
        """Wait for a save in the background, on all ranks; its step if there was one.

        Raises:
            SaveError: it failed, on whatever rank.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None

        def outcome() -> None:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise UserError(_text(failure)) from failure

        self._together(self._step, outcome)
        return self._step

    def close(self, seconds: float = 10) -> None:
        """Give a save in the background time to end when this process must leave; tells nothing."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def _work(self, tensors: Any, state: dict[str, Any], partial: Path, final: Path, best: bool) -> None:
        try:
            self._write(tensors, partial, self._group)
            self._seal(partial, final, state, best)
        except BaseException as e:  # told by wait()
            self._failure = e

    def _may_copy(self, tensors: Any) -> bool:
        """Whether every rank has the memory for a copy; without it a save must not run beside training."""
        need = local_bytes(tensors) - self._memory.bytes  # that much is there from the save before
        local = self.context.world_size  # at most so many ranks share this machine's memory
        lacking = psutil.virtual_memory().available < need * SPARE_MEMORY * local
        some = float(self.context.sum(torch.tensor([float(lacking)], device=self.context.device))) > 0
        if some and not self._told:
            self._told = True
            self.say(
                f"checkpoints are written while training waits: a copy of {need / 1e6:,.0f} MB per rank does not fit "
                "into the free memory (train.async_save)"
            )
        return not some

    def _begin(self, partial: Path) -> None:
        for leftover in [partial, *self.root.glob("step-*.old")]:
            _remove(leftover)
        self._fault("begin")

    def _write(self, tensors: Any, partial: Path, group: Any) -> None:
        writer = dcp.FileSystemWriter(partial / "data", sync_files=False)
        dcp.save(tensors, storage_writer=writer, process_group=group)

    def _seal(self, partial: Path, final: Path, state: dict[str, Any], best: bool) -> None:
        """What comes after the tensors: rank 0 does it, the others only have their faults."""
        self._fault("data")
        if self.context.rank != 0:
            return
        check_parts(partial / "data")
        write_json(partial / "state.json", state)
        self._fault("state")
        manifest.write_manifest(partial, self._facts(self._step))
        self._fault("manifest")
        _remove(final)
        partial.rename(final)
        self._fault("rename")
        marked = self.best()
        for old in self.steps()[: -self.keep]:
            if old != marked:
                _remove(self.root / f"step-{old}")
        self._fault("prune")
        if best:
            write_sealed(self.root / "best.json", {"step": self._step})
        mirror.changed(self.root)

    def _fault(self, point: str) -> None:
        if self.faults is not None:
            self.faults.in_save(point, self._step)

    def _together(self, step: int, part: Callable[[], None]) -> None:
        """Run a part of a save without collectives; where it fails, all ranks raise ``SaveError``."""
        try:
            with self.context.together("writing a checkpoint"):
                try:
                    part()
                except Exception as e:
                    raise UserError(_text(e)) from e
        except UserError as e:
            self._fail(step, str(e), e)

    def _fail(self, step: int, reason: str, cause: BaseException) -> None:
        if self.context.rank == 0:
            shutil.rmtree(self.root / f"step-{step}.partial", ignore_errors=True)  # it may hold what the disk lacks
        kept = self.steps()
        last = f"the last whole one is {self.root}/step-{kept[-1]}" if kept else "there is none yet"
        free = shutil.disk_usage(_existing(self.root)).free
        text = f"checkpoint {self.root}/step-{step} could not be written: {reason}"
        # The text of an OSError tells its kind, on ranks that only heard of it too.
        disk = "[Errno" in reason
        room = f" ({free / 1e6:,.0f} MB are free there)" if disk else ""
        raise SaveError(step, f"{text}{room}; {last}", disk) from cause

    def mark_best(self, step: int) -> None:
        """Remember ``step`` as the best checkpoint; it is kept."""
        self.context.first("marking the best checkpoint", lambda: write_sealed(self.root / "best.json", {"step": step}))

    def best(self) -> int | None:
        path = self.root / "best.json"
        if not path.exists():
            return None
        mend = "Delete it and give the command of the training again"
        try:
            return int(read_sealed(path, mend)["step"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path}: names no checkpoint. {mend}") from e

    def steps(self) -> list[int]:
        """Steps of checkpoints that have a manifest, ascending."""
        return [n for n in self._numbers() if (self.root / f"step-{n}" / manifest.NAME).exists()]

    def newest(self) -> int | None:
        """Step of the newest checkpoint, whole or not."""
        return max(self._numbers(), default=None)

    def _numbers(self) -> list[int]:
        names = [p.name.removeprefix("step-") for p in self.root.glob("step-*")]
        return sorted(int(n) for n in names if n.isascii() and n.isdigit())

    def newest_whole(self) -> int | None:
        """Step of the newest checkpoint that is whole to the byte, on every rank; None where nothing was saved.

        Newer ones that are damaged are named and set aside.

        Raises:
            UserError: there are checkpoints, and none of them is whole.
        """
        found: dict[str, Any] = self.context.share(self.context.first("checking the checkpoints", self._look) or {})
        for problem in found["problems"]:
            self.say(f"{problem}; set aside as {found['names'].pop(0)}, going back to the checkpoint before")
        return found["step"]

    def _look(self) -> dict[str, Any]:
        problems: list[str] = []
        damaged: list[Path] = []
        for number in reversed(self._numbers()):
            path = self.root / f"step-{number}"
            try:
                verify(path)
            except UserError as e:
                problems.append(str(e))
                damaged.append(path)
                continue
            aside = [p.with_name(f"{p.name}.damaged") for p in damaged]
            for old, new in zip(damaged, aside, strict=True):
                _remove(new)
                old.rename(new)
            return {"step": number, "problems": problems, "names": [p.name for p in aside]}
        if problems:
            raise UserError(
                f"no whole checkpoint is left under {self.root}: {problems[0]}. Restore it from a copy, or delete "
                f"{self.root} to train from the beginning"
            )
        return {"step": None, "problems": [], "names": []}

    def is_whole(self, step: int) -> bool:
        """Whether ``step-N`` is there and undamaged; the same answer on every rank."""

        def look() -> bool:
            try:
                verify(self.root / f"step-{step}")
            except UserError:
                return False
            return True

        return bool(self.context.share(self.context.first("checking a checkpoint", look)))

    def load(self, step: int, optimizers: bool = True, checked: bool = False) -> dict[str, Any]:
        """Restore ``step-N``; returns the JSON state.

        Args:
            optimizers: their state too. Without it, any number of ranks and any sharding will do.
            checked: its bytes were compared with the manifest just now.

        Raises:
            UserError: a file is missing, truncated or differs from its checksum (named), the checkpoint
                was made for something else, or it lacks state that this run's optimizers need.
        """
        directory = self.root / f"step-{step}"
        if not checked:
            self.context.first("checking a checkpoint", lambda: verify(directory))
        old, new = manifest.read_manifest(directory), self._facts(step)
        manifest.check_facts(directory, old, new, exact=optimizers)
        other = "" if manifest.same_spread(old, new) else f" (made with {manifest.spread(old)})"
        tensors = self._tensors(optimizers)
        reader = dcp.FileSystemReader(directory / "data")
        self._check_weights(directory, reader, tensors["head"])
        try:
            with hearing_signals():
                dcp.load(tensors, storage_reader=reader, process_group=self.context.group)
        except (CheckpointException, ValueError) as e:
            raise UserError(
                f"checkpoint {directory} of {old['world_size']} rank(s) does not fit this run of "
                f"{manifest.spread(new)}{other}: {_reasons(e)}. Continue with the number of ranks, sharding and "
                "optimizer it was made with"
            ) from e
        self.model.replicated.load_state_dict(tensors["head"])
        if other and optimizers:
            self.say(f"{directory} goes on with {manifest.spread(new)}{other}: sums may differ in the last digits")
        return read_json(directory / "state.json")

    def _check_weights(self, directory: Path, reader: dcp.FileSystemReader, own: dict[str, Any]) -> None:
        """Refuse weights that this model has no place for: torch would leave them out without a word."""
        saved = {n.removeprefix("head.") for n in reader.read_metadata().state_dict_metadata if n.startswith("head.")}
        if more := sorted(saved - set(own)):
            raise UserError(
                f"checkpoint {directory} is of another model: it also has {', '.join(more[:3])} ({len(more)} weights "
                "that this one lacks). Put the model.* settings back that it was trained with (a NASRec network with "
                "all its LayerNorms needs --model.layer_norm all)"
            )

    def _facts(self, step: int) -> dict[str, Any]:
        kinds = self.model.sharded.kinds
        return manifest.facts_of(step, self.context.world_size, kinds, self.schema, self.settings, self.data)

    def _tensors(self, optimizers: bool = True) -> dict[str, Any]:
        return tensors_of(self.model, self.optimizer, optimizers)


def _reasons(error: BaseException) -> str:
    if not isinstance(error, CheckpointException):
        return _text(error)
    return "; ".join(sorted({_text(failure[0]) for failure in error.failures.values()}))


def _text(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return _reasons(error)
    return str(error) if isinstance(error, UserError | OSError | ValueError) else f"{error!r}".split("\\n")[0]


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _remove(path: Path) -> None:
    """Delete a directory; it loses its name first, so that a kill halfway leaves nothing that looks whole."""
    if path.exists():
        gone = path if path.suffix in (".old", ".partial") else path.with_name(f"{path.name}.old")
        if gone != path:
            if gone.exists():
                shutil.rmtree(gone)
            path.rename(gone)
        shutil.rmtree(gone)
