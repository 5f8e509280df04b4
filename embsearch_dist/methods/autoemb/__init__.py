"""AutoEmb (Zhao et al. 2020): a controller weighs candidate widths by how popular a value is; held-out rows train it.

*AutoEmb: Automated Embedding Dimensionality Search in Streaming Recommendations*, ICDM 2021 (arXiv 2002.11252). Of a
looked-up value x of field m, with candidates d_1 < ... < d_T, what the model behind the tables sees is ::

    sum_t w_t * tanh(BN(W_mt e_x[:d_t])),     w = softmax(controller_m(popularity of x))

Ordinary batches train tables, maps and head, every ``outer.every``-th is followed by a held-out batch that trains the
controllers (first-order DARTS). The paper has two fields, users and items, each with a controller; here, as AdaS&S runs
it, every field has one.

**From values to fields.** The weights are soft and belong to single values, so nothing is saved by them; the published
method ends there. Here a field's weights are the mean of its values' weights over the training rows (each value counts
as often as it is met), which is what a lookup of the field uses on average. They are taken for probabilities, and the
widths are those of the largest product of them that a budget holds (exact knapsack, as for AutoDim). Their model is
trained from scratch.

Where this departs:

* The popularity is a bucket of the value's count in all training rows (`gated/popularity.py`), since epochs are no
  stream. The paper counts along one, and the published code has a row of embeddings for each possible count.
* The controller sees popularity alone. The paper gives it a value's last weights too (the published code keeps them for
  each value; its code for items reads a loss out of the users' table). So what it says is a function of the bucket,
  which can be averaged over a field.
* There is no BatchNorm inside the controller. Those of the candidates have statistics per field and candidate (the
  published code shares one among candidates), and held-out batches only read them.
* Candidates are prefixes of one table, not tables side by side.
* Nothing learns from test rows; in the published code the controller goes on in the test phase.
"""
