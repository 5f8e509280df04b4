"""The search methods, in one explicit table. Adding one means adding a folder and a line here."""

from __future__ import annotations

from embsearch_dist.methods.adafs.method import AdaFS
from embsearch_dist.methods.adass.method import AdaSS
from embsearch_dist.methods.autodim.method import AutoDim
from embsearch_dist.methods.autoemb.method import AutoEmb
from embsearch_dist.methods.autofield.method import AutoField
from embsearch_dist.methods.autosrh.method import AutoSrh
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.esapn.method import ESAPN
from embsearch_dist.methods.ihas.method import IHAS
from embsearch_dist.methods.ihas_widths.method import IHASWidths
from embsearch_dist.methods.mde.method import MDE
from embsearch_dist.methods.nasrec.method import NASRec
from embsearch_dist.methods.optembed.method import OptEmbed
from embsearch_dist.methods.optfs.method import OptFS
from embsearch_dist.methods.pep.method import PEP
from embsearch_dist.methods.random.method import Random
from embsearch_dist.methods.sseds.method import SSEDS
from embsearch_dist.methods.truncation.method import Truncation
from embsearch_dist.methods.ues import UES
from embsearch_dist.methods.utilities.auto import Auto
from embsearch_dist.methods.utilities.method import Utilities

METHODS: dict[str, type[Method]] = {
    "adafs": AdaFS,
    "adass": AdaSS,
    "auto": Auto,
    "autodim": AutoDim,
    "autoemb": AutoEmb,
    "autofield": AutoField,
    "autosrh": AutoSrh,
    "esapn": ESAPN,
    "ihas": IHAS,
    "ihas_widths": IHASWidths,
    "mde": MDE,
    "nasrec": NASRec,
    "optembed": OptEmbed,
    "optfs": OptFS,
    "pep": PEP,
    "random": Random,
    "sseds": SSEDS,
    "truncation": Truncation,
    "ues": UES,
    "utilities": Utilities,
}
CONFIGS: dict[str, type] = {name: method.config for name, method in METHODS.items()}
"""Method -> dataclass of its ``search`` section, as :func:`embsearch_dist.config.read.load_config` takes them."""
