"""The pretend device refuses what a card refuses, and counts what a card's user waits for, with its file and line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.pretend.worker import Worker
from tools.pretend import watching

CUDA = "cuda"


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device=CUDA)


MIXTURES: dict[str, Callable[[], Any]] = {
    "sum": lambda: ones(3) + torch.ones(3),
    "product": lambda: ones(2, 3) @ torch.ones(3, 2),
    "in place": lambda: torch.ones(3).add_(ones(3)),
    "layer": lambda: nn.Linear(3, 2)(ones(1, 3)),
    "where": lambda: torch.where(ones(3) > 0, torch.ones(3), ones(3)),
    "mask": lambda: torch.where(torch.ones(3) > 0, ones(3), ones(3)),
    "joined numbers": lambda: torch.stack([ones(1)[0], torch.tensor(1.0)]),
    "host indexed by device": lambda: torch.ones(3)[torch.tensor([0, 1], device=CUDA)],
    "values of the host": lambda: ones(3).index_put_((torch.tensor([0, 1], device=CUDA),), torch.ones(2)),
    "lists": lambda: torch._foreach_add([ones(3)], [torch.ones(3)]),
    "optimizer": lambda: torch._fused_adam_(
        [ones(3)], [ones(3)], [ones(3)], [ones(3)], [], [torch.zeros(1)],
        lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    ),
    "loss": lambda: nn.functional.binary_cross_entropy_with_logits(ones(3), torch.ones(3)),
    "numpy": lambda: ones(3).numpy(),
    "numpy of a function": lambda: np.asarray(ones(3)),
    "generator": lambda: torch.rand(3, device=CUDA, generator=torch.Generator()),
    "generator of the device": lambda: torch.rand(3, generator=torch.Generator(CUDA)),
}  # fmt: skip


def mix(name: str) -> str:
    try:
        MIXTURES[name]()
    except (RuntimeError, TypeError) as e:
        return str(e)
    return ""


@pytest.mark.parametrize("name", MIXTURES)
def test_host_and_device_do_not_mix(pretend: Worker, name: str) -> None:
    told = pretend(mix, name)
    assert "cuda" in told
    if name != "numpy" and name != "numpy of a function":
        assert "tests/pretend/test_device.py:" in told, "the line of the project is named"


def allowed() -> list[float]:
    """What a card takes although a part of it is on the host."""
    x = ones(3)
    results = [x + torch.tensor(2.0), x * 2, torch.where(x > 0, x, torch.tensor(0.0)), x[torch.tensor([0, 2])]]
    x[0] = 5
    x[1:] = torch.tensor(7.0)
    x[x > 6] = 1.0
    steps = torch.ones(1)
    torch._foreach_add_([steps], 1.0)
    return [float(r.sum()) for r in [*results, x, steps]]


def test_numbers_and_host_indices_are_taken(pretend: Worker) -> None:
    assert pretend(allowed) == [9.0, 6.0, 3.0, 2.0, 7.0, 2.0]


WAITS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], int]] = {
    "item": (lambda x, y: x.sum().item(), 1),
    "float": (lambda x, y: float(x.sum()), 1),
    "bool": (lambda x, y: bool((x > 0).all()), 1),
    "if": (lambda x, y: 1 if x.sum() > 0 else 0, 1),
    "tolist": (lambda x, y: x.tolist(), 1),
    "cpu": (lambda x, y: x.cpu(), 1),
    "nonzero": (lambda x, y: x.nonzero(), 1),
    "boolean mask": (lambda x, y: x[x > 0], 1),
    "masked assignment": (lambda x, y: x.__setitem__(x > 0, x * 2), 1),
    "masked fill": (lambda x, y: x.__setitem__(x > 0, 0.0), 0),
    "unique": (lambda x, y: torch.unique(x), 1),
    "repeat_interleave of unknown size": (lambda x, y: torch.repeat_interleave(x.long()), 1),
    "repeat_interleave": (lambda x, y: torch.repeat_interleave(x.long(), output_size=3), 0),
    "equal": (lambda x, y: torch.equal(x, x), 1),
    "one_hot of unknown width": (lambda x, y: nn.functional.one_hot(x.long()), 1),
    "one_hot": (lambda x, y: nn.functional.one_hot(x.long(), 4), 0),
    "made of numbers": (lambda x, y: torch.tensor([1.0, 2.0], device=CUDA), 1),
    "like of numbers": (lambda x, y: x.new_tensor([1.0]), 1),
    "pageable, not waited for": (lambda x, y: y.to(CUDA, non_blocking=True), 1),
    "pinned, waited for": (lambda x, y: y.pin_memory().to(CUDA), 1),
    "pinned": (lambda x, y: y.pin_memory()[1:].to(CUDA, non_blocking=True), 0),
    "pinned by copy_": (lambda x, y: x.copy_(y.pin_memory(), non_blocking=True), 0),
    "pageable by copy_": (lambda x, y: x.copy_(y), 1),
    "down, not waited for": (lambda x, y: x.to("cpu", non_blocking=True), 0),
    "down by copy_": (lambda x, y: y.copy_(x), 1),
    "synchronize": (lambda x, y: torch.cuda.synchronize(), 1),
    "event": (lambda x, y: torch.cuda.Event().synchronize(), 1),
    "stream waits for stream": (lambda x, y: torch.cuda.Stream().wait_stream(torch.cuda.current_stream()), 0),
    "number into a slice": (lambda x, y: x[1:].fill_(2.0), 0),
    "zeros on the device": (lambda x, y: torch.zeros(3, device=CUDA), 0),
    "where": (lambda x, y: torch.where(x > 0, x, 0.0), 0),
}  # fmt: skip


def waits(name: str) -> list[tuple[str, str, int]]:
    x, y = ones(3), torch.ones(3)
    with watching() as counts:
        WAITS[name][0](x, y)
    return [(what, place, n) for (what, place), n in counts.syncs.items()]


@pytest.mark.parametrize("name", WAITS)
def test_waiting_for_the_device_is_counted_with_its_line(pretend: Worker, name: str) -> None:
    found = pretend(waits, name)
    assert sum(n for _, _, n in found) == WAITS[name][1]
    assert all(place.startswith("tests/pretend/test_device.py:") for _, place, _ in found)


def copies() -> tuple[list[int], list[str], int, int]:
    pinned = torch.ones(8).pin_memory()
    ids = KeyedJaggedTensor(["a", "b"], torch.arange(4).int(), torch.ones(4).int())
    with watching() as counts:
        pinned.to(CUDA, non_blocking=True).sum()
        torch.empty(0).to(CUDA)
        ids.pin_memory().to(torch.device(CUDA), non_blocking=True)
        one = torch.cuda.Stream()
        with torch.cuda.stream(one):
            pinned.to(CUDA, non_blocking=True).record_stream(one)
    sizes = sorted(counts.transferred.values())
    return sizes, [what for what, _ in counts.copies], counts.syncs.total(), counts.syncs_and_copies


def test_copies_are_counted_with_their_bytes_and_only_once(pretend: Worker) -> None:
    sizes, kinds, syncs, both = pretend(copies)
    assert sum(sizes) == 2 * 32 + 16 + 16
    assert all(kind.startswith("H2D pinned") for kind in kinds)
    assert (syncs, both) == (0, 4), "nobody waits for pinned copies, and nothing is copied of an empty tensor"


def operators() -> tuple[int, int, int]:
    x = ones(4, 4)
    with watching() as counts:
        y = x.t()[1:].reshape(-1)  # two views and a copy
        (y * 2).view(3, 4).sum(0)  # two kernels and a view
    return counts.operators, counts.kernels, counts.views


def test_views_start_no_kernel(pretend: Worker) -> None:
    count, kernels, views = pretend(operators)
    assert kernels == 3 and views == count - 3 >= 3


def trained(device: str) -> list[float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 1)).to(device)
    optimizers = [
        torch.optim.Adam(net[0].parameters(), fused=True),
        torch.optim.Adagrad(net[2].parameters()),
        torch.optim.SGD(net[3].parameters(), 0.1),
    ]
    x, losses = torch.randn(16, 4).to(device), []
    for _ in range(4):
        out = net(x).squeeze(1)
        loss = nn.functional.mse_loss(out, x[:, 0]) + out.masked_fill(out > 1, 0.0).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses += [float(loss), float(norm)]
    weights = net.state_dict()
    assert all(w.device.type == torch.device(device).type for w in weights.values())
    return losses + [float(w.double().sum()) for w in weights.values()]


def test_a_small_network_learns_what_it_learns_on_the_cpu(pretend: Worker) -> None:
    assert pretend(trained, "cuda") == pytest.approx(pretend(trained, "cpu"), abs=1e-6)


def state_of_a_tensor() -> list[Any]:
    x = ones(3)
    view, made = x[1:], []
    view.add_(1)
    parameter = nn.Parameter(x.clone())
    parameter.data = parameter.data * 3
    thread = threading.Thread(target=lambda: made.append(torch.zeros(2, device=CUDA)))
    thread.start()
    thread.join()
    here = torch.cuda.current_device()
    kinds = [str(t.device) for t in (x, view, parameter, made[0], torch.empty_like(x), x.new_zeros(2), x.double())]
    host = [str(t.device) for t in (x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu"))]
    return [x.tolist(), parameter.tolist(), isinstance(parameter, nn.Parameter), here, kinds, host, x.is_cuda]


def test_views_share_memory_and_what_comes_of_a_device_tensor_is_on_the_device(pretend: Worker) -> None:
    values, parameter, is_one, here, kinds, host, is_cuda = pretend(state_of_a_tensor)
    assert values == [1.0, 2.0, 2.0] and parameter == [3.0, 6.0, 6.0] and is_one and is_cuda and here == 0
    assert set(kinds) == {"cuda:0"} and set(host) == {"cpu"}


def test_the_device_stays_in_its_own_process(pretend: Worker) -> None:
    assert pretend(torch.cuda.is_available)
    assert type(torch.Tensor.to).__name__ == "method_descriptor", "here torch is as it was"
