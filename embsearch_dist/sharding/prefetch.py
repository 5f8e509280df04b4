"""A batch's ids on their way to the ranks that hold its tables; the next batch's may set out before it is needed.

TorchRec exchanges ids in two rounds: how many each rank gets, for which every rank's host waits, then the ids. Done
inside a forward pass, both are waited for with nothing else to do. Here the first round of the next batch is begun
before the backward pass of this one, and the second as soon as the ranks have agreed on this step: the waiting is
over by then. All ranks must do this at the same points of their steps, as with every collective.
"""

from __future__ import annotations

from typing import Any

from torchrec import KeyedJaggedTensor, KeyedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.dist_data import KJTAllToAllSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList

from embsearch_dist.ranks.context import Context
from embsearch_dist.sharding.row_map import RowMap


class InputExchange:
    """Look-ups of a sharded collection, in the parts that TorchRec's own forward pass is made of.

    Args:
        collection: the tables.
        context: whose ranks hold them.
        rows: what ids look up where that is not the row of the same number.
    """

    def __init__(self, collection: DistributedModelParallel, context: Context, rows: RowMap | None = None) -> None:
        self._tables: Any = collection.module
        self._rows = rows
        self._alone = context.world_size == 1
        # Over gloo, whose exchange takes the cores that compute, it gains nothing (0.97 to 1.01 of the speed without).
        self.ahead = not self._alone and context.device.type == "cuda"
        """Whether a trainer should say what it expects."""
        self._next: KeyedJaggedTensor | None = None
        self._begun: tuple[KeyedJaggedTensor, Any, Any] | None = None

    def expect(self, sparse: KeyedJaggedTensor | None) -> None:
        """What will be looked up after the batch in hand; None: nothing is known of that. Ranks know alike."""
        self._next = sparse

    def begin(self) -> None:
        """Start the first round for what is expected."""
        if self._next is not None and not self._alone:  # one rank has nothing to exchange
            self._begun = (self._next, *self._start(self._next))
        self._next = None

    def advance(self) -> None:
        """Finish the first round of what was begun, and start the second."""
        if self._begun is not None:
            sparse, state, waiting = self._begun
            self._begun = sparse, state, _Arrived(waiting.wait())

    def look_up(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        """The pooled embeddings of a batch, by the exchange that was begun for this very object if there is one."""
        if self._begun is not None and self._begun[0] is sparse:
            _, state, waiting = self._begun
            self._begun = None
        else:
            state, waiting = self._start(sparse)
        ids = self._own(state, waiting) if self._alone else waiting.wait().wait()
        return self._tables.compute_and_output_dist(state, ids)

    def _start(self, sparse: KeyedJaggedTensor) -> tuple[Any, Any]:
        state = self._tables.create_context()
        return state, self._tables.input_dist(state, self._rows(sparse) if self._rows else sparse)

    def _own(self, state: Any, waiting: Any) -> KJTList:
        """What one rank keeps. TorchRec's waits would give the same, but for every batch they copy an order of the
        fields to the device that only an exchange with others needs."""
        parts = []
        for one, kept in zip(waiting.awaitables, state.sharding_contexts, strict=True):
            if isinstance(one, KJTAllToAllSplitsAwaitable):
                kept.batch_size_per_rank = [one._input.stride()]
                parts.append(one._input)
            else:
                parts.append(one.wait().wait())
        return KJTList(parts)


class _Arrived:
    """A first round that has been waited for; what it gave waits for the second."""

    def __init__(self, second: Any) -> None:
        self._second = second

    def wait(self) -> Any:
        return self._second
