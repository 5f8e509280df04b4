"""Where the data of a run lie: a folder, or a URL whose data are fetched first, once a machine."""

from __future__ import annotations

import os
from pathlib import Path

from embsearch_dist.config.sections import Config, fetched_from
from embsearch_dist.ranks.context import Context
from embsearch_dist.stores.fetch import fetch_prepared
from embsearch_dist.stores.urls import is_url, local_folder
from embsearch_dist.stores.waiting import wait_for_all


def bring_data(config: Config, context: Context) -> None:
    """Let ``data.path`` be a folder of this machine on every rank; its URL stays what a saved config names.

    Local rank 0 of each machine fetches, and all ranks wait for it.

    Raises:
        UserError: what :func:`embsearch_dist.stores.fetch.fetch_prepared` finds, on all ranks.
    """
    url = config.data.path
    if not is_url(url):
        return
    folder: list[Path] = []

    def say(text: str) -> None:
        if context.rank == 0:
            print(text, flush=True)

    def find() -> None:
        folder.append(local_folder(url) or fetch_prepared(url, say))

    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    wait_for_all(context, "fetching the data", find if first else lambda: None)
    with context.together("looking for the fetched data"):
        if not first:
            find()
    config.data.path = fetched_from(url, folder[0])
