"""What FBGEMM's CUDA look-up computes for SUM pooling: the pooled rows, and in backward the update of those rows.

Written from the formulas, in plain torch on the CPU numbers behind device tensors. Gradients of a row that a batch
looks up several times are added first, and the row is written once (FBGEMM's "exact" optimizers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tools.pretend.counts import note_operator, where
from tools.pretend.tensor import PretendTensor

FORWARD_KERNELS, BACKWARD_KERNELS = 2, 8  # look-up and its offsets; linearise, sort, run lengths, long runs, update
SUM_POOLING, FLOAT32 = 0, 0
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "none")
DEVICE_ARGUMENTS = ("indices", "offsets", "D_offsets", "hash_size_cumsum", "indice_weights", "feature_requires_grad")


@dataclass
class Rows:
    """What one table of a call looks up: ``ids`` and the row of the batch (``bag``) of each."""

    columns: slice
    table: torch.Tensor
    ids: torch.Tensor
    bag: torch.Tensor
    weights: torch.Tensor | None
    number: int


class Lookup(torch.autograd.Function):
    """``split_embedding_codegen_lookup_OPTIMIZER_function_pt2`` with its keyword arguments."""

    @staticmethod
    def forward(ctx: Any, placeholder: torch.Tensor, optimizer: str, call: dict[str, Any]) -> torch.Tensor:
        check(optimizer, call)
        ctx.optimizer, ctx.call = optimizer, call
        note_operator(f"fbgemm.lookup_{optimizer}", FORWARD_KERNELS)
        with torch._C._DisableTorchDispatch():  # what follows stands for two kernels
            ctx.rows = rows_of(call)
            return PretendTensor(pool(ctx.rows, call))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        pooled = gradients[0]
        if not isinstance(pooled, PretendTensor):
            raise RuntimeError("pretend cuda: the gradient of pooled rows is on the CPU")
        note_operator(f"fbgemm.update_{ctx.optimizer}", BACKWARD_KERNELS)
        with torch._C._DisableTorchDispatch():
            for rows in ctx.rows:
                each = pooled.inner[:, rows.columns][rows.bag]
                if rows.weights is not None:
                    each = each * rows.weights[:, None]
                unique, place = torch.unique(rows.ids, return_inverse=True)
                total = torch.zeros(len(unique), each.shape[1]).index_add_(0, place, each)
                update(ctx.optimizer, ctx.call, rows, unique, total)
        return None, None, None


def pool(found: list[Rows], call: dict[str, Any]) -> torch.Tensor:
    """``[B, sum of widths]``: of each table the sum of the rows of a bag, zeros for a bag of none."""
    bags = (call["offsets"].numel() - 1) // (call["D_offsets"].numel() - 1)
    pooled = torch.zeros(bags, int(call["total_D"]))
    for rows in found:
        values = rows.table[rows.ids]
        if rows.weights is not None:
            values = values * rows.weights[:, None]
        pooled[:, rows.columns].index_add_(0, rows.bag, values)
    return pooled


def check(optimizer: str, call: dict[str, Any]) -> None:
    """Refuse what this emulation does not compute, and what a card would not take."""
    if optimizer not in OPTIMIZERS:
        raise NotImplementedError(f"pretend cuda: no look-up with the optimizer {optimizer}")
    if call["pooling_mode"] != SUM_POOLING or call["output_dtype"] != FLOAT32:
        raise NotImplementedError("pretend cuda: look-ups add float32 rows; means and other types are not written")
    if int(call.get("max_B", -1)) >= 0 and call.get("vbe_output_size", -1) > 0:
        raise NotImplementedError("pretend cuda: batches of a size per table (VBE) are not written")
    for name in DEVICE_ARGUMENTS:
        if call.get(name) is not None and not isinstance(call[name], PretendTensor):
            raise RuntimeError(f"pretend cuda: {name} of a look-up is on the CPU, at {where()}")
    if call["indice_weights"] is not None and call["indice_weights"].requires_grad:
        raise NotImplementedError("pretend cuda: weights of a list have no gradient here")
    numbers, place = call.get("optim_float", []), {"adagrad": 1, "rowwise_adagrad": 1, "adam": 3}.get(optimizer, 0)
    decay = numbers[place] if 0 < place < len(numbers) else 0
    if decay or any(call.get("optim_bool", [])):
        raise NotImplementedError("pretend cuda: weight decay and row-wise bias correction are not written")


def rows_of(call: dict[str, Any]) -> list[Rows]:
    weights = plain(call["weights"][0]).reshape(-1)
    starts = plain(call["weights"][3]).tolist()
    widths, hashes = plain(call["D_offsets"]).tolist(), plain(call["hash_size_cumsum"]).tolist()
    indices, offsets = plain(call["indices"]).long(), plain(call["offsets"]).long()
    scale = None if call["indice_weights"] is None else plain(call["indice_weights"])
    tables, found = len(widths) - 1, []
    bags = (len(offsets) - 1) // tables
    for t in range(tables):
        first, last = int(offsets[t * bags]), int(offsets[(t + 1) * bags])
        width = int(widths[t + 1] - widths[t])
        rows = table_rows(hashes, starts, t, weights.numel(), width)
        lengths = offsets[t * bags + 1 : (t + 1) * bags + 1] - offsets[t * bags : (t + 1) * bags]
        ids = indices[first:last]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise IndexError(f"pretend cuda: an id outside 0..{rows - 1} in table {t}, at {where()}")
        found.append(
            Rows(
                slice(int(widths[t]), int(widths[t + 1])),
                weights[starts[t] : starts[t] + rows * width].view(rows, width),
                ids,
                torch.repeat_interleave(torch.arange(bags), lengths),
                None if scale is None else scale[first:last],
                t,
            )
        )
    return found


def table_rows(hashes: list[int], starts: list[int], t: int, numel: int, width: int) -> int:
    """Rows of feature ``t``'s table. Features that share a table have an empty range of hashes but the last."""
    if hashes[t + 1] > hashes[t]:
        return int(hashes[t + 1] - hashes[t])
    return int(min([s for s in starts if s > starts[t]], default=numel) - starts[t]) // width


def update(optimizer: str, call: dict[str, Any], rows: Rows, unique: torch.Tensor, gradient: torch.Tensor) -> None:
    """Write the rows ``unique`` of a table; ``gradient`` ``[len(unique), width]`` is theirs."""
    table, rate = rows.table, float(plain(call["learning_rate_tensor"]))
    if optimizer == "none":
        raise NotImplementedError("pretend cuda: a look-up without an optimizer has no backward here")
    if optimizer == "sgd":
        table[unique] -= rate * gradient
        return
    eps = call["optim_float"][0]
    if optimizer == "rowwise_adagrad":
        total = state_of(call["momentum1"], rows, by_row=True)
        total[unique] += gradient.square().mean(1)
        table[unique] -= rate * gradient / (total[unique].sqrt() + eps)[:, None]
        return
    first = state_of(call["momentum1"], rows)
    if optimizer == "adagrad":
        first[unique] += gradient.square()
        table[unique] -= rate * gradient / (first[unique].sqrt() + eps)
        return
    # Adam (Kingma and Ba, Algorithm 1) of the rows looked up; the step count is FBGEMM's, of the whole module.
    (_, beta1, beta2), step = call["optim_float"][:3], int(call["aux_int"][0])
    second = state_of(call["momentum2"], rows)
    first[unique] = beta1 * first[unique] + (1 - beta1) * gradient
    second[unique] = beta2 * second[unique] + (1 - beta2) * gradient.square()
    mean, spread = first[unique] / (1 - beta1**step), second[unique] / (1 - beta2**step)
    table[unique] -= rate * mean / (spread.sqrt() + eps)


def state_of(momentum: list[Any], rows: Rows, by_row: bool = False) -> torch.Tensor:
    """An optimizer's numbers of one table, ``[rows]`` or ``[rows, width]``, as a view of FBGEMM's storage."""
    flat, start = plain(momentum[0]).reshape(-1), int(plain(momentum[3])[rows.number])
    count, width = rows.table.shape
    return flat[start : start + count] if by_row else flat[start : start + count * width].view(count, width)


def plain(x: Any) -> torch.Tensor:
    return x.inner.detach() if isinstance(x, PretendTensor) else x.detach()
