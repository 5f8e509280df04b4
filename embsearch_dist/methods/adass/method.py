"""AdaS&S as a method: supernet, then search."""

from __future__ import annotations

from embsearch_dist.config.backbones import ADDITIVE
from embsearch_dist.config.options import require
from embsearch_dist.config.sections import Config
from embsearch_dist.methods.adass.config import AdassConfig
from embsearch_dist.methods.adass.search_stage import SearchStage, budgets_of
from embsearch_dist.methods.adass.supernet_stage import SupernetStage
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.run import Run


class AdaSS(Method):
    """AdaS&S: a One-Shot Supernet Approach for Automatic Embedding Size Search (Wei et al. 2023)."""

    config = AdassConfig
    policy = True
    planted = {
        "search": {
            "candidates": [0, 1, 2, 4, 8],
            "supernet": {"batch_size": 512, "epochs": 6, "patience": 0},
            "policy": {"rows": 6000, "steps": 60},
        }
    }
    trial = {
        "search": {
            "candidates": [0, 2, 4],
            "pareto": ["60%"],
            "supernet": TRAINING,
            "sampling": {"update_every": 3},
            "policy": {"steps": 4, "batch": 3, "model_width": 4, "heads": 2, "layers": 1, "moves": 8},
        }
    }

    def stages(self) -> list[Stage]:
        return [SupernetStage(), SearchStage()]

    def needs_classes(self, config: Config) -> str:
        key = "search.policy.metric"
        return f"{key} auc ranks by it; --{key} logloss does not" if config.search.policy.metric == "auc" else ""

    def check(self, run: Run) -> None:
        policy, backbone = run.config.search.policy, run.config.model.backbone
        told = f"fits the last layer behind sums over fields ({', '.join(ADDITIVE)}), got model.backbone {backbone}"
        require(policy.refit == "none" or backbone in ADDITIVE, "search.policy.refit", f"{policy.refit} {told}")
        budgets_of(run.config.search, run.schema, run.config.model.extra)
