"""A training step leaves nothing behind, also in the steps that update P_E and P_F."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.train.guard import Gate
from tests.factories import one_rank, open_run, prepared, small_config


def test_the_embeddings_of_a_step_are_freed_with_it(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = small_config(prepared(tmp_path_factory), tmp_path, "search.sampling.update_every=1")
    run = open_run(config, one_rank())
    task = SupernetTask(run, 10)
    seen: list[weakref.ref[torch.Tensor]] = []
    task.model.tables.register_forward_hook(lambda *args: seen.append(weakref.ref(args[2].values)))
    stream = run.stream("train", 64, shuffle=True)
    gc.disable()  # a batch of embeddings is too large to wait for it
    try:
        with Gate(task.model.sharded) as gate:
            for step, batch in zip(range(3), stream.epoch(0), strict=False):
                task.loss(batch, step).backward()
                gate.pass_on()
                assert task._gradient is not None
                assert task._gradient.abs().sum() > 0
        assert len(seen) == 3
        assert [ref() is None for ref in seen] == [True, True, True]
    finally:
        gc.enable()
