"""The search spaces: NASRec-Full, NASRec-Small, and one of narrow outputs and searched depth; what belongs to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from embsearch_dist.config.options import option
from embsearch_dist.errors import UserError, nearest
from embsearch_dist.networks.architecture import (
    BINARY_OPERATORS,
    DENSE_OPERATORS,
    HEADS,
    SPARSE_OPERATORS,
    Architecture,
    Block,
    is_int,
    read_architecture,
)

_OPERATORS = {"dense_operators": DENSE_OPERATORS, "sparse_operators": SPARSE_OPERATORS}


@dataclass(frozen=True)
class Space:
    """What an architecture may be made of; the defaults are NASRec-Full.

    Attributes:
        blocks: how many choice blocks follow each other, at most where depth is searched.
        dense_operators, sparse_operators: one of each is active in a searched block.
        dense_widths: choices of Dd, columns of a dense output.
        sparse_widths: choices of Ns, tokens of a sparse output.
        max_sources: a searched block reads at most so many dense and so many sparse outputs.
        tokens: a dense output that is merged into the sparse one becomes so many tokens.
        width: embedding width of every field and every token.
        fewest_blocks: depth is searched from so many blocks on; 0: every searched network has ``blocks``.

    Raises:
        UserError: a value out of range, or operators and widths that are unknown, repeated or none; names the key.
    """

    blocks: int = 7
    dense_operators: tuple[str, ...] = DENSE_OPERATORS
    sparse_operators: tuple[str, ...] = SPARSE_OPERATORS
    dense_widths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 768, 1024)
    sparse_widths: tuple[int, ...] = (16, 32, 48, 64)
    max_sources: int = 4
    tokens: int = 8
    width: int = 16
    fewest_blocks: int = 0

    def __post_init__(self) -> None:
        for key in ("blocks", "max_sources", "tokens", "width"):
            value = getattr(self, key)
            if not is_int(value) or value < 1:
                raise UserError(f"space, key {key}: must be a whole number above 0, got {value!r}")
        fewest = self.fewest_blocks
        if not is_int(fewest) or not 0 <= fewest <= self.blocks:
            message = f"must be from 1 to blocks, which is {self.blocks} (0: depth is not searched), got {fewest!r}"
            raise UserError(f"space, key fewest_blocks: {message}")
        for key, known in _OPERATORS.items():
            names = getattr(self, key)
            for name in names:
                if name not in known:
                    near = nearest(str(name), known)
                    raise UserError(f"space, key {key}: {name!r} is none of {', '.join(known)}{near}")
            if not names or list(names) != sorted(set(names), key=known.index):
                raise UserError(f"space, key {key}: name at least one of {', '.join(known)}, each once, in this order")
        for key in ("dense_widths", "sparse_widths"):
            widths = getattr(self, key)
            if not widths or not all(is_int(w) and w >= 1 for w in widths) or list(widths) != sorted(set(widths)):
                raise UserError(f"space, key {key}: needs whole numbers above 0, ascending, got {list(widths)}")
        if "attention" in self.sparse_operators and self.width % HEADS:
            message = f"attention has {HEADS} heads, so it must be a multiple of {HEADS}, got {self.width}"
            raise UserError(f"space, key width: {message}")

    @property
    def binary(self) -> bool:
        """Whether an operator of the space reads ``left`` and ``right``."""
        return any(name in BINARY_OPERATORS for name in self.dense_operators)

    @property
    def depths(self) -> tuple[int, ...]:
        """How many blocks a searched network may have."""
        return tuple(range(self.fewest_blocks or self.blocks, self.blocks + 1))

    def to_json(self) -> dict[str, Any]:
        """Without ``fewest_blocks`` where depth is not searched, as older versions wrote and read a space."""
        body = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return body if self.fewest_blocks else {k: v for k, v in body.items() if k != "fewest_blocks"}

    @classmethod
    def from_json(cls, body: object, where: str) -> Space:
        """Raises:
        UserError: no object, an unknown or missing key, or a value out of range; names ``where`` and the key.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(body, Mapping):
            raise UserError(f'{where}: "space" must be an object with the keys {", ".join(known)}')
        for key in body:
            if key not in known:
                raise UserError(f"{where}, space: unknown key {key!r}{nearest(str(key), known)}")
        values: dict[str, Any] = {}
        for f in fields(cls):
            if f.name == "fewest_blocks" and f.name not in body:
                continue
            if f.name not in body:
                raise UserError(f"{where}, space: key {f.name!r} is missing")
            value, many = body[f.name], isinstance(f.default, tuple)
            if isinstance(value, list) != many:
                raise UserError(f"{where}, space: key {f.name!r} must be {'a list' if many else 'a number'}")
            values[f.name] = tuple(value) if many else value
        try:
            return cls(**values)
        except UserError as e:
            raise UserError(f"{where}, {e}") from e


SPACES = {
    "full": Space(),
    "small": Space(dense_operators=("fc", "dot_product"), sparse_operators=("efc",)),
    # Depths and widths of Drs.NAS (OSDI 2026): integers 4 to 32, 5 to 9 blocks.
    "narrow": Space(9, dense_widths=tuple(range(4, 33)), sparse_widths=tuple(range(4, 33)), fewest_blocks=5),
}


@dataclass
class SpaceConfig:
    """The search space: a named one, and what is different from it."""

    name: str = option(
        "full",
        "full (all operators) | small (fc, dot_product; efc) | narrow (widths 4-32, 5-9 blocks)",
        choices=tuple(SPACES),
    )
    blocks: int = option(0, "choice blocks, at most; 0 = as in the named space (7; narrow: 9)")
    dense_operators: list[str] = option([], "of fc, dot_product, gating, sum; empty = as in the named space")
    sparse_operators: list[str] = option([], "of efc, attention; empty = as in the named space")
    dense_widths: list[int] = option([], "widths of a dense output; empty = as in the named space (16 ... 1024)")
    sparse_widths: list[int] = option([], "tokens of a sparse output; empty = as in the named space (16 ... 64)")
    max_sources: int = option(0, "most sources a block reads per branch; 0 = as in the named space (4)")
    tokens: int = option(0, "tokens a dense output becomes in the sparse one; 0 = as in the named space (8)")
    width: int = option(0, "embedding width of fields and tokens; 0 = as in the named space (16)")
    fewest_blocks: int = option(
        -1, "depth is searched from so many blocks to `blocks`; 0 = all have `blocks`; -1 = as in the named space"
    )

    def make(self) -> Space:
        """The space that is meant; operators and widths are put into order.

        Raises:
            UserError: an unknown name, or a value out of range.
        """
        if self.name not in SPACES:
            raise UserError(f"space {self.name!r} is none of {', '.join(SPACES)}{nearest(self.name, list(SPACES))}")
        changed: dict[str, Any] = {}
        for f in fields(Space):
            value = getattr(self, f.name)
            if f.name in _OPERATORS:
                known = _OPERATORS[f.name]
                value = tuple(sorted(value, key=lambda n: known.index(n) if n in known else -1))
            elif isinstance(value, list):
                value = tuple(sorted(value))
            unset = -1 if f.name == "fewest_blocks" else 0
            if value not in (unset, ()):
                changed[f.name] = value
        return replace(SPACES[self.name], **changed)

    def check(self, prefix: str = "search.space") -> None:
        """Raises:
        UserError: as :meth:`make`, naming the config key.
        """
        try:
            self.make()
        except UserError as e:
            raise UserError(f"config key {prefix}: {e}") from e


def check(space: Space, architecture: Architecture, searched: bool, where: str) -> None:
    """Check that an architecture belongs to a space.

    Args:
        searched: it must be one the search may propose: enough blocks, one operator in each branch, one source
            on each side of a binary operator, at most ``max_sources`` others. Otherwise it may also be a larger or
            a smaller network of the same parts: the full supernet, a canonical form.
        where: how messages name the source of the architecture, such as a path.

    Raises:
        UserError: what does not belong, with its block and key and what the space allows.
    """
    count, blocks = len(architecture.blocks), space.blocks
    if searched and count < space.depths[0]:
        least = f"{space.depths[0]} to {blocks}" if space.fewest_blocks else f"{blocks}"
        raise UserError(f"{where}: block {count + 1} is missing: the space has {least} blocks, the file {count}")
    if count > blocks:
        raise UserError(
            f"{where}: block {blocks + 1} is outside the space, which has {blocks} blocks; set space.blocks"
        )
    for number, block in enumerate(architecture.blocks, 1):
        for key in ("dense", "sparse"):
            _check_branch(space, block, number, key, searched, where)
        if searched:
            _check_sources(space, block, number, where)


def full(space: Space) -> Architecture:
    """The whole supernet: every operator, every source, the widest outputs, both mergers."""
    blocks = []
    for number in range(1, space.blocks + 1):
        every = tuple(range(number))
        pair = every if space.binary else ()
        blocks.append(
            Block(
                space.dense_operators,
                space.dense_widths[-1],
                space.sparse_operators,
                space.sparse_widths[-1],
                every,
                every,
                pair,
                pair,
                dense_to_sparse=True,
                fm=True,
            )  # fmt: skip
        )
    return Architecture(tuple(blocks))


def size(space: Space) -> float:
    """log10 of the number of encodings of searched architectures of all depths: 43.9 for full, 32.3 for small.

    Every member of every block counts, used or not, but for left and right in a space without gating and sum.
    Different encodings can be the same network (see :mod:`embsearch_dist.networks.canonical`).
    """
    choices = len(space.dense_operators) * len(space.sparse_operators) * len(space.dense_widths)
    choices *= len(space.sparse_widths) * 4  # two mergers, on or off
    total, by_depth = 0.0, []
    for n in range(1, space.blocks + 1):
        sets = sum(math.comb(n, k) for k in range(1, min(n, space.max_sources) + 1))
        total += math.log10(choices) + 2 * math.log10(sets) + (2 * math.log10(n) if space.binary else 0.0)
        by_depth.append(total)
    return total + math.log10(sum(10 ** (by_depth[d - 1] - total) for d in space.depths))


def load(path: Path | str, searched: bool = False) -> tuple[Architecture, Space]:
    """Read an architecture file with the space it came from, and check that they belong together.

    Raises:
        UserError: see :meth:`Architecture.from_json`, :meth:`Space.from_json` and :func:`check`; also a file
            without a space.
    """
    body = read_architecture(path)
    architecture = Architecture.from_json(body, str(path))
    if "space" not in body:
        raise UserError(f'{path}: key "space" is missing: write the space the architecture belongs to')
    space = Space.from_json(body["space"], str(path))
    check(space, architecture, searched, str(path))
    return architecture, space


def _check_branch(space: Space, block: Block, number: int, key: str, searched: bool, where: str) -> None:
    names, width = getattr(block, key), getattr(block, f"{key}_width")
    operators, widths = getattr(space, f"{key}_operators"), getattr(space, f"{key}_widths")
    for name in names:
        if name not in operators:
            allowed = ", ".join(operators)
            raise _wrong(where, number, key, f'operator "{name}" is not in the space; allowed: {allowed}')
    if searched and len(names) != 1:
        raise _wrong(
            where, number, key, f"needs exactly one operator, got {len(names)}; allowed: {', '.join(operators)}"
        )
    if names and width not in widths:
        allowed = ", ".join(map(str, widths))
        raise _wrong(where, number, f"{key}_width", f"width {width} is not in the space; allowed: {allowed}")


def _check_sources(space: Space, block: Block, number: int, where: str) -> None:
    for key in ("dense_sources", "sparse_sources"):
        count, most = len(getattr(block, key)), space.max_sources
        if count > most:
            raise _wrong(where, number, key, f"{count} sources; allowed: at most {most}")
    for key in ("left", "right"):
        count = len(getattr(block, key))
        if count > 1:
            raise _wrong(where, number, key, f"{count} sources; allowed: one")


def _wrong(where: str, number: int, key: str, message: str) -> UserError:
    return UserError(f'{where}, block {number}, key "{key}": {message}')
