"""DCN-V2, AutoInt, xDeepFM, MaskNet and FinalMLP against their formulas written out row by row, number by number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.errors import UserError
from embsearch_dist.models.backbones.making import backbone_of
from embsearch_dist.models.model import SubnetModel
from tests.factories import one_rank, random_batch, small_config, small_schema

FIELDS, WIDTH, ROWS = 3, 4, 5
Vector = torch.Tensor
Row = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def mlp(layers: nn.Module, x: Vector) -> Vector:
    """Layers one after another, units one by one; a ReLU follows where one was put."""
    for layer in layers.children():
        if isinstance(layer, nn.Linear):
            x = affine(layer, x)
        elif isinstance(layer, nn.ReLU):
            x = torch.stack([max(v, v * 0) for v in x])
    return x


def affine(layer: nn.Module, x: Vector) -> Vector:
    assert isinstance(layer, nn.Linear)
    found = torch.stack([sum(w * v for w, v in zip(row, x, strict=True)) for row in layer.weight])  # type: ignore[misc]
    return found if layer.bias is None else found + layer.bias


def norm(x: Vector) -> Vector:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return torch.stack([(v - mean) / (variance + 1e-5) ** 0.5 for v in x])


def dcnv2(m: Any, u: torch.Tensor, dense: Vector) -> torch.Tensor:
    x = first = torch.cat([*u, dense])
    for layer in m.cross:
        inner = affine(layer[1], affine(layer[0], x)) if isinstance(layer, nn.Sequential) else affine(layer, x)
        x = torch.stack([a * b + c for a, b, c in zip(first, inner, x, strict=True)])
    deep = mlp(m.deep, x if m.stacked else first)
    return affine(m.last, deep if m.stacked else torch.cat([x, deep] if len(m.deep) else [x]))


def autoint(m: Any, u: torch.Tensor, dense: Vector) -> torch.Tensor:
    tokens = [*u, *(x * v for x, v in zip(dense, m.columns, strict=True))] if len(dense) else [*u]
    for weight in m.weights:
        q, k, v, r = ([e @ weight[:, part] for e in tokens] for part in range(4))
        size = len(q[0]) // m.heads
        found = []
        for i in range(len(tokens)):
            heads = []
            for h in range(m.heads):
                own = slice(h * size, (h + 1) * size)
                scores = [sum(a * b for a, b in zip(q[i][own], key[own], strict=True)).exp() for key in k]  # type: ignore[union-attr]
                heads.append(sum(s / sum(scores) * value[own] for s, value in zip(scores, v, strict=True)))
            found.append(torch.stack([max(x, x * 0) for x in torch.cat(heads) + r[i]]))  # type: ignore[arg-type]
        tokens = found
    logit = affine(m.last, torch.cat(tokens))
    return logit if m.deep is None else logit + mlp(m.deep, torch.cat([*u, dense]))


def xdeepfm(m: Any, u: torch.Tensor, dense: Vector) -> torch.Tensor:
    maps, pooled = list(u), []
    for weight in m.weights:
        maps = [
            sum(weight[j, i, h] * maps[i] * u[j] for i in range(len(maps)) for j in range(len(u)))  # type: ignore[misc]
            for h in range(weight.shape[2])
        ]
        pooled += [sum(x) for x in maps]
    x = torch.cat([*u, dense])
    logit = affine(m.last, torch.stack(pooled)) + affine(m.linear, x)
    return logit if m.deep is None else logit + mlp(m.deep, x)


def masknet(m: Any, u: torch.Tensor, dense: Vector) -> torch.Tensor:
    x = torch.cat([*u, dense])
    normed = [norm(e) * g + b for e, g, b in zip(u, m.scale, m.shift, strict=True)]
    v = first = torch.cat([*normed, dense])
    outs = []
    for block in m.blocks:
        masked = torch.stack([a * b for a, b in zip(mlp(block.mask, x), v if m.serial else first, strict=True)])
        v = norm(affine(block.project, masked)) * block.norm.weight + block.norm.bias
        v = torch.stack([max(z, z * 0) for z in v])
        outs.append(v)
    return mlp(m.deep, v if m.serial else torch.cat(outs))


def finalmlp(m: Any, u: torch.Tensor, dense: Vector) -> torch.Tensor:
    x = torch.cat([*u, dense])
    gated = [torch.stack([2 / (1 + (-g).exp()) * v for g, v in zip(mlp(gate, x), x, strict=True)]) for gate in m.gates]
    one, two = (mlp(stream, h) for stream, h in zip(m.streams, gated or [x, x], strict=True))
    logit = affine(m.linear, torch.cat([one, two]))
    heads, a, b = m.weight.shape
    for j in range(heads):
        for p in range(a):
            for q in range(b):
                logit = logit + one[j * a + p] * m.weight[j, p, q] * two[j * b + q]
    return logit


CASES: list[tuple[str, Row, list[int], dict[str, Any]]] = [
    ("dcnv2", dcnv2, [6, 4], {"layers": 2}),
    ("dcnv2", dcnv2, [6], {"structure": "stacked", "rank": 2}),
    ("dcnv2", dcnv2, [], {}),
    ("autoint", autoint, [6, 4], {"layers": 2, "head_width": 3}),
    ("autoint", autoint, [], {"layers": 1, "heads": 3, "head_width": 2}),
    ("xdeepfm", xdeepfm, [6], {"maps": [5, 2]}),
    ("xdeepfm", xdeepfm, [], {"maps": [3]}),
    ("masknet", masknet, [6], {"blocks": 2, "block_width": 5}),
    ("masknet", masknet, [], {"blocks": 3, "block_width": 4, "ratio": 0.5, "structure": "serial"}),
    ("finalmlp", finalmlp, [6, 4], {}),
    ("finalmlp", finalmlp, [6], {"second": [5, 9], "heads": 3, "gate": [7]}),
]


def made(name: str, hidden: list[int], options: dict[str, Any], dense: int) -> nn.Module:
    model = ModelConfig(backbone=name, hidden=hidden, options=options)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = backbone_of(model, FIELDS, WIDTH, dense).double()
        with torch.no_grad():
            for p in found.parameters():
                p.copy_(torch.randn(p.shape) * 0.5)
    return found.eval()


def inputs(dense: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = (ROWS, FIELDS, WIDTH), (ROWS, dense)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "formula", "hidden", "options"), CASES)
@pytest.mark.parametrize("dense", [0, 2])
def test_logits_are_those_of_the_formula(
    name: str, formula: Row, hidden: list[int], options: dict[str, Any], dense: int
) -> None:
    model, (u, x) = made(name, hidden, options, dense), inputs(dense)
    with torch.no_grad():
        wanted = torch.stack([formula(model, *row).reshape(()) for row in zip(u, x, strict=True)])
        found = model(u, x)
    assert found.shape == (ROWS,) and float(wanted.std()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "formula", "hidden", "options"), CASES)
def test_a_gradient_reaches_every_parameter_and_embedding(
    name: str, formula: Row, hidden: list[int], options: dict[str, Any]
) -> None:
    model, (u, x) = made(name, hidden, options, 2), inputs(2)
    model(u.requires_grad_(), x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    assert u.grad is not None and bool((u.grad.abs().sum((0, 2)) > 0).all())


@pytest.mark.parametrize(("name", "formula", "hidden", "options"), CASES)
def test_parameters_and_flops_are_what_a_profiler_counts(
    name: str, formula: Row, hidden: list[int], options: dict[str, Any]
) -> None:
    schema, words = small_schema(11, 7, 5, dense=2), [f"model.options.{k}={v}" for k, v in options.items()]
    own = [f"model.backbone={name}", f"model.hidden={hidden}", *words]
    model = SubnetModel(
        small_config("no-data", "no-run", *own, method="ues"), Allocation.uniform(schema, 4), one_rank()
    )
    batch = random_batch(schema, 64)
    assert model.dense_count() == sum(p.numel() for p in model.head.parameters())
    head = model.bare_head.double()  # float32 products on a CPU go through oneDNN, which the profiler does not know
    pooled = model.tables(batch.sparse)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(batch.dense.double(), replace(pooled, values=pooled.values.double()))
    assert counter.get_total_flops() == 64 * model.flops_per_sample() > 0


def test_a_gate_that_has_learned_nothing_weighs_nothing() -> None:
    plain = ModelConfig(backbone="finalmlp", hidden=[6])
    gated = ModelConfig(backbone="finalmlp", hidden=[6], options={"gate": [3]})
    one, two = (backbone_of(m, FIELDS, WIDTH, 0).double().eval() for m in (plain, gated))
    two.load_state_dict(one.state_dict(), strict=False)
    torch.testing.assert_close(one(*inputs(0)), two(*inputs(0)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            ModelConfig(backbone="dcnv2", options={"rang": 2}),
            r"'model.options.rang' \(did you mean 'rank'\?\); dcnv2 has",
        ),
        (ModelConfig(backbone="dcnv2", options={"layers": 0}), "model.options.layers: must be at least 1, got 0"),
        (ModelConfig(backbone="dcnv2", options={"structure": "both"}), "model.options.structure: 'both' is none of"),
        (ModelConfig(backbone="xdeepfm", options={"maps": "many"}), "config key model.options.maps"),
        (ModelConfig(backbone="finalmlp", hidden=[]), "model.hidden: finalmlp needs at least one"),
        (ModelConfig(backbone="finalmlp", hidden=[5]), "model.hidden: model.options.heads 2 must divide"),
        (ModelConfig(backbone="dcnv2", hidden=[10**9]), "config key model.hidden: layers of"),
    ],
)
def test_options_that_cannot_be_are_refused_by_key(model: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbone_of(model, FIELDS, WIDTH, 2)
