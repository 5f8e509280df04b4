"""SSEDS (Qu et al. 2022): columns of one trained model by the gradient of a mask on them, in a single shot.

*Single-shot Embedding Dimension Search in Recommender System*, SIGIR 2022 (arXiv 2204.03281). A model of one
width d is trained, its embeddings ``e_m`` (of field m, d columns) are multiplied by a mask ``alpha_m = 1``, and the
saliency of a column is what the loss of a batch would change by, were it closed, to first order::

    s_mk = |dL_b / d alpha_mk| = |sum_i dL_i / d e_imk * e_imk|      rows i of batch b

The columns of the highest saliency in all tables together stay as far as the budget goes; the width of a field is how
many of its columns stay, 0 included, and a model of these widths is trained from scratch.

What is ours, and where this departs:

* The gradients are those of the widest model at its early stop, the stage that all searches without a supernet share
  (`widest.py`); the paper pretrains for a short while.
* One batch or several (``search.batches``): the mean of the batches' saliencies. Where training has converged the
  gradient's mean over all rows is near 0, so that a large batch tells less than several small ones: what is left is its
  spread. Batches are drawn at random from all training rows, the same ones on any number of ranks.
* Columns of tables of different lengths cost differently. ``search.order saliency``, as published, takes them by
  saliency alone and stops at the first that does not fit; ``density`` divides by the values of the field, so that the
  budget buys the most saliency (to first order; ties go to the first field). What is kept is told as a share of the
  saliency in either order. Saliencies that are all 0 are refused: ties would decide.
* The columns that stay are not the leading ones of their tables; widths are all that retraining needs.
* The figures shown for an allocation hold closed columns at their mean, which a bias would learn, not at 0.

What it cannot see: a table whose directions lie across its columns has equally salient columns, however few directions
it uses (`tests/unit/test_sseds.py`); `utilities` looks along principal directions for that reason.
"""
