"""The typed configuration: one dataclass per component, a YAML file, dotted command-line overrides.

Precedence: command line > YAML file > the defaults below. An unknown key is an error that offers the
nearest name. ``python launch/search.py --config FILE --print-config`` prints what a run would use.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from embsearch_dist.errors import UserError
from embsearch_dist.rundir import plain_word, write_text

HELD = "\ue000{"  # stands for ${ while OmegaConf has a text in hand, which would look for a key there
TABLES = "dist.tables."


def option(default: Any, text: str, before: Any = None) -> Any:
    """A config field with its help text.

    ``before``: what versions without this key did, where that is not today's default.
    """
    metadata = {"help": text} if before is None else {"help": text, "before": before}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, key: str, message: str) -> None:
    """Raise ``UserError`` naming the key unless ``condition`` holds."""
    if not condition:
        raise UserError(f"config key {key}: {message}")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Check a choice; the error offers the nearest name."""
    if value not in allowed:
        raise UserError(f"config key {key}: {value!r} is none of {', '.join(allowed)}{nearest(value, allowed)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass
class RunConfig:
    """Where a run lives and what it may use."""

    dir: str = option("", "run directory; empty = runs/<folder and name of the config file>")
    seed: int = option(0, "seed of weights, sampling, search and data order")
    device: str = option("auto", "auto | cpu | cuda")
    threads: int = option(0, "CPU threads of each process; 0 = cores / processes on this machine")
    tf32: bool = option(False, "GPU: float32 products in TF32 (10 bits of mantissa, faster); no effect on CPU")
    overwrite: bool = option(False, "delete what the run directory holds and start anew")
    interpolate: bool = option(False, "command line only: put in ${key} and ${oc.env:NAME} of the config file")

    def check(self) -> None:
        one_of("run.device", self.device, ["auto", "cpu", "cuda"])
        require(self.threads >= 0, "run.threads", f"must be >= 0, got {self.threads}")


@dataclass
class DataConfig:
    """A prepared data set (see launch/prepare.py)."""

    path: str = option("runs/data/synthetic", "directory that launch/prepare.py wrote")
    make: str = option("", "'synthetic' = make planted click logs at data.path when nothing is there yet")
    rows: int = option(200_000, "rows of the synthetic click logs")
    window_rows: int = option(1 << 20, "rows that are shuffled together in memory")
    skip_unreadable: int = option(0, "leave out up to so many row groups that cannot be read; 0 = stop at the first")

    def check(self) -> None:
        one_of("data.make", self.make, ["", "synthetic"])
        require(self.window_rows > 0, "data.window_rows", "must be above 0")
        require(self.skip_unreadable >= 0, "data.skip_unreadable", f"must be >= 0, got {self.skip_unreadable}")


@dataclass
class ModelConfig:
    """The backbone behind the embeddings and the transform in front of it."""

    backbone: str = option("deepfm", "wide_deep | deepfm | fm | mlp; for retraining also dlrm | nasrec")
    architecture: str = option("", "architecture.json of a NASRec search, for the backbone nasrec")
    layer_norm: str = option(
        "attention",
        "attention | all: which LayerNorms of a NASRec network are kept when it is trained alone",
        before="all",
    )
    allocation: str = option("", "allocation.json or ues-WIDTH to retrain; empty: --allocation, or what was found")
    hidden: list[int] = option([128, 64], "widths of the MLP's hidden layers (the output unit is added)")
    bottom: list[int] = option([64], "hidden layers of DLRM's MLP on the dense columns")
    dropout: float = option(0.0, "dropout after each hidden layer")
    precision: str = option("float32", "float32 | bfloat16: products of the MLP; bfloat16 where hardware has it")
    transform: str = option(
        "identity",
        "to a common width: identity (none learned, zeros fill up) | width (a linear map per width) | field (per field "
        "and width) | mlp (per width, with a layer behind a ReLU)",
        before="width",
    )
    unified_width: int = option(32, "d_f: the common width of the learned transforms; identity takes the widest width")
    unify: str = option("always", "always | mixed: 'mixed' skips the transform when all widths are equal")
    first_order: str = option(
        "embedding",
        "the linear part of fm, deepfm, wide_deep: embedding (linear in it) | value (a weight per value, as published: "
        "one more column of each table)",
    )
    norm: str = option("none", "BatchNorm of the transform: none | field (statistics per field) | width (as printed)")
    gain: float = option(0.1, "initial scale of that BatchNorm; small, so that FM starts near zero")
    init_std: float = option(0.01, "standard deviation of the initial embedding values")

    def check(self) -> None:
        one_of("model.backbone", self.backbone, ["wide_deep", "deepfm", "fm", "mlp", "dlrm", "nasrec"])
        given = (self.backbone == "nasrec") == bool(self.architecture)
        require(given, "model.architecture", "belongs to model.backbone nasrec, and that needs it: a file of a search")
        one_of("model.transform", self.transform, ["identity", "width", "field", "mlp"])
        one_of("model.layer_norm", self.layer_norm, ["attention", "all"])
        one_of("model.unify", self.unify, ["always", "mixed"])
        one_of("model.first_order", self.first_order, ["embedding", "value"])
        one_of("model.norm", self.norm, ["field", "width", "none"])
        one_of("model.precision", self.precision, ["float32", "bfloat16"])
        require(self.backbone != "mlp" or bool(self.hidden), "model.hidden", "an mlp needs at least one hidden layer")
        require(0 <= self.dropout < 1, "model.dropout", f"must be in [0, 1), got {self.dropout}")
        require(self.unified_width > 0, "model.unified_width", "must be above 0")
        for key in ("hidden", "bottom"):
            widths = getattr(self, key)
            require(all(h > 0 for h in widths), f"model.{key}", f"every width must be above 0, got {widths}")

    @property
    def extra(self) -> int:
        """Columns of a kept field's table beside its width: 1 where each value has a first-order weight of its own."""
        return int(self.first_order == "value" and self.backbone in ("fm", "deepfm", "wide_deep"))


@dataclass
class OptimConfig:
    """Optimizers of the tables and of the dense part."""

    embedding: str = option(
        "adam", "adam | adagrad | rowwise_adagrad | sgd: of the tables; rows that a step does not look up stay"
    )
    embedding_lr: float = option(1e-3, "learning rate of the tables")
    embedding_l2: float = option(0.0, "L2 on the looked-up embeddings, added to the loss (mean over the batch)")
    dense: str = option("adam", "adam | adagrad: of the dense part")
    dense_lr: float = option(1e-3, "learning rate of the dense part")
    dense_eps: float = option(1e-2, "Adagrad's epsilon (dense part)")
    weight_decay: float = option(0.0, "L2 on the dense part, inside its optimizer")
    clip_norm: float = option(0.0, "scale the dense part's gradient down to this norm; 0 = never")

    def check(self) -> None:
        one_of("optim.embedding", self.embedding, ["adam", "adagrad", "rowwise_adagrad", "sgd"])
        one_of("optim.dense", self.dense, ["adam", "adagrad"])
        for key in ("embedding_lr", "dense_lr", "dense_eps"):
            require(getattr(self, key) > 0, f"optim.{key}", f"must be above 0, got {getattr(self, key)}")
        for key in ("embedding_l2", "weight_decay", "clip_norm"):
            require(getattr(self, key) >= 0, f"optim.{key}", f"must be >= 0, got {getattr(self, key)}")


# Keys of TrainConfig that say how a run is kept safe and not what it computes: they may change between two
# starts of one run.
SAFETY_KEYS = ("save_every", "keep_checkpoints", "async_save", "on_save_error", "skip_bad_batches")


@dataclass
class TrainConfig:
    """One training run: how long, how it stops, when it is evaluated."""

    batch_size: int = option(512, "global batch: rows of one step over all ranks")
    eval_batch_size: int = option(8192, "global batch of evaluation")
    epochs: int = option(10, "at most this many epochs")
    steps: int = option(0, "stop after this many steps; 0 = no bound")
    evals_per_epoch: int = option(1, "evaluations on the validation split per epoch")
    metric: str = option("auc", "auc | logloss: what early stopping and the best checkpoint look at")
    patience: int = option(2, "stop after this many evaluations without a better metric; 0 = never")
    lr_cut: float = option(1.0, "factor on the learning rates after each evaluation without a better metric")
    schedule: str = option("constant", "constant | cosine: falls from the learning rates to zero over all steps")
    warmup: float = option(0.0, "share of all steps in which the learning rates rise from zero, in either schedule")
    log_every: int = option(100, "steps between two lines of the log")
    save_every: int = option(0, "steps between two checkpoints; 0 = only at evaluations")
    keep_checkpoints: int = option(2, "how many of the last checkpoints stay, beside the best one; at least 2")
    async_save: bool = option(False, "write checkpoints while training goes on; takes memory for a copy of the model")
    on_save_error: str = option("continue", "continue | stop: what to do when a checkpoint cannot be written")
    skip_bad_batches: int = option(0, "skip so many batches in all whose loss or gradient is not finite, then stop")

    def check(self, prefix: str = "train") -> None:
        for key in ("batch_size", "eval_batch_size", "epochs", "evals_per_epoch", "log_every"):
            require(getattr(self, key) >= 1, f"{prefix}.{key}", f"must be at least 1, got {getattr(self, key)}")
        one_of(f"{prefix}.metric", self.metric, ["auc", "logloss"])
        one_of(f"{prefix}.schedule", self.schedule, ["constant", "cosine"])
        require(0 <= self.warmup < 1, f"{prefix}.warmup", f"must be in [0, 1), got {self.warmup}")
        require(0 < self.lr_cut <= 1, f"{prefix}.lr_cut", f"must be in (0, 1], got {self.lr_cut}")
        kept = self.keep_checkpoints
        require(kept >= 2, f"{prefix}.keep_checkpoints", f"must be at least 2, so that one may be damaged, got {kept}")
        one_of(f"{prefix}.on_save_error", self.on_save_error, ["continue", "stop"])
        for key in ("steps", "save_every", "skip_bad_batches"):
            require(getattr(self, key) >= 0, f"{prefix}.{key}", f"must be >= 0, got {getattr(self, key)}")

    def total_steps(self, batches_per_epoch: int) -> int:
        """Steps of the whole training: all ``epochs``, unless ``steps`` ends it earlier."""
        planned = batches_per_epoch * self.epochs
        return min(planned, self.steps or planned)


@dataclass
class PlannerConfig:
    """What TorchRec's planner takes the machines to be. The defaults are a GPU's share of NVIDIA's DGX A100."""

    # From the data sheets of A100 80GB SXM and DGX A100, their GB in GiB: NVLink 600 GB/s, one InfiniBand adapter of
    # 200 Gb/s a GPU, PCIe 4.0 x16 32 GB/s a direction, DDR4-3200 on 16 channels and (the smaller model) 1 TB for 8.
    batch_size: int = option(512, "rows of one step on one rank, for the predicted times")
    hbm_gb: float = option(0.0, "GPU memory of a rank, GiB; 0 = the smallest GPU in use, 80 where none is (A100 80GB)")
    ddr_gb: float = option(128.0, "main memory of a rank, GiB")
    reserve: float = option(0.15, "share of that memory that is left to the dense part and the batches")
    hbm_bandwidth: float = option(0.0, "GiB/s of GPU memory; 0 = of the GPU in use, 1899 where none is (A100 80GB)")
    ddr_bandwidth: float = option(47.7, "GiB/s of main memory")
    hbm_to_ddr_bandwidth: float = option(29.8, "GiB/s between the two")
    intra_host_bandwidth: float = option(559.0, "GiB/s between ranks of one machine")
    inter_host_bandwidth: float = option(23.3, "GiB/s between machines")
    column_width: int = option(16, "narrowest column shard; a multiple of 4")
    offload: bool = option(False, "GPU only: what does not fit HBM may lie in main memory (slow)")

    def check(self) -> None:
        widths = [f.name for f in dataclasses.fields(self) if "width" in f.name and f.name != "hbm_bandwidth"]
        for key in ("hbm_gb", "hbm_bandwidth"):
            require(getattr(self, key) >= 0, f"dist.planner.{key}", f"must be >= 0, got {getattr(self, key)}")
        for key in ("batch_size", "ddr_gb", *widths):
            require(getattr(self, key) > 0, f"dist.planner.{key}", f"must be above 0, got {getattr(self, key)}")
        require(self.column_width % 4 == 0, "dist.planner.column_width", "must be a multiple of 4")
        require(0 <= self.reserve < 1, "dist.planner.reserve", f"must be in [0, 1), got {self.reserve}")


@dataclass
class DistConfig:
    """How tables are spread over ranks."""

    sharding: str = option("auto", "auto | table_wise | row_wise | column_wise | data_parallel | planner (TorchRec's)")
    tables: dict[str, str] = option(
        {}, "sharding of single fields, e.g. {user_id: row_wise}; the planner also knows table_row_wise, grid_shard"
    )
    timeout_s: int = option(120, "seconds without a sign of life after which a rank counts as lost, and the others end")
    wait_s: int = option(600, "seconds that a collective waits for a rank that is alive but busy")
    planner: PlannerConfig = field(default_factory=PlannerConfig)

    def check(self) -> None:
        kinds = ["table_wise", "row_wise", "column_wise", "data_parallel"]
        one_of("dist.sharding", self.sharding, ["auto", *kinds, "planner"])
        for name, kind in self.tables.items():
            if kind in ("table_row_wise", "grid_shard"):
                message = f"{kind} needs dist.sharding: planner"
                require(self.sharding == "planner", f"dist.tables.{name}", message)
            else:
                one_of(f"dist.tables.{name}", kind, kinds)
        require(self.timeout_s >= 10, "dist.timeout_s", f"must be at least 10, got {self.timeout_s}")
        require(self.wait_s >= 10, "dist.wait_s", f"must be at least 10, got {self.wait_s}")
        self.planner.check()


@dataclass
class Config:
    """Everything a run depends on. ``search`` is the chosen method's own dataclass."""

    method: str
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    dist: DistConfig
    search: Any

    def check(self) -> None:
        for section in (self.run, self.data, self.model, self.optim, self.train, self.dist, self.search):
            section.check()
        if name := getattr(self.search, "name", ""):
            plain_word(name, "config key search.name")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(_held(self.to_dict()))).replace(HELD, "${")

    def save(self, run_dir: Path) -> None:
        """Write ``config.yaml``. The order to overwrite is for once: it must not delete the next run."""
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = dataclasses.replace(self, run=dataclasses.replace(self.run, overwrite=False))
        write_text(run_dir / "config.yaml", kept.to_yaml())


SECTIONS = {
    "run": RunConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "dist": DistConfig,
}


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
    layers: list[DictConfig] = []
    if file is not None:
        layers.append(_read_yaml(Path(file), literal))
    name = method
    for layer in layers:
        name = str(layer.get("method", name))
    name = next((value for key, value in reversed(given) if key == "method"), name)
    if not name:
        raise UserError(f"no method is named; add 'method: NAME' to the config file (one of {', '.join(methods)})")
    one_of("method", name, list(methods))
    base = copy.deepcopy(_defaults(name, methods[name]))
    if file is not None and _is_record(layers[0]):
        was = {k: _before(cls) for k, cls in {**SECTIONS, "search": methods[name]}.items()}
        base.merge_with(was)
    where = f"{file}: " if file is not None else ""
    for layer, source in [*((x, where) for x in layers), *((_dotted(k, v, base, literal), "") for k, v in given)]:
        try:
            _reject_unknown(layer, base, "")
            base.merge_with(layer)  # in place: OmegaConf.merge would copy the whole config once per override
        except UserError as e:
            raise UserError(f"{source}{e}") from e
        except OmegaConfBaseException as e:
            key = getattr(e, "full_key", "") or "?"
            raise UserError(f"{source}config key {key}: {str(e).splitlines()[0]}") from e
    try:
        parts = {k: _plain(OmegaConf.to_object(base[k])) for k in [*SECTIONS, "search"]}
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


@functools.cache  # to make it takes as long as all the rest of a config
def _defaults(name: str, search: type) -> DictConfig:
    """The typed config of a method, as its dataclasses have it; to be copied."""
    base = OmegaConf.create({"method": name, **{k: OmegaConf.structured(v) for k, v in SECTIONS.items()}})
    base["search"] = OmegaConf.structured(search)
    return base


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


def _plain(body: Any) -> Any:
    """A section with the dollar signs of its texts put back; see :data:`HELD`."""
    if isinstance(body, str):
        return body.replace(HELD, "${")
    if isinstance(body, list):
        return [_plain(value) for value in body]
    if isinstance(body, dict):
        return {_plain(key): _plain(value) for key, value in body.items()}
    if dataclasses.is_dataclass(body):
        for f in dataclasses.fields(body):
            setattr(body, f.name, _plain(getattr(body, f.name)))
    return body


def _held(body: Any) -> Any:
    """The other way round, of nested dicts and lists."""
    if isinstance(body, str):
        return body.replace("${", HELD)
    if isinstance(body, dict):
        return {_held(key): _held(value) for key, value in body.items()}
    return [_held(value) for value in body] if isinstance(body, list) else body


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


def _dotted(key: str, value: str, base: Any, literal: bool) -> DictConfig:
    """An override as a layer. What belongs to a key of type str is taken as it stands; the rest is YAML.

    What follows ``dist.tables.`` is a field's name, whatever characters it has.
    """
    if not key:
        raise UserError(f"override {value!r} has no key; write --section.key value")
    value = value.replace("${", HELD) if literal else value
    if key.startswith(TABLES) and key != TABLES:
        return OmegaConf.create({"dist": {"tables": {_held(key.removeprefix(TABLES)): value}}})
    node = base
    for part in key.split("."):
        node = node._get_node(part) if isinstance(node, DictConfig) and part in node else None
    if isinstance(node, StringNode):
        body: Any = value
        for part in reversed(key.split(".")):
            body = {part: body}
        return OmegaConf.create(body)
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except Exception as e:
        raise UserError(f"override {key}={value}: {' '.join(str(e).split())}") from e


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
        if isinstance(inner, DictConfig) and isinstance(target, DictConfig) and full != "dist.tables":
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


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-able parts; dataclasses count as their fields."""
    body = [dataclasses.asdict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], search: type | None = None) -> list[str]:
    """Dotted keys whose values differ. A key that an older version did not have counts as what that version did: the
    ``before`` of :func:`option`, or its default.

    Args:
        old, new: flat settings, as a checkpoint or a stage recorded them and as they are now.
        search: dataclass of the ``search`` section, for defaults of ``search.*``.
    """
    return [k for k in {**old, **new} if old.get(k, _default(k, search)) != new.get(k)]


def tell_changed(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of the changed settings for a message: ``optim.dense was 'adam', now 'adagrad'``."""
    return ", ".join(f"{k} was {old.get(k, _default(k, None))!r}, now {new.get(k)!r}" for k in keys[:3])


def _default(key: str, search: type | None) -> Any:
    """What a dotted key that is not there means, a list as JSON gives it back; a bare one is of training; None for
    what has no default."""
    section, _, rest = key.rpartition(".")
    found: Any = {**SECTIONS, "search": search}.get(section.partition(".")[0]) if section else TrainConfig
    if found is None:
        return None
    found = found()
    for name in section.split(".")[1:]:
        found = getattr(found, name, None)
    fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    before = {f.name: f.metadata["before"] for f in fields if "before" in f.metadata}
    return before.get(rest, getattr(found, rest, None))


def describe(methods: Mapping[str, type]) -> str:
    """Every key with its default and meaning, for ``--help``."""
    lines = []
    for name, cls in {**SECTIONS, **{f"search (method: {m})": c for m, c in methods.items()}}.items():
        lines.append(f"\n{name}: {(cls.__doc__ or '').strip().splitlines()[0]}")
        lines += _describe_fields(cls, "  " + ("search" if name.startswith("search") else name))
    return "\n".join(lines)


def _describe_fields(cls: type, prefix: str) -> list[str]:
    lines = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(default):
            lines += _describe_fields(type(default), f"{prefix}.{f.name}")
        else:
            lines.append(f"{prefix}.{f.name} [{default}]  {f.metadata.get('help', '')}".rstrip())
    return lines
