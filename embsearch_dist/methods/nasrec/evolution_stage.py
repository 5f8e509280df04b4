"""Stage 2: evolution over the supernet's candidates; leaves ``architecture.json``."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embsearch_dist.config.settings import flatten
from embsearch_dist.errors import script
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.evolution import Candidate, Evolution, Limits
from embsearch_dist.methods.nasrec.latency import FILE, LatencyTable, table_of
from embsearch_dist.methods.nasrec.prefilter import prefilter
from embsearch_dist.methods.nasrec.scoring import Score, Scorer
from embsearch_dist.methods.nasrec.supernet_stage import SupernetStage
from embsearch_dist.methods.stages import Stage
from embsearch_dist.networks.architecture import RESULT, Architecture
from embsearch_dist.networks.cost import network_cost
from embsearch_dist.networks.space import Space
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor

STAGE = "evolution"
HISTORY = "evolution.json"


class EvolutionStage(Stage[NASRecConfig]):
    """Scores candidates, spread over ranks, generation by generation; continues with the one that was under way."""

    name = STAGE
    repeatable = True

    def inputs(self, run: Run[NASRecConfig]) -> dict[str, Any]:
        search = run.config.search
        own = {"search.name": search.name, "search.scoring": search.scoring, "search.evolution": search.evolution}
        own |= {"search.prefilter": search.prefilter}
        return {**SupernetStage().inputs(run), **own, **_norms(run)}

    def run(self, run: Run[NASRecConfig]) -> None:
        search = run.config.search
        evolution = Evolution(search.space.make(), search.evolution, run.config.run.seed)
        path, signature = run.dir / HISTORY, self.signature(run)
        body = run.context.share(run.context.first("reading the search", lambda: _read(path, signature)))
        if body:
            evolution.load_json(body, str(path))
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            monitor.resume_at(evolution.generation - 1)
            if body:
                monitor.say(f"continuing with generation {evolution.generation} ({len(evolution.seen):,} scored)")
            self._search(run, evolution, monitor, signature)
            self._leave(run, evolution, monitor)

    def signature(self, run: Run[NASRecConfig]) -> dict[str, Any]:
        """What a search under way depends on."""
        search = run.config.search
        own = {"scoring": dataclasses.asdict(search.scoring), "evolution": dataclasses.asdict(search.evolution)}
        if not search.evolution.limited:  # as a search says that was begun before there were limits
            own["evolution"] = {k: v for k, v in own["evolution"].items() if k not in ("cost_at_most", "cost_at_least")}
        if search.prefilter.proxies:
            own["prefilter"] = dataclasses.asdict(search.prefilter)
        own |= _norms(run)
        supernet = json.dumps(flatten(SupernetStage().inputs(run)), sort_keys=True, default=str)
        return {**own, "space": search.space.make().to_json(), "supernet": supernet}

    def _search(
        self, run: Run[NASRecConfig], evolution: Evolution, monitor: Monitor, signature: dict[str, Any]
    ) -> None:
        if evolution.over:
            return
        c = evolution.config
        table = table_of(run, evolution.space, evolution.generation > 0) if c.cost == "latency" else None
        if table is not None:
            monitor.say(f"latencies are predicted within {table.error:.0%} (median; {FILE}, {table.where})")
        evolution.limits = limits_of(run, evolution.space, table)
        if not evolution.generation and run.config.search.prefilter.proxies:
            evolution.start = prefilter(run, evolution.space, monitor, evolution.limits)
        scorer = Scorer(run, table)
        monitor.say(scorer.rows_in_words())
        total = c.population + c.generations * c.children
        with monitor.progress(total, "candidates", initial=len(evolution.seen)) as bar:
            while not evolution.over:
                proposed = evolution.propose()
                scores = self._score(run, scorer, [a for a, _ in proposed])
                evolution.record(proposed, scores)
                alive = [evolution.seen[i] for i in evolution.population]
                values = {
                    "best": evolution.best(1)[0].fitness,
                    "population_mean": statistics.fmean(x.fitness for x in alive),
                    "population_best": min(x.fitness for x in alive),
                    "flops_mean": statistics.fmean(x.score.flops for x in alive),
                }
                # Before the state: of a generation that is not saved a continued search drops the line again.
                monitor.scalars(evolution.generation - 1, values)
                state = {"signature": signature, **evolution.to_json()}
                run.context.first("saving the search", write_sealed, run.dir / HISTORY, state)
                bar.update(len(proposed), loss=values["best"])

    def _score(self, run: Run[NASRecConfig], scorer: Scorer, architectures: Sequence[Architecture]) -> list[Score]:
        """Each rank scores its share; all get all scores, in order."""
        context = run.context
        own: dict[int, tuple[Any, ...]] = {}
        with context.together("scoring candidates"):
            for place in range(context.rank, len(architectures), context.world_size):
                own[place] = dataclasses.astuple(scorer(architectures[place]))
        found = {place: score for part in context.every(own) for place, score in part.items()}
        return [Score(*found[place]) for place in range(len(architectures))]

    def _leave(self, run: Run[NASRecConfig], evolution: Evolution, monitor: Monitor) -> None:
        search = run.config.search
        best, space = evolution.best(search.evolution.keep), evolution.space

        def provenance(candidate: Candidate, rank: int) -> dict[str, Any]:
            own = {"method": "nasrec", "name": search.name, "seed": run.config.run.seed, "rank": rank}
            return {**own, "fitness": candidate.fitness, **dataclasses.asdict(candidate.score)}

        def save() -> None:
            folder = run.dir / "architectures"
            folder.mkdir(exist_ok=True)
            for old in folder.glob("rank-*.json"):
                old.unlink()
            for rank, c in enumerate(best, 1):
                c.architecture.save(folder / f"rank-{rank}.json", space=space.to_json(), provenance=provenance(c, rank))
            best[0].architecture.save(run.dir / RESULT, space=space.to_json(), provenance=provenance(best[0], 1))
            cost = search.evolution.cost if search.evolution.cost != "none" else "flops"
            front = [dataclasses.asdict(c.score) | {"key": c.key} for c in evolution.pareto(cost)]
            write_sealed(run.dir / "pareto.json", {"cost": cost, "front": front})

        run.context.first("writing what was found", save)
        for rank, c in enumerate(best[:3], 1):
            monitor.say(
                f"{rank}: logloss {c.score.logloss:.5f}, {c.score.flops / 1e6:.2f} MFLOPs (generation {c.generation})"
            )
        monitor.say(f"{len(evolution.seen):,} candidates; next: {script('retrain')} --run {run.dir}")


def limits_of(run: Run[NASRecConfig], space: Space, table: LatencyTable | None = None) -> Limits | None:
    """What the config lets a network cost, as its score says; None: there are no limits, or no ``table`` that predicts
    the latencies that they are of."""
    c, columns, fields = run.config.search.evolution, len(run.schema.dense), len(run.schema.fields)
    if not c.limited or (c.cost == "latency" and table is None):
        return None

    def cost(architecture: Architecture) -> float:
        if table is not None:
            return table.predict(architecture, space, columns, fields)
        return float(getattr(network_cost(architecture, space, columns, fields).total, c.cost))

    return Limits(c, cost)


def _norms(run: Run[NASRecConfig]) -> dict[str, Any]:
    """Which LayerNorms the networks have that a search times or ranks by proxies. Nothing where it builds none, and
    nothing by default: a search of an older version did not tell."""
    search, kept = run.config.search, run.config.model.layer_norm
    builds = search.evolution.cost == "latency" or bool(search.prefilter.proxies)
    return {"networks.layer_norm": kept} if builds and kept != "attention" else {}


def _read(path: Path, signature: dict[str, Any]) -> dict[str, Any] | None:
    """A search under way with the same settings; None when there is none."""
    body = read_sealed(path, "Delete it to search anew") if path.exists() else None
    return body if isinstance(body, dict) and body.get("signature") == signature else None
