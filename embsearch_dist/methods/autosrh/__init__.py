"""DNIS, later AutoSrh (Cheng et al. 2020): columns weighed by frequency group, where held-out rows train the weights.

*Differentiable Neural Input Search for Recommender Systems* (arXiv 2006.04466). Values are sorted into groups by how
often they are met. A value x of group g is used as ::

    a_g * e_x        (entry by entry; a is [groups, d], ones at the start)

Ordinary batches train tables and head, every ``outer.every``-th is followed by a held-out batch that trains a
(first-order DARTS, with an L1 penalty). Then the entries ``a_g * e_x`` of all tables are pruned by their size.

**From entries to widths.** Pruned entries lie anywhere, and a table keeps its columns. So whole columns are pruned: the
score of a column is the mean size of its entries ``|a_g * e_x|`` over the values of its field (each value once, as each
has a row), and the highest columns of all tables together are kept as far as the budget goes. Groups whose columns are
closed pull a column down by as many values as they have. The widths are trained from scratch.

Where this departs:

* A group is a bucket of popularity, one for each doubling of a value's count in the training rows
  (`gated/popularity.py`), for all fields together; published, a few groups of given numbers of rows.
* No unstructured result is kept, and no value has a width of its own.
* In a field of lists the pooled embedding is weighed, by the mean popularity of its values.
* Adam trains a, where the published code normalises its gradients; first order only.
"""
