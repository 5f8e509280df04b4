"""What the fork server of the tests loads once, so that no rank and no script forked from it loads it again.

A fork has only the thread that forked. So nothing is computed here, and polars, which starts threads when it is
imported and reads its settings then, is left to those who need it.
"""

from __future__ import annotations

import gc

import scipy.optimize
import scipy.stats  # noqa: F401
import torch.distributed.optim
import torch.utils.tensorboard  # noqa: F401
import torchrec.distributed  # noqa: F401

import embsearch_dist.doctor
import embsearch_dist.report
import embsearch_dist.running
import embsearch_dist.stores.mirroring
import embsearch_dist.train.trainer  # noqa: F401
import launch.common
import launch.retrain  # noqa: F401
import tests.factories
from embsearch_dist.methods import METHODS

list(METHODS.values())  # which loads them
for method in tests.factories.CONFIGS:
    tests.factories.small_config("", "", method=method)  # leaves the defaults of every config behind
gc.collect()
gc.freeze()  # or each collection in a fork would visit, and so copy, all of it
