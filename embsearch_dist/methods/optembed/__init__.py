"""OptEmbed (Lyu et al. 2022): a supernet of prefixes drawn row by row, and an evolution over the widths of the fields.

*OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction*, CIKM 2022 (arXiv 2208.04482), and the
authors' published code. In training, every row and field draws a width uniform on 1, ..., d, and the columns behind it
are 0 for that row. Evolution then looks for the widths of the highest validation AUC of these weights: the ``keep``
best of a population are parents of ``mutations`` (each field redrawn with a probability) and ``crossovers`` (the first
fields of one parent, the others of another). The model of the best widths is trained from scratch.

Where this departs:

* The first half of the paper, which drops rows of tables, is an option: with ``thresholds`` a row is closed unless
  ``||e||_1`` is above a threshold of its field, learned with a surrogate gradient of the step. The published code has
  SGD for the thresholds; here the dense optimizer trains them, at ``threshold_lr``. Values that are not kept share row
  0 afterwards (:mod:`embsearch_dist.kept_values`); as published their embedding is zero. Widths are paid for by the
  rows that are kept. In a field of lists the pooled embedding has to pass the threshold in training, and each value in
  the choice; a value's own weight (``model.first_order value``) passes it in training whatever its embedding does.
* No parent is ever written to. The published mutation edits the parent in place, so that kept elites and the recorded
  best change after they were scored.
* The crossover point lies among the fields (the published code draws it from the widths), and ``keep`` is 15 as the
  paper says (its code keeps none).
* A budget is held by repair: what costs too much has fields, drawn at random, cut to smaller widths until it fits. So
  every candidate that is scored is one that may be the result.
* Candidates are scored on ``rows`` validation rows, all by the same ones, and never twice.
* Retraining starts from new weights, not from the initial ones of the supernet, and with no mask.
* ``drop`` lets widths be 0, in training and evolution, so that fields can be dropped; the paper has no such width.
"""
