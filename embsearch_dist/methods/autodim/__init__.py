"""AutoDim (Zhao et al. 2021): a width per field among candidates, by a relaxed choice that held-out rows train.

*AutoDim: Field-aware Embedding Dimension Search in Recommender Systems*, WWW 2021 (arXiv 2006.14827).
Field m has candidates d_1 < ... < d_T and a logit for each; its embedding is ::

    sum_t w_mt * BN(W_mt e_m[:d_t])

with the relaxed probabilities w (`gated/relaxed.py`), a linear map to the widest candidate per field and
candidate, and a BatchNorm without scale and shift, which makes magnitudes of candidates comparable.
Ordinary batches train tables, maps and head, every ``outer.every``-th a held-out batch the logits (first-order DARTS),
and then each field gets its most probable candidate and the model is trained from scratch.

Where this departs:

* Candidates are prefixes of one table (the paper's weight sharing), never tables of their own.
* First order by default. ``search.order second`` scores held-out rows after a virtual step of SGD, at the rate
  ``optim.dense_lr``, of maps and head (`gated/unrolled.py`); the paper's also moves the tables. Those stay as they are:
  their optimizer writes in backward, and a virtual step would be seen only by held-out rows that share a value with the
  training batch.
* Under a budget the widths are those of the largest product of probabilities among all that the budget holds (exact
  knapsack on log-probabilities); the paper has no budget. A candidate 0, which drops a field, may be given.
* Validation batches read running statistics of the BatchNorms and do not move them; the temperature falls by ordinary
  steps alone; there is no noise at evaluation; all ranks and all rows of a batch share the noise of a step.
* In the retrained model a field meets the others as ``model.transform`` says.
"""
