"""Adam for looked-up rows: the formula against plain sums over bags, what must not move, and one rule for all paths."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.kernels import adam as module
from embsearch_dist.kernels.adam import (
    Bags,
    Layout,
    Numbers,
    kernel,
    numbers,
    update,
    update_by_kernel,
    update_by_torch,
)
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.sharding.sharded_tables import ShardedTables, Table
from tests.factories import (
    one_rank,
    optimizer_state,
    random_batch,
    small_config,
    small_schema,
    whole_tables,
)

HEIGHTS = (7, 30, 1000, 5, 64)
WIDTHS = {"one width": (16,) * 5, "many widths": (4, 8, 8, 64, 12), "wide": (20, 32, 64, 64, 64)}
BATCH, LR = 13, 0.02


@dataclass
class Case:
    """Tables in flat storage, with moments of an earlier step, so that momentum would show."""

    layout: Layout
    storage: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, widths: tuple[int, ...], seed: int = 0) -> Case:
        places, total = [], 0
        for height, width in zip(HEIGHTS, widths, strict=True):
            places.append(total)
            total += height * width
        dice = torch.Generator().manual_seed(seed)
        w, m, v = (torch.randn(total, generator=dice) * 0.1 for _ in range(3))
        return cls(Layout(HEIGHTS, widths, tuple(places)), (w, m, v.square()))

    def copy(self) -> Case:
        return Case(self.layout, tuple(t.clone() for t in self.storage))

    def tables(self, which: int = 0) -> list[torch.Tensor]:
        """Weights (0) or a moment (1, 2) of each table."""
        shapes = zip(self.layout.heights, self.layout.widths, self.layout.places, strict=True)
        return [self.storage[which][p : p + h * d].view(h, d) for h, d, p in shapes]


def batch_of(seed: int, weighted: bool, rows: int = BATCH, most: int = 4) -> Bags:
    """Bags of 0 to 3 look-ups; in the short tables many are of the same row."""
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, most, (len(HEIGHTS) * rows,), generator=dice)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = [
        torch.randint(0, h, (int(offsets[(t + 1) * rows] - offsets[t * rows]),), generator=dice)
        for t, h in enumerate(HEIGHTS)
    ]
    weights = torch.rand(int(offsets[-1]), generator=dice) if weighted else None
    return Bags(torch.cat(ids), offsets, weights)


def by_hand(case: Case, bags: Bags, gradient: torch.Tensor, step: int, elements: bool) -> list[list[torch.Tensor]]:
    """Weights and moments after a step, table by table, in float64."""
    rows, column, found = len(gradient), 0, []
    for t, (w, m, v) in enumerate(zip(*(case.tables(k) for k in range(3)), strict=True)):
        width, g, seen = w.shape[1], torch.zeros(w.shape, dtype=torch.float64), torch.zeros(len(w), 1, dtype=torch.bool)
        for b in range(rows):
            for i in range(int(bags.offsets[t * rows + b]), int(bags.offsets[t * rows + b + 1])):
                factor = 1.0 if bags.weights is None else float(bags.weights[i])
                g[bags.ids[i]] += factor * gradient[b, column : column + width].double()
                seen[bags.ids[i]] = True
        first, second = 0.9 * m.double() + 0.1 * g, 0.999 * v.double() + 0.001 * g * g
        to = w - LR * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        moves = g != 0 if elements else seen
        found.append([torch.where(moves, new, old.double()) for new, old in ((to, w), (first, m), (second, v))])
        column += width
    return found


PATHS = {"kernel": update_by_kernel, "torch": update_by_torch}
Path = Callable[..., None]


def path_of(name: str) -> Path:
    if name == "kernel" and kernel() is None:
        pytest.skip("no C compiler, so the kernel was not built")
    return PATHS[name]


def test_the_kernel_is_there_where_a_compiler_is() -> None:
    if shutil.which("cc") is None and kernel() is None:
        pytest.skip("no C compiler, so the kernel was not built")
    assert kernel() is not None, "the kernel is missing or of another version: run tools/setup.sh"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("elements", [False, True])
def test_a_step_is_that_of_the_formula(path: str, widths: str, weighted: bool, elements: bool) -> None:
    """Duplicates within and across bags, empty bags, weights; what was not looked up keeps its bits."""
    case, apply = Case.of(WIDTHS[widths]), path_of(path)
    for step in range(1, 4):
        bags = batch_of(step, weighted)
        gradient = torch.randn(BATCH, sum(case.layout.widths), generator=torch.Generator().manual_seed(step))
        gradient[:, ::3] = 0
        before, expected = case.copy(), by_hand(case, bags, gradient, step, elements)
        apply(case.storage, case.layout, bags, gradient, numbers(step, LR, elements))
        moved = 0
        for t, (after, old) in enumerate(zip(case.tables(), before.tables(), strict=True)):
            ids = bags.ids[int(bags.offsets[t * BATCH]) : int(bags.offsets[(t + 1) * BATCH])].unique()
            still = torch.ones(len(after), dtype=torch.bool)
            still[ids] = False
            assert torch.equal(after[still], old[still])
            moved += int((after[ids] != old[ids]).sum())
            for k in range(3):
                torch.testing.assert_close(case.tables(k)[t].double(), expected[t][k], rtol=2e-6, atol=2e-7)
        assert moved


@pytest.mark.parametrize("path", PATHS)
def test_elements_without_a_gradient_keep_their_bits_when_asked_to(path: str) -> None:
    case, bags = Case.of(WIDTHS["many widths"]), batch_of(0, False)
    gradient = torch.randn(BATCH, sum(case.layout.widths))
    closed = torch.arange(gradient.shape[1]) % 4 > 1
    gradient[:, closed] = 0
    for elements in (True, False):
        after, column = case.copy(), 0
        path_of(path)(after.storage, case.layout, bags, gradient, numbers(5, LR, elements))
        for t, width in enumerate(case.layout.widths):
            shut = closed[column : column + width]
            for k in range(3):
                same = after.tables(k)[t][:, shut] == case.tables(k)[t][:, shut]
                assert bool(same.all()) == elements
            assert (after.tables()[t][:, ~shut] != case.tables()[t][:, ~shut]).any()
            column += width


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_without_look_ups_moves_nothing(path: str) -> None:
    case = Case.of(WIDTHS["many widths"])
    after, bags = case.copy(), batch_of(0, True, most=1)
    assert not len(bags.ids)
    path_of(path)(after.storage, case.layout, bags, torch.ones(BATCH, sum(case.layout.widths)), numbers(1, LR, False))
    assert all(torch.equal(a, b) for a, b in zip(after.storage, case.storage, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_equal_batches_give_equal_bits_on_any_number_of_threads(path: str) -> None:
    case, bags = Case.of(WIDTHS["many widths"]), batch_of(1, True, rows=900)
    assert len(bags.ids) > module.FEW  # else one thread does it all
    gradient = torch.randn(900, sum(case.layout.widths))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 1, 3, 8):
            torch.set_num_threads(count)
            after = case.copy()
            path_of(path)(after.storage, case.layout, bags, gradient, numbers(1, LR, False))
            found.append(after.storage)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_ids_out_of_range_are_left_alone_by_the_kernel() -> None:
    apply, layout = path_of("kernel"), Layout((3,), (4,), (0,))
    storage = tuple(torch.zeros(12) for _ in range(3))
    bags = Bags(torch.tensor([3, -1, 1]), torch.arange(4), None)
    apply(storage, layout, bags, torch.ones(3, 4), numbers(1, LR, False))
    assert storage[0].view(3, 4).ne(0).any(1).tolist() == [False, True, False]


def test_a_kernel_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERSION", -1)
    kernel.cache_clear()
    try:
        assert kernel() is None
        case, bags = Case.of(WIDTHS["one width"]), batch_of(0, False)
        after = case.copy()
        update(after.storage, case.layout, bags, torch.ones(BATCH, 80), numbers(1, LR, False))
    finally:
        kernel.cache_clear()
    assert not torch.equal(after.storage[0], case.storage[0])


# ---- tables under TorchRec ----

SCHEMA = small_schema(50, 7, 20)
TABLES = [Table("f0", 50, 8), Table("f1", 7, 12), Table("f2", 20, 4)]


def adam_tables(partial: bool = False) -> ShardedTables:
    return ShardedTables(TABLES, one_rank(), DistConfig(), OptimConfig(embedding_lr=LR), 0, 0.1, partial)


def train_step(tables: ShardedTables, seed: int, fields: tuple[str, ...] = ("f0", "f1", "f2")) -> None:
    """A step on the given fields' embeddings; the other fields are looked up and have a gradient of zeros."""
    pooled = tables(random_batch(SCHEMA, 16, seed).sparse)
    sum(pooled[n].pow(2).sum() if n in fields else pooled[n].sum() * 0 for n in ("f0", "f1", "f2")).backward()  # type: ignore[union-attr]
    tables.step()


def test_rows_move_when_they_are_looked_up_and_only_then() -> None:
    tables = adam_tables()
    train_step(tables, 0)
    for seed, fields in ((1, ("f0", "f1", "f2")), (2, ("f1",))):  # in the second, f0 and f2 have momentum alone
        before = whole_tables(tables)
        train_step(tables, seed, fields)
        after, batch = whole_tables(tables), random_batch(SCHEMA, 16, seed)
        earlier = random_batch(SCHEMA, 16, 0)
        for table in TABLES:
            seen = torch.zeros(table.rows, dtype=torch.bool)
            seen[batch.sparse[table.name].values().long()] = True
            known = torch.zeros(table.rows, dtype=torch.bool)
            known[earlier.sparse[table.name].values().long()] = True
            assert torch.equal(after[table.name][~seen], before[table.name][~seen])
            moved = (after[table.name] != before[table.name]).any(1)
            assert moved[seen & known].all() and (seen & known).any()


def test_evaluating_between_two_steps_changes_nothing() -> None:
    found = []
    for evaluations in (0, 3):
        tables = adam_tables()
        for seed in range(3):
            train_step(tables, seed)
            with torch.no_grad():
                for other in range(evaluations):
                    tables(random_batch(SCHEMA, 16, 10 + other).sparse)
        found.append(whole_tables(tables) | optimizer_state(tables))
    assert found[0]["adam steps"] == 3
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_fbgemms_own_count_is_set_to_the_steps_before_each_look_up_that_trains() -> None:
    """FBGEMM counts every look-up, and at zero it asks ``iter``, which it has counted up as well."""
    tables = adam_tables()
    fbgemm = SimpleNamespace(iter_cpu=torch.tensor([7]), iter=torch.tensor([7]))
    assert tables.adam is not None
    tables.adam._counting.append(fbgemm)  # type: ignore[arg-type]
    with torch.no_grad():
        tables(random_batch(SCHEMA).sparse)
    assert (int(fbgemm.iter_cpu), int(fbgemm.iter)) == (7, 7)
    for steps in range(3):
        fbgemm.iter_cpu.add_(5)
        train_step(tables, steps)
        assert int(fbgemm.iter_cpu) == steps
    assert int(fbgemm.iter) == 0


@pytest.mark.parametrize("scheme", ["shared", "independent"])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_columns_and_fields_that_a_subnet_does_not_read_keep_their_bits(scheme: str, optimizer: str) -> None:
    """After steps of the widest subnet, so that every column has momentum."""
    candidates = [0, 2, 3, 6]
    config = small_config("no-data", "no-run", f"optim.embedding={optimizer}", "model.init_std=0.5")
    model = SupernetModel(config, SCHEMA, candidates, scheme, one_rank(), True)

    def step(choice: list[int], keep: list[int], seed: int) -> None:
        batch = random_batch(SCHEMA, 32, seed)
        logits, _ = model(batch, torch.tensor(choice), torch.tensor(keep, dtype=torch.bool))
        logits.square().sum().backward()
        model.sharded.step()

    for seed in range(3):
        step([3, 3, 3], [1, 1, 1], seed)
    before, state = whole_tables(model.sharded), {k: v.clone() for k, v in optimizer_state(model.sharded).items()}
    choice, keep = [1, 2, 3], [1, 1, 0]
    step(choice, keep, 7)
    after = whole_tables(model.sharded)
    for name, j, kept in zip(SCHEMA.names, choice, keep, strict=True):
        read = torch.zeros(model.tables.width, dtype=torch.bool)
        if kept:
            read[slice(*model.tables.columns[j])] = True
        moved = (after[name] != before[name]).any(0)
        assert torch.equal(moved, read), name
        for key, value in optimizer_state(model.sharded).items():
            if f".{name}." in key and value.dim() == 2:
                assert torch.equal(value[:, ~read], state[key][:, ~read]), key


def test_numbers_are_those_of_the_count() -> None:
    n: Numbers = numbers(3, 0.5, True)
    assert n.rate == pytest.approx(0.5 / (1 - 0.9**3))
    assert n.scale == pytest.approx((1 - 0.999**3) ** -0.5)
    assert (n.beta1, n.elements) == (pytest.approx(0.9), 1)
