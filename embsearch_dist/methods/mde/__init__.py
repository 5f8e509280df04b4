"""MDE (Ginart et al. 2019): widths by a power of how often a value of a field is met; nothing is trained to search.

*Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems*, ISIT 2021 (arXiv 1909.11810)
and the published solver of the authors. Field m with n_m values and k_m ids a row (1, but for lists) has a mean
popularity ``p_m = k_m / n_m`` of its values, and its width is ::

    d_m = base * p_m ** alpha,     alpha = 0.3 by default; 0 gives uniform widths

rounded to a whole number, at least 1, or to the nearest power of two. The fewer rows a value is met in, the fewer
columns it can fill.

Where this departs from the published solver:

* It gets the base for a budget B from ``B / sum_m n_m ** (1 - alpha)`` and rounds and clips afterwards, so that the
  widths may cost more than B. Here the base is the largest one whose rounded and clipped widths cost at most the
  budget, whatever that counts. It is exact: widths are steps of the base, and the steps are searched by bisection. What
  the next step does not fit is left over: to spend it on single fields would no longer be the rule.
* No table is excepted for being small (the published script lets tables of up to 200 rows keep the base width); all are
  cut at ``search.width``.
* A vocabulary split by frequency into blocks of own widths, which the paper also has, is not built:
  tables have one width here.
* The retrained model maps widths to a common one as ``model.transform`` says; the paper has a map without bias for each
  table that is narrower than the widest (``--model.transform field``).
"""
