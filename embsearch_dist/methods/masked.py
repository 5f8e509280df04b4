"""The widest model with a mask between its pooled embeddings and its head, which is learned or drawn in training."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config, TrainConfig
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.stages import Stage
from embsearch_dist.models.model import Head, SubnetModel
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer


class MaskedUnify(nn.Module):
    """A mask on embeddings of one width, then the model's own way to a common width."""

    def __init__(self, mask: nn.Module, unify: nn.Module) -> None:
        """``mask``: ``[B, F, w] -> [B, F, w]``."""
        super().__init__()
        self.mask, self.unify = mask, unify

    def forward(self, pooled: Pooled) -> torch.Tensor:
        x = self.mask(pooled.stack().transpose(0, 1))
        rows, fields, width = x.shape
        starts = tuple(f * width for f in range(fields))
        unified: torch.Tensor = self.unify(Pooled(x.reshape(rows, fields * width), starts, (width,) * fields))
        return unified


class MaskedModel(SubnetModel):
    """The model of a uniform width with a mask, whose parameters, if it has any, are a part of the head.

    Args:
        lr: learning rate of those parameters; there is no weight decay on them.
    """

    def __init__(
        self, config: Config, allocation: Allocation, context: Context, mask: nn.Module, lr: float = 0.0
    ) -> None:
        # In a tuple: it becomes a part of the head in `_wrap`, which the base class calls.
        self._mask, self.mask_lr = (mask,), lr
        super().__init__(config, allocation, context)

    def _wrap(self, module: nn.Module, context: Context) -> nn.Module:
        if isinstance(module, Head):
            module.unify = MaskedUnify(self.mask, module.unify)
        return super()._wrap(module, context)

    @property
    def mask(self) -> nn.Module:
        return self._mask[0]

    def optimizer_groups(self) -> list[dict[str, Any]]:
        own = list(self.mask.parameters())
        if not own:
            return super().optimizer_groups()
        ids = {id(p) for p in own}
        rest = [p for p in self.bare_head.parameters() if id(p) not in ids]
        return [{"params": rest}, {"params": own, "lr": self.mask_lr, "weight_decay": 0.0}]


class MaskedTask(SubnetTask):
    """Trains a :class:`MaskedModel` of ``search.width``.

    Args:
        own: the method's settings that the result depends on.
    """

    model: MaskedModel

    def __init__(self, run: Run, mask: nn.Module, own: dict[str, Any], lr: float = 0.0) -> None:
        self.run, self.mask = run, mask
        uniform = Allocation.uniform(run.schema, run.config.search.width)
        super().__init__(run.config, uniform, run.context, MaskedModel(run.config, uniform, run.context, mask, lr))
        self.settings |= own


class MaskedStage(Stage):
    """Trains the masked model by ``search.training``; the last checkpoint is the result."""

    own: ClassVar[tuple[str, ...]] = ()
    """Keys of the ``search`` section that the result depends on, beside ``training`` and ``width``."""

    @abstractmethod
    def task(self, run: Run) -> SubnetTask:
        """New, or to be filled with what was trained."""

    def settings(self, run: Run) -> dict[str, Any]:
        return {f"search.{k}": getattr(run.config.search, k) for k in ("width", *self.own)}

    def inputs(self, run: Run) -> dict[str, Any]:
        return gated.inputs_of(run, run.config.search.training, self.settings(run))

    def run(self, run: Run) -> None:
        torch.manual_seed(run.config.run.seed)
        training: TrainConfig = run.config.search.training
        batches = run.stream("train", training.batch_size, shuffle=True)
        validation = run.stream("validation", training.eval_batch_size, shuffle=False)
        task, root = self.task(run), gated.checkpoint_root(run, self.name)
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            fields, width = len(run.schema.fields), run.config.search.width
            monitor.say(f"{self.name}: {fields} fields of width {width}, {run.context.world_size} rank(s)")
            Trainer(task, training, run.config.optim, batches, validation, run.context, monitor, root).fit()

    def trained(self, run: Run) -> SubnetTask:
        """The task of the finished stage, in evaluation mode."""
        task = self.task(run)
        gated.load(run, self.name, task, best=False)
        return task
