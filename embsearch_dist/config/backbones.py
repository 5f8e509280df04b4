"""The names that ``model.backbone`` knows: built-in ones, and those that a user's own module registers.

They are kept below the models, because a config is checked before any model is made.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from embsearch_dist.config.backbone_options import BUILT_IN
from embsearch_dist.config.options import check_section, require
from embsearch_dist.errors import UserError, nearest

ADDITIVE = ("wide_deep", "deepfm", "fm", "mlp")
"""Sums over fields up to the first non-linearity: ``models/backbones/additive.py``."""
FIXED = (*ADDITIVE, "dlrm", "nasrec")
"""Names that no class can take; all others are registered."""
ARGUMENTS = ("fields", "width", "dense", "hidden", "dropout")
BACKBONES = "embsearch_dist.models.backbones"
"""Package of the built-in ones, each in a module of its name."""

T = TypeVar("T")


@dataclass(frozen=True)
class Registered:
    """A class that stands behind a name.

    Attributes:
        make: the class; called with :data:`ARGUMENTS`, and with ``options`` where it has some.
        options: its dataclass of options, or None.
        source: the file that registered it; classes typed into a notebook have their module's name.
    """

    make: Callable[..., Any]
    options: type | None
    source: str


_known: dict[str, Registered] = {}


def register_backbone(name: str) -> Callable[[type[T]], type[T]]:
    """Make a ``torch.nn.Module`` class usable as ``model.backbone: NAME``.

    A backbone is what stands behind the embeddings. What is asked of the class:

    * ``__init__`` takes these named arguments: ``fields`` (F, int; of a found model the fields that are kept),
      ``width`` (d, int: the common width of the embeddings), ``dense`` (n, int: dense columns, may be 0), ``hidden``
      (list of int: ``model.hidden``) and ``dropout`` (float: ``model.dropout``).
    * ``forward(u, dense)`` gives logits ``[B]`` of ``u [B, F, d]`` and ``dense [B, n]``. Fields come in the order of
      the schema and at one width: a transform or zeros have seen to it. In a supernet a dropped field is zeros.
    * Every parameter has a gradient in every step, because DDP waits for all. A row's logit depends on that row
      alone: LayerNorm is fine; BatchNorm would have other statistics on each rank.
    * ``Options``, if the class has it, is a dataclass with defaults: the keys of ``model.options``. The constructor
      then takes ``options``, an instance that has been checked. Fields made with
      :func:`embsearch_dist.config.options.option` have a help text and bounds.
    * ``flops``, if it has it, is the number of floating-point operations of one row (multiply and add are two) beside
      those of the ``nn.Linear`` layers, which are counted as one call a row.

    Raises:
        UserError: the name is taken, or the constructor lacks an argument.
    """

    def registered(cls: type[T]) -> type[T]:
        where = f"register_backbone({name!r})"
        if not name or not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{where}: a name has letters, digits, _ and -. Give another")
        source = getattr(sys.modules.get(cls.__module__), "__file__", None) or cls.__module__
        old = _known.get(name)
        ours = name in BUILT_IN and cls.__module__ == f"{BACKBONES}.{name}"
        if name in FIXED or (name in BUILT_IN and not ours) or (old is not None and old.source != source):
            raise UserError(f"{where} in {source}: the name is taken{f' by {old.source}' if old else ''}. Give another")
        options = getattr(cls, "Options", None)
        if options is not None and not dataclasses.is_dataclass(options):
            raise UserError(f"{where}: Options must be a dataclass. Write @dataclass above it")
        arguments = (*ARGUMENTS, *(["options"] if options is not None else []))
        try:
            inspect.signature(cls).bind(**dict.fromkeys(arguments))
        except TypeError as e:
            raise UserError(
                f"{where}: __init__ is called with the named arguments {', '.join(arguments)} ({e}). Let it take them"
            ) from e
        _known[name] = Registered(cls, options, source)  # type: ignore[arg-type]
        return cls

    return registered


def registered_names() -> list[str]:
    """All names behind which a class stands, built-in ones first."""
    return list(dict.fromkeys([*BUILT_IN, *_known]))


def options_of(name: str) -> type | None:
    """The dataclass of a name's options; None where it has none. No built-in class is loaded for it.

    Raises:
        UserError: nothing has that name.
    """
    return BUILT_IN[name] if name in BUILT_IN else registered(name).options


def registered(name: str) -> Registered:
    """What stands behind a registered name; behind a built-in one once its package is loaded.

    Raises:
        UserError: nothing does.
    """
    if name not in _known:
        raise UserError(_unknown(name, ""))
    return _known[name]


def check_backbone(name: str, module: str, options: Mapping[str, Any]) -> None:
    """Check ``model.backbone`` and ``model.options``; ``module`` was loaded before.

    Raises:
        UserError: nothing of that name is known, or an option is none of its own.
    """
    if name not in FIXED and name not in registered_names():
        raise UserError(f"config key model.backbone: {_unknown(name, module)}")
    if name in FIXED:
        require(not options, "model.options", f"the backbone {name} has none, got {', '.join(options)}")
    else:
        read_options(name, options)


def read_options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of a registered backbone with the given ones put in, typed and checked; None where it has none.

    Raises:
        UserError: an unknown key, a wrong type, or a value out of range.
    """
    kind = options_of(name)
    if kind is None:
        require(not given, "model.options", f"the backbone {name} has none, got {', '.join(map(str, given))}")
        return None
    known = [f.name for f in dataclasses.fields(kind)]
    for key in given:
        told = f"unknown config key 'model.options.{key}'{nearest(str(key), known)}; {name} has {', '.join(known)}"
        if key not in known:
            raise UserError(told)
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(given)))
    except OmegaConfBaseException as e:
        where = getattr(e, "full_key", "") or "?"
        raise UserError(f"config key model.options.{where}: {str(e).splitlines()[0]}") from e
    check_section(made, "model.options")
    return made


def _unknown(name: str, module: str) -> str:
    known = [*FIXED, *registered_names()]
    own = f"{module} registers no class of that name" if module else "model.module loads a class of your own"
    return f"{name!r} is none of {', '.join(known)}{nearest(name, known)}; {own} (@es.register_backbone({name!r}))"
