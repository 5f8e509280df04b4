"""OptFS (Lyu et al. 2023): single values of the fields kept or dropped, by a gate for each that is learned.

*Optimizing Feature Set for Click-Through Rate Prediction*, WWW 2023 (arXiv 2301.10909), and the authors' published
code. The embedding of a value is multiplied by ``sigmoid(tau * w) / sigmoid(w0)`` with one w for each value, which is
``w0 = 0.5`` at the start. tau grows by epochs from 1 to ``tau``, so that gates end open or shut, and a penalty on the
sum of all gates shuts those that clicks do not hold open. Values with ``w > 0`` are kept, and their model is trained
again.

The result is a choice of values: ``allocation.json`` holds a bit for each value of a field that loses some
(:mod:`embsearch_dist.kept_values`), and such a field's table has that many rows. Values that are not kept look up row
0 with the rare ones. All fields that keep something have the one width of the search; a field that keeps nothing is
dropped. retrain.py, evaluate.py, export.py and serving take it like any other allocation. ``search/mask-NAME.json``
says how many values each field keeps and what the tables take to serve.

Where this departs:

* w is one more column of the sharded tables. Their optimizer trains it at the rows that a batch looks up, at ``lr``.
* The penalty reaches all gates in every step, by plain gradient descent at the rate ``lr`` (in one go every
  :data:`~.gates.EVERY` steps). In the published code it goes through Adam with the clicks: Adam divides by the size of
  the gradient, so a gate that no batch looks up moves by a whole step for whatever small penalty there is.
  Here ``penalty`` is about four times the share of steps in which a value has to be met, and to help, to stay open.
* A budget is met by a higher threshold: of the values with ``w > 0`` those of the largest w that it holds. Values
  whose gates are shut stay out where it would hold them too. ``learned_share`` says how many have ``w > 0``. The
  published code has no budget.
* A dropped value shares the row of the rare ones, which is trained; as published its embedding is zero.
* The value's own weight in the linear part (``model.first_order value``) is gated too; the published DeepFM has none.
* In a field of lists the gate is that of the mean of w over the ids of the list.
* Gates follow tau behind every backbone. The published IPNN leaves tau out of its search, which never hardens.
* Retraining begins with new weights, or with those after ``rewind`` epochs of the search: tables and head, not the
  state of the optimizers. The paper rewinds after 0 to 4 epochs, by data set.
* Every field keeps one width: what a narrower table would do for a field whose values are all of use, this cannot find.
"""
