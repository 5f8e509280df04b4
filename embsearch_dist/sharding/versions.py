"""What differs between the TorchRec releases this project runs on: 1.8 (torch 2.13) and 1.6 (torch 2.11).

Every other module imports such a name from here and asks for no version. ``embsearch_dist.doctor.PAIRS`` lists
the pairs that are tested together.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torchrec.distributed import collective_utils
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name
from torchrec.distributed.types import ModuleSharder


def init_collective_validation(group: ProcessGroup | None) -> None:
    """Call the collective by which TorchRec 1.8 agrees on checks of its collectives; 1.6 has none and needs none."""
    init = getattr(collective_utils, "init_collective_validation", None)
    if init is not None:
        init(group)


def estimated_by(module: type[nn.Module], sharder: ModuleSharder[Any]) -> dict[str, Any]:
    """The named argument by which a planner's estimator learns of the sharder of ``module``.

    TorchRec 1.6 wants ``sharder_map``, the sharders themselves; 1.8 ``sharder_data_map``, what it reads from them.
    """
    sharders = {sharder_name(module): sharder}
    if "sharder_map" in inspect.signature(EmbeddingPerfEstimator.estimate).parameters:
        return {"sharder_map": sharders}
    return {"sharder_data_map": build_sharder_data_map(sharders)}
