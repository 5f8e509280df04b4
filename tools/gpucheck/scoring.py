"""Check 12: how fast the search of AdaS&S scores candidates, and how much of it are the metrics."""

from __future__ import annotations

import statistics

import torch

from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.run import Run
from embsearch_dist.train.metrics import evaluate
from tools.gpucheck.data import Resident, criteo_schema
from tools.gpucheck.lab import Lab

APART = {"float32": 1e-4, "bfloat16": 5e-3}
"""Of the AUC: the scorer's bins of 1/1024, and what bfloat16 rounds away."""


def scorer(lab: Lab) -> None:
    """Candidates/s from cached activations in bfloat16; for one of them the AUC beside that of the model itself."""
    rows, per_pass = lab.pick(1024, 98_304), lab.pick(4, 64)
    with lab.opened() as context:
        schema = criteo_schema(lab.pick(100, 10_000))
        hidden = lab.pick([16, 8], [256, 128])
        config = lab.config(
            f"model.hidden={hidden}", "model.unified_width=16", "search.candidates=[0,4,8,16]", method="adass"
        )
        task = SupernetTask(Run(config, schema, context))
        task.model.eval()
        stream = Resident(schema, min(rows, 8192), -(-rows // 8192), lab.device)
        generator = torch.Generator().manual_seed(0)
        draw = torch.randint(4, (3 * per_pass, len(schema.fields)), generator=generator)
        keep = torch.ones(len(schema.fields), dtype=torch.bool, device=lab.device)
        choice = draw[0].to(lab.device)
        exact = evaluate(lambda b: task.model(b, choice, keep)[0], stream.batches, context)["auc"]
        for precision, tolerance in APART.items():
            found = SubnetScorer(task.model, stream.batches, context, precision)
            auc = found.score(draw[:1])[0]["auc"]
            lab.note(**{f"auc_apart_{precision}": abs(auc - exact)})
            lab.close(f"AUC of a candidate in {precision}", auc, exact, tolerance)
        passes = [draw[k * per_pass : (k + 1) * per_pass] for k in range(3)]
        todo = iter(passes)
        whole = statistics.median(lab.timed(lambda: found.score(next(todo)), 2))
        logits = statistics.median(lab.timed(lambda: found.logits(passes[0]), 2))
        lab.note(rows=rows, candidates_per_s=per_pass / whole, metrics_share=1 - logits / whole)
