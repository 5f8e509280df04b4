"""Options of the built-in backbones that have some: the keys of ``model.options``. Read without loading a backbone."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option, require


@dataclass
class AutoIntOptions:
    """Options of AutoInt."""

    layers: int = option(3, "attention layers", low=1)
    heads: int = option(2, "heads of each", low=1)
    head_width: int = option(16, "d': width of a head", low=1)


@dataclass
class DCNv2Options:
    """Options of DCN-V2."""

    layers: int = option(3, "cross layers", low=1)
    rank: int = option(0, "of the cross layers' matrices, W = U V^T; 0 = full", low=0)
    structure: str = option(
        "parallel",
        "parallel | stacked: the MLP beside the cross layers, or behind them",
        choices=("parallel", "stacked"),
    )


@dataclass
class FinalMLPOptions:
    """Options of FinalMLP."""

    second: list[int] = option([], "hidden layers of the second stream; empty: model.hidden, as the first")
    heads: int = option(2, "k: heads of the bilinear fusion, which divide the last layer of either stream", low=1)
    gate: list[int] = option([], "hidden layers of each stream's gate on the features; empty: no gates")

    def check(self) -> None:
        for key in ("second", "gate"):
            widths = getattr(self, key)
            require(all(h > 0 for h in widths), f"model.options.{key}", f"every width must be above 0, got {widths}")


@dataclass
class MaskNetOptions:
    """Options of MaskNet."""

    structure: str = option(
        "parallel",
        "parallel | serial: every block on the embeddings, or each on the block before",
        choices=("parallel", "serial"),
    )
    blocks: int = option(3, "mask blocks", low=1)
    block_width: int = option(64, "outputs of a block", low=1)
    ratio: float = option(2.0, "r = t / z: aggregation layer of a mask against what it masks", above=0)


@dataclass
class XDeepFMOptions:
    """Options of xDeepFM."""

    maps: list[int] = option([64, 64], "H_k: feature maps of each layer of the CIN")

    def check(self) -> None:
        good = bool(self.maps) and all(h > 0 for h in self.maps)
        require(good, "model.options.maps", f"needs a layer, and every width above 0, got {self.maps}")


BUILT_IN: dict[str, type] = {
    "autoint": AutoIntOptions,
    "dcnv2": DCNv2Options,
    "finalmlp": FinalMLPOptions,
    "masknet": MaskNetOptions,
    "xdeepfm": XDeepFMOptions,
}
"""Name -> its options. The class of that name is in ``models/backbones/NAME.py``."""
