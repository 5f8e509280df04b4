"""The rows that subnets of a finished supernet are scored on, and the scorer that its backbone takes."""

from __future__ import annotations

from collections.abc import Sequence

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.sample import random_batches
from embsearch_dist.kernels.bfloat16 import multiplies_bfloat16
from embsearch_dist.methods.adass.config import AdassConfig
from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.methods.adass.scoring import Scoring
from embsearch_dist.methods.adass.supernet_stage import SupernetTask, load_supernet
from embsearch_dist.methods.adass.terms import sample_rows
from embsearch_dist.methods.adass.whole_scorer import WholeScorer
from embsearch_dist.methods.widest import first_rows, random_rows
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run

SAMPLE_SEED = 0x5EED  # beside run.seed: the scored rows are the same for all searches of a supernet
TRAINING_ROWS = 50_000


def make_scorer(run: Run[AdassConfig], task: SupernetTask | None = None) -> Scoring:
    """Load the finished supernet and look up the validation sample: rows drawn at random from the whole split, the
    same ones for any number of ranks.

    With several ranks each holds its share of the rows.
    """
    task = task or load_supernet(run)
    policy, context = run.config.search.policy, run.context
    batch = run.config.search.supernet.eval_batch_size
    shards = run.stream("validation", batch, shuffle=False).shards
    rows = _rows(run, task, shards.rows, policy.rows)
    with context.together("drawing the scored validation rows"):
        batches = random_batches(shards, rows, batch, _seed(run), context.rank, context.world_size)
    return _scorer(run, task, batches, policy.metric == "auc")


def training_rows(run: Run[AdassConfig], task: SupernetTask) -> list[Batch]:
    """This rank's share of about :data:`TRAINING_ROWS` training rows in random order."""
    rows = _rows(run, task, run.schema.rows["train"], TRAINING_ROWS)
    stream = random_rows(run, "train", rows, _seed(run), run.config.search.supernet.eval_batch_size)
    return list(first_rows(stream, rows))


def on_training_rows(run: Run[AdassConfig], task: SupernetTask, batches: Sequence[Batch]) -> Scoring:
    """A scorer of the same supernet on training rows; all ranks bring equally many batches."""
    return _scorer(run, task, batches, area=False)


def _rows(run: Run[AdassConfig], task: SupernetTask, there: int, wanted: int) -> int:
    backbone, table_width = task.model.bare_head.backbone, task.model.tables.mask.shape[1]
    return sample_rows(there, wanted, len(run.schema.fields), table_width, backbone, run.config.search.policy.cache_mb)


def _seed(run: Run[AdassConfig]) -> int:
    return run.config.run.seed * 7919 + SAMPLE_SEED


def _scorer(run: Run[AdassConfig], task: SupernetTask, batches: Sequence[Batch], area: bool) -> Scoring:
    policy, context = run.config.search.policy, run.context
    if not task.model.bare_head.additive:
        return WholeScorer(task.model, batches, context, area)
    precision = precision_on(context) if policy.precision == "auto" else policy.precision
    return SubnetScorer(task.model, batches, context, precision, policy.cache_mb, policy.refit, area)


def precision_on(context: Context) -> str:
    """Of the cached sums: ``bfloat16`` where it pays on all ranks."""
    return "bfloat16" if all(context.every(multiplies_bfloat16(context.device))) else "float32"
