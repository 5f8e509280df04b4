"""An architecture of NASRec: a chain of blocks, each with a dense and a sparse branch. A JSON file a person can read.

A block sees the outputs of the stem (source 0) and of the blocks before it (source k = block k; blocks count from
1). Its dense branch makes D ``[B, Dd]``, its sparse branch S ``[B, Ns, width]``; the two mergers read D and S as the
operators left them::

    D' = D + LN(Linear(FM(S)))                        if fm
    S' = concat(S, LN(Linear(D)) as tokens)           if dense_to_sparse

Later blocks and the head see D' and S'. The head is one linear unit on D' and the flattened S' of the last block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from embsearch_dist.errors import UserError, nearest
from embsearch_dist.files import read_sealed, write_sealed

FORMAT = 1
KIND = "architecture"
RESULT = "architecture.json"
"""What a search for networks, and a training of one, calls the file."""
DENSE_OPERATORS = ("fc", "dot_product", "gating", "sum")
SPARSE_OPERATORS = ("efc", "attention")
BINARY_OPERATORS = ("gating", "sum")  # read left and right; the other dense operators read dense_sources
HEADS = 8  # of the attention operator
_FILE_KEYS = ("format", "kind", "space", "provenance", "blocks")
# Lists that may also be written as their one member.
_NAMES = {"dense": DENSE_OPERATORS, "sparse": SPARSE_OPERATORS}
_SOURCES = ("dense_sources", "sparse_sources", "left", "right")
_WIDTHS = ("dense_width", "sparse_width")
_FLAGS = ("dense_to_sparse", "fm")


@dataclass(frozen=True)
class Block:
    """One block. Operators and sources are tuples without repetition, in a fixed order; a searched block has one
    dense and one sparse operator and one source each on ``left`` and ``right``.

    A branch without operators is absent (width 0): the canonical form drops what nothing reads that way.

    Attributes:
        dense: operators whose outputs are summed to D, in the order of ``DENSE_OPERATORS``.
        dense_width: Dd, columns of D.
        sparse: operators whose outputs are summed to S, in the order of ``SPARSE_OPERATORS``.
        sparse_width: Ns, tokens of S; a token has the embedding width.
        dense_sources: read by fc and dot_product: the dense outputs of these sources, side by side.
        sparse_sources: read by efc, attention and dot_product: the tokens of these sources, one after the other.
        left, right: dense sources of gating and sum. In gating the gate is made of all of ``left``, and its first
            columns weigh each source of ``right``; in sum all are filled up with zeros to one width and added.
        dense_to_sparse: D becomes further tokens of the block's sparse output.
        fm: the factorization machine of S is added to the block's dense output.
    """

    dense: tuple[str, ...]
    dense_width: int
    sparse: tuple[str, ...]
    sparse_width: int
    dense_sources: tuple[int, ...]
    sparse_sources: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    dense_to_sparse: bool
    fm: bool

    @property
    def reads_dense(self) -> bool:
        """Whether an operator reads ``dense_sources``."""
        return "fc" in self.dense or "dot_product" in self.dense

    @property
    def reads_sparse(self) -> bool:
        """Whether an operator reads ``sparse_sources``."""
        return bool(self.sparse) or "dot_product" in self.dense

    @property
    def reads_pair(self) -> bool:
        """Whether an operator reads ``left`` and ``right``."""
        return any(name in BINARY_OPERATORS for name in self.dense)

    def to_json(self) -> dict[str, Any]:
        """The block as JSON can hold it; a tuple of one operator, or of one source on a side, as its member."""
        body: dict[str, Any] = {}
        for key in KEYS:
            value = getattr(self, key)
            if isinstance(value, tuple):
                single = len(value) == 1 and key not in ("dense_sources", "sparse_sources")
                value = value[0] if single else list(value)
            body[key] = value
        return body


KEYS = tuple(f.name for f in fields(Block))


@dataclass(frozen=True)
class Architecture:
    """The blocks of a network, first to last.

    Raises:
        UserError: an unknown operator, a source that does not come before its block, a width that is no width,
            a source or a branch that is needed and missing; the message names block and key.
    """

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise UserError("an architecture needs at least one block")
        for number, block in enumerate(self.blocks, 1):
            _check_block(number, block, self.blocks)
        last = self.blocks[-1]
        for key in ("dense", "sparse"):
            if not getattr(last, key):
                raise _wrong(len(self.blocks), key, f"the head reads the last block: name one of {_allowed(key)}")

    def to_json(self) -> dict[str, Any]:
        """The body of an architecture file, without the space and the provenance :meth:`save` may add."""
        return {"format": FORMAT, "kind": KIND, "blocks": [block.to_json() for block in self.blocks]}

    @classmethod
    def from_json(cls, body: object, where: str) -> Architecture:
        """Read the body of an architecture file; operators and sources may stand in any order.

        Args:
            where: how messages name the source of ``body``, such as a path.

        Raises:
            UserError: not an architecture, a missing or unknown key, a wrong type, or blocks that fit no network.
        """
        if not isinstance(body, Mapping):
            raise UserError(f"{where}: expected a JSON object with the keys {', '.join(_FILE_KEYS)}")
        for key in body:
            if key not in _FILE_KEYS:
                raise UserError(f"{where}: unknown key {key!r}{_near(key, _FILE_KEYS)}; known: {', '.join(_FILE_KEYS)}")
        if body.get("kind") != KIND:
            raise UserError(f'{where}: not an architecture: "kind" is {body.get("kind")!r}, it must be "{KIND}"')
        if body.get("format") != FORMAT or isinstance(body["format"], bool):
            raise UserError(f'{where}: "format" is {body.get("format")!r}, this version reads format {FORMAT}')
        blocks = body.get("blocks")
        if not isinstance(blocks, list) or not blocks:
            raise UserError(f'{where}: "blocks" must be a list of at least one block (an object each)')
        try:
            return cls(tuple(_block(number, block) for number, block in enumerate(blocks, 1)))
        except UserError as e:
            raise UserError(f"{where}, {e}") from e

    def save(self, path: Path | str, **more: object) -> None:
        """Write the architecture as JSON.

        Args:
            more: ``space`` (of :meth:`Space.to_json <embsearch_dist.networks.space.Space.to_json>`) and
                ``provenance``, written beside the blocks.
        """
        body = self.to_json()
        blocks = body.pop("blocks")
        write_sealed(Path(path), {**body, **more, "blocks": blocks})

    @classmethod
    def load(cls, path: Path | str) -> Architecture:
        """Read a file :meth:`save` or a person wrote.

        Raises:
            UserError: no such file, not JSON, or not an architecture (see :meth:`from_json`).
        """
        return cls.from_json(read_architecture(path), str(path))


def read_architecture(path: Path | str) -> dict[str, Any]:
    """The JSON object in an architecture file; what cannot be read is a ``UserError`` that names the file."""
    try:
        body = read_sealed(Path(path))
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a text file, so not an architecture (JSON)") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    return {k: v for k, v in body.items() if k != "sha256"}


def _block(number: int, body: object) -> Block:
    """A block from JSON; raises the message without the file's name."""
    if not isinstance(body, Mapping):
        raise UserError(f"block {number}: expected an object with the keys {', '.join(KEYS)}, got {_shown(body)}")
    for key in body:
        if key not in KEYS:
            raise UserError(f"block {number}: unknown key {key!r}{_near(key, KEYS)}; known: {', '.join(KEYS)}")
    for key in KEYS:
        if key not in body:
            raise UserError(f'block {number}: key "{key}" is missing; write {_form(key)}')
    return Block(**{key: _value(number, key, body[key]) for key in KEYS})


def _value(number: int, key: str, value: Any) -> Any:
    """A member of a block from JSON, its lists put into order."""
    if key in _WIDTHS:
        if not is_int(value):
            raise _wrong(number, key, f"expected {_form(key)}, got {_shown(value)}")
        return value
    if key in _FLAGS:
        if not isinstance(value, bool):
            raise _wrong(number, key, f"expected {_form(key)}, got {_shown(value)}")
        return value
    members = value if isinstance(value, list) else [value]
    named = key in _NAMES
    for member in members:
        if not (isinstance(member, str) if named else is_int(member)):
            raise _wrong(number, key, f"expected {_form(key)}, got {_shown(value)}")
    if not named:
        return tuple(sorted(members))
    for member in members:
        if member not in _NAMES[key]:
            near = nearest(member, _NAMES[key])
            raise _wrong(number, key, f'unknown operator "{member}"{near}; allowed: {_allowed(key)}')
    return tuple(sorted(members, key=_NAMES[key].index))


def _check_block(number: int, block: Block, blocks: Sequence[Block]) -> None:
    for key, known in _NAMES.items():
        names = getattr(block, key)
        for name in names:
            if name not in known:
                near = nearest(str(name), known)
                raise _wrong(number, key, f'unknown operator "{name}"{near}; allowed: {_allowed(key)}')
        if list(names) != sorted(set(names), key=known.index):
            raise _wrong(number, key, f"write each operator once, in the order {_allowed(key)}; got {list(names)}")
        width = getattr(block, f"{key}_width")
        if names and not (is_int(width) and width >= 1):
            raise _wrong(number, f"{key}_width", f"expected a whole number above 0, got {_shown(width)}")
        if not names and (width != 0 or block.fm or block.dense_to_sparse):
            raise _wrong(number, key, f"name one of {_allowed(key)} (a block without it has width 0 and no mergers)")
    needed = (block.reads_dense, block.reads_sparse, block.reads_pair, block.reads_pair)
    for key, read in zip(_SOURCES, needed):
        _check_sources(number, key, getattr(block, key), read, blocks)
    if not block.dense and not block.sparse:
        raise UserError(f"block {number} has no operator; leave it out")


def _check_sources(number: int, key: str, sources: tuple[int, ...], read: bool, blocks: Sequence[Block]) -> None:
    allowed = "0 (the input)" if number == 1 else f"0 (the input) to {number - 1} (the block before)"
    if read and not sources:
        raise _wrong(number, key, f"an operator of the block reads it, so it needs a source; allowed: {allowed}")
    for source in sources:
        if not (is_int(source) and 0 <= source < number):
            what = "is the block itself" if source == number else "comes later" if is_int(source) else "is no number"
            if source in range(number, len(blocks) + 1):
                raise _wrong(number, key, f"block {source} {what}; allowed: {allowed}")
            raise _wrong(number, key, f"there is no block {source!r}; allowed: {allowed}")
    if list(sources) != sorted(set(sources)):
        raise _wrong(number, key, f"write each source once, ascending; got {list(sources)}")
    branch = "sparse" if key == "sparse_sources" else "dense"
    if read:
        for source in sources:
            if source and not getattr(blocks[source - 1], branch):
                raise _wrong(number, key, f"block {source} has no {branch} branch to read")


def _form(key: str) -> str:
    """What the value of a key looks like, for messages."""
    if key in _WIDTHS:
        return "a whole number"
    if key in _FLAGS:
        return "true or false"
    if key in _NAMES:
        return f"one of {_allowed(key)}, or a list of them"
    return "a list of block numbers (0 = the input)" if key.endswith("sources") else "a block number (0 = the input)"


def _allowed(key: str) -> str:
    return ", ".join(_NAMES[key])


def _wrong(number: int, key: str, message: str) -> UserError:
    return UserError(f'block {number}, key "{key}": {message}')


def is_int(value: object) -> bool:
    """Whether a value from JSON is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _near(key: object, known: Sequence[str]) -> str:
    return nearest(str(key), known)


def _shown(value: object) -> str:
    """A value as it stands in the file, cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
