"""A YAML file and dotted overrides -> a checked :class:`Config`.

Precedence: command line > YAML file > the file's ``base`` > the defaults of the sections. An unknown key is an error
that offers the nearest name. ``python launch/search.py --config FILE --print-config`` prints what a run would use.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from embsearch_dist.config.dotted import layers_of
from embsearch_dist.config.literal import HELD, plain
from embsearch_dist.config.options import one_of
from embsearch_dist.config.sections import SECTIONS, Config
from embsearch_dist.errors import UserError, nearest

OPEN = ("dist.tables", "model.options")  # mappings whose keys the sections do not list


def load_config(
    methods: Mapping[str, type], file: str | Path | None = None, overrides: Sequence[str] = (), method: str = ""
) -> Config:
    """Read a YAML file and dotted overrides (``"train.epochs=3"``) into a checked :class:`Config`.

    Args:
        methods: method name -> dataclass of its ``search`` section.
        method: used when neither the file nor an override names one.

    Raises:
        UserError: unknown key (nearest name offered), wrong type, or a value out of range.
    """
    given = [(key, value) for key, _, value in (item.partition("=") for item in overrides)]
    # Environment variables and other keys are put in on demand alone: a file of a stranger's must not read them.
    literal = not any(key == "run.interpolate" and value.lower() == "true" for key, value in given)
    layers = _layers(Path(file), literal) if file is not None else []
    name = method
    for layer, _ in layers:
        name = str(layer.get("method", name))
    name = next((value for key, value in reversed(given) if key == "method"), name)
    if not name:
        raise UserError(f"no method is named; add 'method: NAME' to the config file (one of {', '.join(methods)})")
    one_of("method", name, list(methods))
    base = copy.deepcopy(_defaults(name, methods[name]))
    if layers and _is_record(layers[-1][0]):
        was = {k: _before(cls) for k, cls in {**SECTIONS, "search": methods[name]}.items()}
        base.merge_with(was)
    where = f"{file}: " if file is not None else ""
    for layer, source in [*layers, *((layer, "") for layer in layers_of(given, base, literal))]:
        try:
            _reject_unknown(layer, base, "")
            _drop_options(layer, base)
            base.merge_with(layer)  # in place: OmegaConf.merge would copy the whole config
        except UserError as e:
            raise UserError(f"{source}{e}") from e
        except OmegaConfBaseException as e:
            key = getattr(e, "full_key", "") or "?"
            raise UserError(f"{source}config key {key}: {str(e).splitlines()[0]}") from e
    try:
        parts = {k: plain(OmegaConf.to_object(base[k])) for k in [*SECTIONS, "search"]}
    except OmegaConfBaseException as e:
        raise UserError(f"{where}config key {getattr(e, 'full_key', '') or '?'}: {str(e).splitlines()[0]}") from e
    config = Config(method=name, **parts)  # type: ignore[arg-type]
    if config.run.interpolate and literal:
        raise UserError(f"{where}config key run.interpolate: belongs on the command line, --run.interpolate true")
    config.run.interpolate = False  # what was put in is literal text from now on
    if not config.run.dir:
        # The folder of a shipped config names the data set: configs/criteo/adass_deepfm.yaml.
        stem = f"{Path(file).parent.name}_{Path(file).stem}".lstrip("_") if file else name
        config.run.dir = str(Path("runs") / stem)
    try:
        config.check()
    except UserError as e:
        # Without overrides it can only be the file; with them, the key that is named tells.
        raise UserError(f"{where}{e}" if not given else str(e)) from e
    return config


def check_keys(methods: Mapping[str, type], overrides: Sequence[str]) -> None:
    """Refuse overrides whose keys no config has, before any file is read. Keys of ``search`` are the method's and are
    left to :func:`load_config`.

    Raises:
        UserError: unknown key (nearest name offered).
    """
    given = [(key, value) for key, _, value in (item.partition("=") for item in overrides)]
    name = next(iter(methods))
    base = _defaults(name, methods[name])
    for layer in layers_of([pair for pair in given if pair[0].partition(".")[0] != "search"], base, literal=True):
        _reject_unknown(layer, base, "")


@functools.cache  # to make it takes as long as all the rest of a config
def _defaults(name: str, search: type) -> DictConfig:
    """The typed config of a method, as its dataclasses have it; to be copied."""
    base = OmegaConf.create({"method": name, **{k: OmegaConf.structured(v) for k, v in SECTIONS.items()}})
    base["search"] = OmegaConf.structured(search)
    return base


def _layers(path: Path, literal: bool, above: tuple[Path, ...] = ()) -> list[tuple[DictConfig, str]]:
    """A config file and what it is based on (``base: FILE``, seen from the file that says so), the ground first, each
    with its name in front of messages.

    Raises:
        UserError: a file cannot be read, or is based on itself.
    """
    body = _read_yaml(path, literal)
    told, here = body.pop("base", None), (*above, path.resolve())
    if told is None:
        return [(body, f"{path}: ")]
    if not isinstance(told, str):
        raise UserError(f"{path}: base: {told!r} is no file name")
    ground = path.parent / told
    if ground.resolve() in here:
        raise UserError(f"{path}: base: {told} is based on this file")
    if not ground.exists():
        raise UserError(f"{path}: base: {ground} does not exist; it is looked for beside this file")
    return [*_layers(ground, literal, here), (body, f"{path}: ")]


def written(path: Path) -> dict[str, Any]:
    """What a config file and its bases say, as one nested dict: nothing is checked, no default is put in.

    Raises:
        UserError: a file cannot be read, or is based on itself.
    """
    return plain(OmegaConf.to_container(OmegaConf.merge(*(body for body, _ in _layers(path, literal=True)))))


def written_method(path: Path) -> str:
    """The method that a config file names; empty where it names none.

    Raises:
        UserError: it cannot be read.
    """
    return str(written(path).get("method", ""))


def _read_yaml(path: Path, literal: bool) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        siblings = [str(p) for p in Path("configs").glob("*/*.yaml")]
        raise UserError(f"config file {path} does not exist{nearest(str(path), siblings)}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a text file ({e.reason} at byte {e.start})") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        body = OmegaConf.load(io.StringIO(text.replace("${", HELD) if literal else text))
    except Exception as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(body, DictConfig):
        raise UserError(f"{path}: expected a mapping of sections (run, data, model, ...)")
    return body


def _is_record(body: DictConfig) -> bool:
    """Whether :meth:`Config.save` wrote it, of whatever version: every section is there, and the order to overwrite.

    Keys added since then mean what that version did. A person writes some sections and keys, and today's defaults
    hold for the others.
    """
    return {"method", "search", *SECTIONS} <= set(body) and "overwrite" in body["run"]


def _before(cls: type) -> dict[str, Any]:
    """What versions without them did, of all keys of a section that have a ``before``."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if "before" in f.metadata:
            found[f.name] = f.metadata["before"]
        elif isinstance(f.default_factory, type) and dataclasses.is_dataclass(f.default_factory):
            found[f.name] = _before(f.default_factory)
    return found


def _drop_options(layer: DictConfig, base: DictConfig) -> None:
    """Options belong to a backbone: a layer that names another one begins with none."""
    named = OmegaConf.select(layer, "model.backbone", default=None)
    if named is not None and named != base.model.backbone:
        base.model.options = {}


def _reject_unknown(layer: DictConfig, base: Any, prefix: str) -> None:
    for key in layer:
        full = f"{prefix}{key!s}"
        known = [str(k) for k in base]
        if str(key) not in known:
            raise UserError(f"unknown config key {full!r}{nearest(str(key), known)}; known here: {', '.join(known)}")
        inner = layer._get_node(key)
        target = base._get_node(str(key))
        if isinstance(target, DictConfig) and not isinstance(inner, DictConfig):
            raise UserError(f"config key {full}: is a section, not a value; set one of its keys")
        if isinstance(inner, DictConfig) and isinstance(target, DictConfig) and full not in OPEN:
            _reject_unknown(inner, target, full + ".")


def split_arguments(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split ``--config F --train.epochs 3 --run.seed=1`` into plain options and dotted overrides.

    Plain options (no dot in the name) are returned as a dict, without their dashes; an option
    without a value becomes ``"true"``.
    """
    plain: dict[str, str] = {}
    dotted: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            continue
        if not word.startswith("--"):
            raise UserError(f"argument {word!r} is not an option; write --config FILE and --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if "." in key or key == "method":
            dotted.append(f"{key}={value}")
        else:
            plain[key] = value
    return plain, dotted
