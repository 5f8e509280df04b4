"""The search methods, in one explicit table. Adding one means adding a folder and a line here.

Only what is asked for is loaded: names and options of all methods are known without torch, so that ``--help`` and a
mistake in a config are told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from embsearch_dist.methods.base import Method

T = TypeVar("T")

TABLE = {  # method -> its options, and what it does; modules of this folder
    "adafs": ("adafs.config.AdaFSConfig", "adafs.method.AdaFS"),
    "adass": ("adass.config.AdassConfig", "adass.method.AdaSS"),
    "auto": ("utilities.config.AutoConfig", "utilities.auto.Auto"),
    "autodim": ("autodim.config.AutoDimConfig", "autodim.method.AutoDim"),
    "autoemb": ("autoemb.config.AutoEmbConfig", "autoemb.method.AutoEmb"),
    "autofield": ("autofield.config.AutoFieldConfig", "autofield.method.AutoField"),
    "autosrh": ("autosrh.config.AutoSrhConfig", "autosrh.method.AutoSrh"),
    "esapn": ("esapn.config.ESAPNConfig", "esapn.method.ESAPN"),
    "ihas": ("ihas.config.IHASConfig", "ihas.method.IHAS"),
    "ihas_widths": ("ihas_widths.config.IHASWidthsConfig", "ihas_widths.method.IHASWidths"),
    "mde": ("mde.config.MDEConfig", "mde.method.MDE"),
    "nasrec": ("nasrec.config.NASRecConfig", "nasrec.method.NASRec"),
    "optembed": ("optembed.config.OptEmbedConfig", "optembed.method.OptEmbed"),
    "optfs": ("optfs.config.OptFSConfig", "optfs.method.OptFS"),
    "pep": ("pep.config.PEPConfig", "pep.method.PEP"),
    "random": ("random.config.RandomConfig", "random.method.Random"),
    "sseds": ("sseds.config.SSEDSConfig", "sseds.method.SSEDS"),
    "truncation": ("truncation.config.TruncationConfig", "truncation.method.Truncation"),
    "ues": ("ues.config.UESConfig", "ues.method.UES"),
    "utilities": ("utilities.config.UtilitiesConfig", "utilities.method.Utilities"),
}


class _Loaded(Mapping[str, T]):
    """Name -> what stands in a module of this folder, which is loaded when it is first asked for."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._found: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            module, _, kind = self._places[name].rpartition(".")
            self._found[name] = getattr(import_module(f"{__name__}.{module}"), kind)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


METHODS: Mapping[str, type[Method]] = _Loaded({name: method for name, (_, method) in TABLE.items()})
CONFIGS: Mapping[str, type] = _Loaded({name: options for name, (options, _) in TABLE.items()})
"""Method -> dataclass of its ``search`` section, as :func:`embsearch_dist.config.read.load_config` takes them."""
