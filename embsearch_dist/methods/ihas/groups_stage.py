"""Stage 2: group the rows by what they keep, and choose each group's widths (iHAS sections 3.4 and 3.5.2-3).

Leaves ``groups.json``, ``groups/router.json``, ``groups/assignment/<split>.npy`` (uint8 per row, stored order),
``groups/open.json`` and ``groups/group-K``, the rows of each group as an ordinary prepared data set. With one group:
``allocation.json``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embsearch_dist import written
from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.prepare.partition import write_group
from embsearch_dist.data.store.manifest import compare_ends, identity
from embsearch_dist.errors import UserError, script
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.grouped import GROUPS, GroupedAllocation, group_dir
from embsearch_dist.methods.ihas.config import IHASConfig
from embsearch_dist.methods.ihas.gates_stage import load_gates
from embsearch_dist.methods.ihas.kmeans import KMeans
from embsearch_dist.methods.ihas.router_by_centres import ROUTER, CentreRouter
from embsearch_dist.methods.stages import Stage
from embsearch_dist.run import Run
from embsearch_dist.schema import SPLITS, Schema
from embsearch_dist.train.monitor import Monitor

KEPT = "groups/kept.json"  # per group, 1 for each kept dimension of the search's tables
OPEN = "groups/open.json"  # per group, in which share of its rows each dimension of the search's tables is open
STATE = "groups/kmeans.json"  # of a clustering that is under way


class RowGroupStage(Stage[IHASConfig]):
    """Clusters, assigns, and writes each group's rows; the widths are for others to choose."""

    name = "groups"
    repeatable = True  # gates cost hours, groups minutes: another K or share to keep only clusters again

    def inputs(self, run: Run[IHASConfig]) -> dict[str, Any]:
        groups = {k: v for k, v in dataclasses.asdict(run.config.search.groups).items() if k != "keep"}
        return {"schema": run.schema.fingerprint, "run.seed": run.config.run.seed, "search.groups": groups}

    def lacks(self, run: Run[IHASConfig]) -> str:
        """A group whose rows are gone or are others: reads what opening them would read."""
        count = 0
        if (run.dir / GROUPS).exists():
            count = len(GroupedAllocation.load(run.dir / GROUPS, run.schema).allocations)
        elif (run.dir / OPEN).exists():
            count = len(read_open(run))
        for k in range(count if count > 1 else 0):
            place = group_dir(run.dir, k)
            try:
                identity(place, Schema.load(place))
                for split in SPLITS:
                    compare_ends(place, split)
            except UserError as e:
                return str(e).split(". ")[0]
        return ""

    def run(self, run: Run[IHASConfig]) -> None:
        search = run.config.search
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            monitor.resume_at(-1)
            run.context.first("clearing the groups", lambda: _clear(run.dir))
            clustering = Clustering(run, monitor)
            clustering.fit()
            assignment, sums, counts = clustering.settle()
            means = sums / counts[:, None].clamp(min=1)
            shown = torch.stack([m.view(-1, search.width).mean(1) for m in means], 1)
            monitor.heatmap(0, "kept", shown.numpy(), run.schema.names, [f"group {k}" for k in range(len(means))])
            body = {"open": means.tolist()}
            run.context.first("writing what is open", lambda: write_sealed(run.dir / OPEN, body))
            if len(means) > 1:
                self._write_rows(run, monitor, clustering, assignment, len(means))
            self.allocate(run, monitor, means)

    def allocate(self, run: Run[IHASConfig], monitor: Monitor, means: torch.Tensor) -> None:
        """Choose widths, once the rows are written.

        Args:
            means: ``[K, C]``, in which share of a group's training rows each dimension is open.
        """

    def _write_rows(
        self,
        run: Run[IHASConfig],
        monitor: Monitor,
        clustering: Clustering,
        assignment: dict[str, np.ndarray],
        count: int,
    ) -> None:
        context = run.context

        def keep() -> None:
            folder = run.dir / "groups" / "assignment"
            folder.mkdir(parents=True, exist_ok=True)
            for split, groups in assignment.items():
                _save(folder / f"{split}.npy", groups)
            write_sealed(run.dir / ROUTER, clustering.router.state())

        context.first("writing the assignment", keep)
        path = Path(run.config.data.path)
        mine = range(context.rank, count, context.world_size)
        with context.together("writing the groups"), monitor.progress(len(mine), "groups") as bar:
            for k in mine:
                write_group(path, run.schema, assignment, k, group_dir(run.dir, k), left_out=clustering.left_out)
                bar.update(1)
        for k, rows in enumerate(rows_of(run, count)):
            monitor.scalars(k, {f"rows_{split}": rows.get(split, 0) for split in SPLITS})


class GroupStage(RowGroupStage):
    """And chooses the widths of each group: the dimensions that are open in enough of its rows."""

    def inputs(self, run: Run[IHASConfig]) -> dict[str, Any]:
        search = run.config.search
        return {**super().inputs(run), "search.name": search.name, "search.groups.keep": search.groups.keep}

    def allocate(self, run: Run[IHASConfig], monitor: Monitor, means: torch.Tensor) -> None:
        search = run.config.search
        kept = torch.stack([kept_of(m, search.groups.keep) for m in means])
        widths = [widths_of(k, run.schema, search.width) for k in kept]
        leave_widths(run, monitor, widths, kept, {"method": "ihas", "name": search.name, "seed": run.config.run.seed})


def leave_widths(
    run: Run,
    monitor: Monitor,
    widths: Sequence[Mapping[str, int]],
    kept: torch.Tensor,
    provenance: dict[str, object],
    extra: int = 0,
) -> None:
    """Write the widths of each group as the result of a search: ``groups.json``, ``allocations/group-K.json`` and
    ``groups/kept.json``; ``allocation.json`` where there is one group. All ranks call it.

    Args:
        kept: ``[K, C]`` bool: which dimensions of the search's tables each group keeps, as many as its widths say.
        extra: columns beside the width (``ModelConfig.extra``), where they were counted.
    """
    context = run.context
    body = {"kept": kept.int().tolist()}
    context.first("writing what is kept", lambda: write_sealed(run.dir / KEPT, body))
    if len(widths) == 1:
        allocation = Allocation(run.schema, dict(widths[0]), provenance, extra)
        context.first("writing allocation.json", lambda: allocation.save(run.dir / "allocation.json"))
        rows: tuple[dict[str, int], ...] = (dict(run.schema.rows),)
    else:
        own = [Allocation(run.schema, dict(w), {**provenance, "group": k}, extra) for k, w in enumerate(widths)]
        rows = rows_of(run, len(widths))
        grouped = GroupedAllocation(run.schema, tuple(own), rows, provenance)
        for k, a in enumerate(own):
            context.first("writing an allocation", a.save, run.dir / f"allocations/group-{k}.json")
        context.first("writing groups.json", lambda: grouped.save(run.dir / GROUPS))
    for k, (w, r) in enumerate(zip(widths, rows, strict=True)):
        chosen = "  ".join(f"{n}={w[n]}" for n in run.schema.names)
        monitor.say(f"group {k}, {r.get('train', 0):,} training rows: {chosen}")
    monitor.say(f"next: {script('retrain')} --run {run.dir}")


def rows_of(run: Run, count: int) -> tuple[dict[str, int], ...]:
    """Rows of each of ``count`` groups by split, as their data sets say."""
    found: tuple[dict[str, int], ...] = ()
    with run.context.together("reading the groups"):
        found = tuple(dict(Schema.load(group_dir(run.dir, k)).rows) for k in range(count))
    return found


def read_open(run: Run) -> torch.Tensor:
    """``[K, C]`` float64: in which share of each group's rows each dimension of the search's tables is open.

    Raises:
        UserError: the rows are not grouped yet, or the file is damaged.
    """
    path = run.dir / OPEN
    body = read_sealed(path, "Run search.py again")
    try:
        columns = len(run.schema.fields) * run.config.search.width
        return torch.tensor(body["open"], dtype=torch.float64).view(-1, columns)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: does not say what the groups keep open ({e!r}). Run search.py again") from e


class Clustering:
    """K-means over the training rows, then the final groups of all rows."""

    def __init__(self, run: Run, monitor: Monitor) -> None:
        self.run, self.monitor, self.search = run, monitor, run.config.search
        g = self.search.groups
        columns = len(run.schema.fields) * self.search.width
        self.kmeans = KMeans(g.k, columns, run.context, run.config.run.seed)
        self.router = CentreRouter(load_gates(run), g.features, self.kmeans)
        self.left_out: dict[str, Any] = {}

    def fit(self) -> None:
        """Mini-batch passes, then exact ones; a killed clustering goes on with the pass it was in."""
        g, run, path = self.search.groups, self.run, self.run.dir / STATE
        if g.k == 1:
            return
        shuffled = run.stream("train", g.batch_size, shuffle=True)
        stored = run.stream("train", g.batch_size, shuffle=False)
        done = run.context.share(run.context.first("reading the clustering", lambda: _read(path, self.signature())))
        distances = [float(d) for d in done.get("distances", [])] if done else []  # none of an older version
        for n, distance in enumerate(distances):  # the stage's lines were forgotten: some may be of a pass that is lost
            self.monitor.scalars(n, {"distance": distance})
        if done:
            self.kmeans.load_state(done["kmeans"])
            self.router.scale = torch.tensor(done["scale"], dtype=torch.float32, device=run.context.device)
        else:
            first = next(iter(shuffled.epoch(0))).to(run.context.device)
            self.router.measure(first)
            self.kmeans.start(self.router.look(first)[0])
        for n in range(done["passes"] if done else 0, g.passes + g.exact):
            small = n < g.passes
            stream = shuffled if small else stored
            what = f"pass {n + 1} of {g.passes + g.exact}"
            with self.monitor.progress(stream.batches_per_epoch, f"batches ({what})") as bar:
                rows = self._rows(stream.epoch(n if small else 0), bar)
                if small:
                    errors = [self.kmeans.update(r) for r in rows]
                    error = sum(errors) / len(errors)
                else:
                    error = self.kmeans.lloyd(rows)
            distances.append(float(error))
            self.monitor.scalars(n, {"distance": distances[-1]})
            self.monitor.say(f"k-means, {what}: mean squared distance {error:.6g}")
            state = {**self.router.state(), "passes": n + 1, "distances": distances, "signature": self.signature()}
            run.context.first("saving the clustering", write_sealed, path, state)
        self.kmeans.order()

    def signature(self) -> dict[str, Any]:
        """What a clustering under way depends on."""
        return {"groups": dataclasses.asdict(self.search.groups), "seed": self.run.config.run.seed}

    def _rows(self, batches: Iterator[Batch], bar: Any) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield self.router.look(batch.to(self.run.context.device))[0]
            bar.update(1)

    def settle(self) -> tuple[dict[str, np.ndarray], torch.Tensor, torch.Tensor]:
        """Assign every row; groups too small to train on are dissolved, smallest first, until none is. The largest one
        gets number 0.

        Returns:
            split -> ``[rows]`` uint8 in stored order; per group the sums of its training rows' masks ``[K, C]``
            and their number ``[K]``, float64 on the CPU.
        """
        while True:
            groups, sums, counts = self._assign("train")
            assignment = {"train": groups, "validation": self._assign("validation")[0]}
            held_out = np.bincount(assignment["validation"], minlength=len(counts))
            small = [
                k
                for k in range(len(counts))
                if counts[k] < self.search.groups.min_rows or held_out[k] < self.run.context.world_size
            ]
            if not small or len(counts) == 1:
                break
            gone = min(small, key=lambda k: int(counts[k]))
            told, why = f"{int(counts[gone]):,} training rows", "search.groups.min_rows"
            if counts[gone] >= self.search.groups.min_rows:
                told += f" and {held_out[gone]} validation rows"
                why = f"each of {self.run.context.world_size} rank(s) needs one"
            self.monitor.say(f"group {gone} has {told}: dissolved ({why})")
            self.kmeans.alive[gone] = False
            self.kmeans.order()
        if bool((counts[1:] > counts[:-1]).any()):
            # K-means has counted before its centres moved for the last time, and before groups were dissolved.
            self.kmeans.counts[: len(counts)] = counts.to(self.kmeans.counts.device)
            order = self.kmeans.order()[: len(counts)]
            sums, counts = sums[order], counts[order]
            number = np.argsort(order).astype(np.uint8)
            assignment = {split: number[groups] for split, groups in assignment.items()}
        assignment["test"] = self._assign("test")[0]
        return assignment, sums, counts

    def _assign(self, split: str) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        # Dead centres come last and get no rows.
        context, k, columns = self.run.context, max(1, int(self.kmeans.alive.sum())), self.kmeans.width
        stream = self.run.stream(split, self.search.groups.batch_size, shuffle=False)
        self.left_out[split] = stream.left_out
        sums = torch.zeros(k, columns, dtype=torch.float64, device=context.device)
        counts = torch.zeros(k, dtype=torch.float64, device=context.device)
        parts: list[np.ndarray] = []
        with self.monitor.progress(stream.batches_per_epoch, f"batches ({split} rows to groups)") as bar:
            for batch in stream.epoch(0):
                features, masks = self.router.look(batch.to(context.device))
                groups = self.kmeans.assign(features) if k > 1 else features.new_zeros(len(features)).long()
                one_hot = torch.nn.functional.one_hot(groups, k).to(features.dtype)
                sums += (one_hot.T @ masks).double()
                counts += one_hot.sum(0).double()
                # Ranks hold neighbouring slices of a global batch, so rank order is stored order.
                parts.append(context.gather(groups.to(torch.uint8)).cpu().numpy())
                bar.update(1)
        context.sum(sums), context.sum(counts)
        return np.concatenate(parts), sums.cpu(), counts.cpu()


def _save(path: Path, groups: np.ndarray) -> None:
    """Write an array in one step, and list it: it carries no checksum of its own."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        np.save(file, groups, allow_pickle=False)
    with written.listed(path, written.file_checksum(partial)):
        partial.replace(path)


def _clear(directory: Path) -> None:
    """Drop what an earlier clustering found, so that its result cannot be taken for this one's."""
    for name in (GROUPS, "allocation.json", ROUTER, KEPT, OPEN):
        (directory / name).unlink(missing_ok=True)


def kept_of(means: torch.Tensor, keep: float) -> torch.Tensor:
    """Which dimensions a group keeps, ``[C]`` bool: those open in more than ``keep`` of its rows.

    A group that would keep nothing keeps the one that is open most often: there is no model without input.

    Args:
        means: ``[C]``, share of rows in which each dimension is open.
    """
    kept = means > keep
    if not kept.any():
        kept[means.argmax()] = True
    return kept


def widths_of(kept: torch.Tensor, schema: Schema, width: int) -> dict[str, int]:
    """Width of each field: how many of its dimensions are kept; ``kept [F * width]``."""
    counts = kept.view(len(schema.fields), width).sum(1).tolist()
    return dict(zip(schema.names, counts, strict=True))


def _read(path: Path, signature: dict[str, Any]) -> dict[str, Any] | None:
    """A clustering under way; None when there is none, or one with other settings."""
    if not path.exists():
        return None
    body = read_sealed(path)
    try:
        return body if body["signature"] == signature else None
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: not a saved clustering ({e!r}). Delete it") from e
