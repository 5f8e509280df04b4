"""A few training steps on the pretend device give the losses that the CPU gives."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from embsearch_dist.config.read import load_config
from embsearch_dist.methods import noise
from embsearch_dist.methods.ihas import gates_stage as gating
from embsearch_dist.ranks.context import start
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer
from tests.factories import CONFIGS, recorded
from tests.pretend.chains import TRAINED, Chain, first_of_each
from tests.pretend.worker import Worker
from tools.pretend.count import Side, make_task

STEPS = 6
CASES = [
    Chain("adass", "sgd", "field"),
    Chain("adass", "adagrad", "width", lists=True),
    Chain("adass", "adam"),
    Chain("nasrec", "rowwise_adagrad", lists=True),
    Chain("ihas", "adagrad", lists=True),
    Chain("adafs", "rowwise_adagrad"),
    Chain("ues", "sgd", "width", lists=True),
    Chain("ues", "adagrad", "field"),
    Chain("ues", "adam", lists=True),
]


def host_noise(seed: int, step: int, first: int, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The gates' random numbers, which a GPU otherwise makes itself, and others."""
    return uniform_noise(seed, step, first, shape, torch.device("cpu")).to(device)


uniform_noise = noise.uniform_noise


def losses(chain: Chain, data: Path, folder: Path, device: str) -> list[float]:
    """Of every step; then the logits of the first validation batch."""
    config = load_config(CONFIGS, None, [*chain.words(data, device), f"run.dir={folder}"], chain.method)
    training = getattr(
        config.search, "supernet" if TRAINED.get(chain.method) == "supernet" else "training", config.train
    )
    training.steps, training.epochs = STEPS, 2
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(gating, "uniform_noise", host_noise))
        context = stack.enter_context(start(config.run, config.dist))
        monitor = stack.enter_context(Monitor(folder, "train", 0, quiet=True))
        run = Run(config, Schema.load(data), context)
        task: Any = make_task(Side(chain.method), run, STEPS)
        stream = run.stream("train", training.batch_size, shuffle=True)
        Trainer(task, training, config.optim, stream, None, context, monitor, folder / "checkpoints").fit()
        task.model.eval()
        batches = run.stream("validation", training.eval_batch_size, shuffle=False).epoch(0)
        with torch.no_grad():
            logits = task.predict(next(iter(batches)).to(context.device))
        with contextlib.suppress(AttributeError):
            task.close()
    return recorded(folder, "train", "loss") + logits.tolist()


@pytest.mark.parametrize("chain", first_of_each(CASES))
def test_training_gives_the_numbers_of_the_cpu(
    pretend: Worker, ids: Path, lists: Path, tmp_path: Path, chain: Chain
) -> None:
    data = lists if chain.lists else ids
    device, host = (pretend(losses, chain, data, tmp_path / where, where) for where in ("cuda", "cpu"))
    assert len(set(host[:STEPS])) == STEPS
    assert device[:STEPS] == pytest.approx(host[:STEPS], abs=1e-5)
    # A row whose gradient nearly cancels moves by what is left of it, divided by its own size: some logits hear of it.
    assert device[STEPS:] == pytest.approx(host[STEPS:], abs=1e-3)
