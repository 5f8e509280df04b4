"""PEP (Liu et al. 2021): single entries of the tables pruned by thresholds that are learned with them.

*Learnable Embedding Sizes for Recommender Systems*, ICLR 2021 (arXiv 2101.07577), and the authors' published code. An
entry v of a table is used as ::

    sign(v) * relu(|v| - sigmoid(s))

with one s for each field and column (``granularity field_dim``), field, column (``dim``) or for all (``global``).
Ordinary batches train s with everything else; entries whose size falls below their threshold are 0.

The result is reported in two ways. The mask itself, entries that are not 0, is no allocation: ``search/mask-NAME.json``
has its counts and what it takes to serve, a bit an entry and the values that are there. The allocation has the best
structured widths: columns of all tables by the share of their entries that the mask keeps, as far as the budget goes.
These widths are what retrain.py trains.

Where this departs:

* Only rows that a batch looks up are thresholded, which gives the same gradients; the published code thresholds whole
  tables in every forward pass. In a field of lists the pooled embedding is thresholded, not each id's.
* A budget is met exactly, whatever the training has reached: one number c is added to all s, so that the entries with
  ``|v| > sigmoid(s + c)`` are just those that the budget holds (to a bin of 0.01 in c). The published code waits until
  its thresholds have grown that far, and has no mask where they have not; ``learned_share`` says where they stand.
  Where a bit for each entry takes more than the budget by itself no mask obeys it (``mask_over_budget``); the widths
  do, and are read off as many entries as the budget has room for without the bits.
* The published code retrains the mask from the *initial* table (a lottery ticket), which it saves after the first
  update. Here retrain.py trains the widths; with ``tickets`` the search trains each mask too, from the tables before
  any update, and leaves its figures in ``search/ticket-NAME.json``.
* Nothing is chosen by test rows, and AUC is that of a whole split.
* ``start`` is s at the beginning: -15 (MovieLens) and -150 in the paper, for trainings of many epochs; the default
  prunes sooner.
"""
