"""ESAPN (Liu et al. 2020): widths that only grow, where a policy sees how popular a value is and how wide it is now.

*Automated Embedding Size Search in Deep Recommender Systems*, SIGIR 2020. Every field begins with the narrowest
candidate. After every ``outer.every``-th ordinary batch each row of a held-out batch draws, for each field, whether to
*keep* the field's size or to *enlarge* it by one candidate, with the probability that the field's policy gives to the
popularity of the row's value at the field's size. The reward of a row is the fall of its loss against a baseline, and
REINFORCE trains the policies::

    - mean over rows of (baseline - loss) * sum over fields of log pi(action)

**From values to fields.** The paper has a size for each user and each item; tables here have one width. So the size is
the field's, and the field is enlarged as soon as the mean probability of *enlarge* over the training rows (each value
counts as often as it is met) is above one half: the greedy action of the average lookup. The most probable comes first
where several are due at once. The order in which fields were enlarged is kept with the weights.

**Budgets.** An enlargement that would break a budget is not allowed. The recorded growth is gone through once more for
each budget: what does not fit is refused, what comes after it and does is taken. So one search serves every budget, and
a budget that the growth does not reach stays unspent. The model that is searched with grows without a bound.

Where this departs:

* A row draws an action in the loss alone: columns of the field's table are closed or open. No table is written to. In
  the published code sampled actions enlarge the live tables, in which the two-sided mode also looks up users by ids of
  items.
* The columns of the next size are trained before they are chosen: in ordinary batches a share ``ahead`` of the rows
  has them open, field by field. In the paper larger values of the same table train the map to the next size; with one
  size a table there are none, and an enlargement could only add noise. What is enlarged keeps the columns that it had,
  where the published code makes new ones from them by a linear map.
* The baseline is by default the loss of the same rows at the present sizes (``baseline rows``): what the action is
  worth on this very row. ``baseline last`` is the mean of the last five held-out losses, as published; what a row has
  drawn is then buried under how hard the row is.
* The present size chooses the output of the policy that is read. Published, it is an input; a size that was never met
  has no opinion here.
* Popularity is a bucket of the count in all training rows (`gated/popularity.py`); the published table has a row for
  each possible count.
* No field is dropped, so the narrowest candidate is at least 1. There is no BatchNorm and no tanh behind the tables.
* Nothing learns from test rows; in the published code policy and model go on in the test phase.
"""
