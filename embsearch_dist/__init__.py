"""embsearch_dist: find how wide each categorical feature's embedding should be, then train that model.

    import embsearch_dist as es

    es.Allocation.load("runs/my/allocation.json").embedding_bag_configs()    found widths as TorchRec's tables
    es.load_model("exported/my").predict(frame)                              probabilities of raw rows
    es.search("my.yaml", run_dir="runs/my", settings={"search.budget": "25%"})
    es.retrain("runs/my")
    es.open_data("runs/data/my").batches("train")
    @es.register_backbone("mine")                                            a class of your own as model.backbone

See :mod:`embsearch_dist.api`, and docs/library.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from embsearch_dist.api import (
        Allocation,
        ArraySource,
        Data,
        DataSource,
        Field,
        Model,
        Schema,
        Supernet,
        UserError,
        evaluate,
        load_model,
        open_data,
        register_backbone,
        register_source,
        retrain,
        search,
        search_widths,
    )

__all__ = [
    "Allocation",
    "ArraySource",
    "Data",
    "DataSource",
    "Field",
    "Model",
    "Schema",
    "Supernet",
    "UserError",
    "evaluate",
    "load_model",
    "open_data",
    "register_backbone",
    "register_source",
    "retrain",
    "search",
    "search_widths",
]


def __getattr__(name: str) -> Any:
    # On first use: a start of every script reads this file before it has set what must be set before torch loads.
    if name == "register_backbone":  # not by way of the api: a server that needs a class of the user's has no TorchRec
        from embsearch_dist.config.backbones import register_backbone

        return register_backbone
    if name in __all__:
        from embsearch_dist import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
