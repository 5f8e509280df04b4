"""The method to begin with: width utilities under a budget, and the uniform width in their place where it is better.

A search can lose: on data that it has not been tried on, with a model it was not made for. So ``retrain.py`` trains the
widest uniform width that fits the same budget beside what was found, from fresh weights and, as what was found, from
the widest model. It compares them on the validation split, and says in ``final.json`` which one is to be used and why:
the better one by more than a standard error, of two that are level the smaller one
(:func:`embsearch_dist.methods.fallback.choose`).

A search can also stop short of its budget. Before that choice, wider allocations are trained as long as the budget
holds them and they pay (:mod:`embsearch_dist.methods.widening`).
"""

from __future__ import annotations

from dataclasses import replace

from embsearch_dist.methods.retraining import Results, Retraining
from embsearch_dist.methods.utilities.config import AutoConfig
from embsearch_dist.methods.utilities.method import Utilities


class Auto(Utilities):
    """Width utilities that fall back to a uniform width."""

    config = AutoConfig

    def retrain(self, job: Retraining) -> Results:
        wish = job.wish
        if not (wish.allocation or job.run.config.model.allocation or wish.best):
            job = replace(job, wish=replace(wish, or_uniform=True, widen=job.run.config.search.widen))
        return super().retrain(job)
