"""The mirror of a run, as all ranks of a job see it: rank 0 fetches and sends, the others wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from embsearch_dist.config.sections import Config
from embsearch_dist.ranks.context import Context
from embsearch_dist.rundir import emptied_by_this_job
from embsearch_dist.stores.mirror import Mirror, wait_for_pushes, watched
from embsearch_dist.stores.states import emptied_there, restore
from embsearch_dist.stores.waiting import wait_for_all

STOPPED_S = 25.0  # for uploads when the run ends before its time: schedulers give half a minute
BROKEN_S = 5.0


@contextlib.contextmanager
def mirroring(config: Config, context: Context) -> Iterator[None]:
    """For the block, the run directory of a config has its mirror; nothing happens where ``run.mirror`` is empty.

    First the directory is fetched if it is empty. Sealed checkpoints and finished stages go up beside training
    (:func:`embsearch_dist.stores.mirror.changed`), and what is there at the end goes up before the block is left.

    Raises:
        UserError: the mirror cannot be read, is of another run, or lacks the end of this one; on all ranks.
    """
    if not config.run.mirror:
        yield
        return
    home, mirrors = Path(config.run.dir), list[Mirror]()

    def say(text: str) -> None:
        print(text, flush=True)

    def begin() -> None:
        # Another machine may go on with what this job has begun, and finds it in the mirror alone.
        if not config.run.overwrite or emptied_there(config.run.mirror):
            restore(home, config.run.mirror, say)
        mirrors.append(Mirror(home, config.run.mirror, config.run.overwrite and not emptied_by_this_job(home)))

    first = context.rank == 0
    wait_for_all(context, "looking at the mirror", begin if first else _nothing)
    with contextlib.ExitStack() as stack:
        for mirror in mirrors:
            stack.enter_context(watched(mirror))
        try:
            yield
        except BaseException:
            wait_for_pushes(BROKEN_S)  # not together: the other ranks may be anywhere
            raise
        wait_for_all(context, "mirroring", mirrors[0].finish if first else _nothing)
        if first:
            say(f"mirrored to {mirrors[0].store.at('')}")


def settle(context: Context) -> None:
    """Before all ranks stop, because they were told to: give the last checkpoint time to come up."""
    wait_for_all(context, "mirroring", lambda: wait_for_pushes(STOPPED_S))


def _nothing() -> None:
    pass
