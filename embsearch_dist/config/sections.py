"""The sections that every config has: one dataclass per component."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf

from embsearch_dist.config.backbones import ADDITIVE, check_backbone
from embsearch_dist.config.literal import HELD, held
from embsearch_dist.config.options import check_section, one_of, option, require
from embsearch_dist.config.own_module import load_module
from embsearch_dist.rundir import plain_word, write_text

LARGEST_SEED = 2**32 - 1  # generators take 64 bits, and streams of one run multiply it
_fetched: dict[str, str] = {}  # folder of this machine -> the URL whose data were fetched into it


def fetched_from(url: str, folder: Path) -> str:
    """The folder as ``data.path`` of a config that is to be saved with the URL its data were fetched from."""
    _fetched[str(folder)] = url
    return str(folder)


@dataclass
class RunConfig:
    """Where a run lives and what it may use."""

    dir: str = option("", "run directory; empty = runs/<folder and name of the config file>")
    seed: int = option(0, "seed of weights, sampling, search and data order", low=0, high=LARGEST_SEED)
    device: str = option("auto", "auto | cpu | cuda", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPU threads of each process; 0 = cores / processes on this machine", low=0)
    tf32: bool = option(False, "GPU: float32 products in TF32 (10 bits of mantissa, faster); no effect on CPU")
    overwrite: bool = option(False, "delete what the run directory holds and start anew")
    mirror: str = option("", "URL (s3://BUCKET/PREFIX) that keeps a copy of the run, resumable on another machine")
    interpolate: bool = option(False, "command line only: put in ${key} and ${oc.env:NAME} of the config file")

    def check(self) -> None:
        told = "a run directory lies on a disk; give a folder, and the URL to run.mirror"
        require("://" not in self.dir, "run.dir", f"{self.dir}: {told}")
        require(not self.mirror or "://" in self.mirror, "run.mirror", f"must be a URL, got {self.mirror!r}")


@dataclass
class DataConfig:
    """A prepared data set (see launch/prepare.py)."""

    path: str = option("runs/data/synthetic", "directory that launch/prepare.py wrote, or URL (s3://...) of its copy")
    make: str = option(
        "", "'synthetic' = make planted click logs at data.path when nothing is there yet", choices=("", "synthetic")
    )
    source: str = option("", "registered data source whose rows are read in place of data.path (docs/library.md)")
    module: str = option("", "Python file or module that registers data.source; it is imported, so trust it")
    rows: int = option(200_000, "rows of the synthetic click logs")
    window_rows: int = option(1 << 20, "rows that are shuffled together in memory", above=0)
    skip_unreadable: int = option(
        0, "leave out up to so many row groups that cannot be read; 0 = stop at the first", low=0
    )

    def check(self) -> None:
        require(not (self.make and "://" in self.path), "data.make", "makes data in a folder: data.path must be one")
        require(not (self.source and self.skip_unreadable), "data.skip_unreadable", "is for files, not for data.source")

    @property
    def place(self) -> str:
        """Where the rows come from, for messages."""
        return f"data source {self.source!r}" if self.source else self.path


@dataclass
class ModelConfig:
    """The backbone behind the embeddings and the transform in front of it."""

    backbone: str = option(
        "deepfm",
        "wide_deep | deepfm | fm | mlp | dlrm | dcnv2 | autoint | xdeepfm | masknet | finalmlp, or a name that "
        "model.module registers; for retraining also nasrec",
    )
    options: dict[str, Any] = option(
        {}, "of the backbone, e.g. {layers: 3}: see below; another model.backbone leaves those of the one before"
    )
    module: str = option(
        "",
        "FILE.py or installed module that registers a backbone of your own (docs/library.md). Its code is run by every "
        "script that reads this config: take no run directory or config from people whose code you would not run",
    )
    architecture: str = option("", "architecture.json of a NASRec search, for the backbone nasrec")
    layer_norm: str = option(
        "attention",
        "attention | all: which LayerNorms of a NASRec network are kept when it is trained alone",
        before="all",
        choices=("attention", "all"),
    )
    allocation: str = option("", "allocation.json or ues-WIDTH to retrain; empty: --allocation, or what was found")
    hidden: list[int] = option([128, 64], "widths of the MLP's hidden layers (the output unit is added)")
    bottom: list[int] = option([64], "hidden layers of DLRM's MLP on the dense columns")
    dropout: float = option(0.0, "dropout after each hidden layer", low=0, below=1)
    precision: str = option(
        "float32",
        "float32 | bfloat16: products of the MLP of fm, deepfm, wide_deep, mlp; bfloat16 where hardware has it",
        choices=("float32", "bfloat16"),
    )
    transform: str = option(
        "identity",
        "to a common width: identity (none learned, zeros fill up) | width (a linear map per width) | field (per field "
        "and width) | mlp (per width, with a layer behind a ReLU)",
        before="width",
        choices=("identity", "width", "field", "mlp"),
    )
    unified_width: int = option(
        32, "d_f: the common width of the learned transforms; identity takes the widest width", above=0
    )
    unify: str = option(
        "always", "always | mixed: 'mixed' skips the transform when all widths are equal", choices=("always", "mixed")
    )
    first_order: str = option(
        "embedding",
        "the linear part of fm, deepfm, wide_deep: embedding (linear in it) | value (a weight per value, as published: "
        "one more column of each table)",
        choices=("embedding", "value"),
    )
    norm: str = option(
        "none",
        "BatchNorm of the transform: none | field (statistics per field) | width (as printed)",
        choices=("field", "width", "none"),
    )
    gain: float = option(0.1, "initial scale of that BatchNorm; small, so that FM starts near zero")
    init_std: float = option(0.01, "standard deviation of the initial embedding values", low=0, below=math.inf)

    def check(self) -> None:
        load_module(self.module, "config key model.module")
        check_backbone(self.backbone, self.module, self.options)
        given = (self.backbone == "nasrec") == bool(self.architecture)
        require(given, "model.architecture", "belongs to model.backbone nasrec, and that needs it: a file of a search")
        require(self.backbone != "mlp" or bool(self.hidden), "model.hidden", "an mlp needs at least one hidden layer")
        rounded = self.precision == "float32" or self.backbone in ADDITIVE
        require(rounded, "model.precision", f"{self.backbone} has products in float32 alone, got {self.precision}")
        for key in ("hidden", "bottom"):
            widths = getattr(self, key)
            require(all(h > 0 for h in widths), f"model.{key}", f"every width must be above 0, got {widths}")

    def settings(self) -> dict[str, Any]:
        """The keys that say what is computed: all but where a user's own module lies, which may move."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "module"}

    @property
    def extra(self) -> int:
        """Columns of a kept field's table beside its width: 1 where each value has a first-order weight of its own."""
        return int(self.first_order == "value" and self.backbone in ("fm", "deepfm", "wide_deep"))


@dataclass
class OptimConfig:
    """Optimizers of the tables and of the dense part."""

    embedding: str = option(
        "adam",
        "adam | adagrad | rowwise_adagrad | sgd: of the tables; rows that a step does not look up stay",
        choices=("adam", "adagrad", "rowwise_adagrad", "sgd"),
    )
    embedding_lr: float = option(1e-3, "learning rate of the tables", above=0)
    embedding_l2: float = option(0.0, "L2 on the looked-up embeddings, added to the loss (mean over the batch)", low=0)
    dense: str = option("adam", "adam | adagrad: of the dense part", choices=("adam", "adagrad"))
    dense_lr: float = option(1e-3, "learning rate of the dense part", above=0)
    dense_eps: float = option(1e-2, "Adagrad's epsilon (dense part)", above=0)
    weight_decay: float = option(0.0, "L2 on the dense part, inside its optimizer", low=0)
    clip_norm: float = option(0.0, "scale the dense part's gradient down to this norm; 0 = never", low=0)


# Keys of TrainConfig that say how a run is kept safe or what is told of it, and not what it computes: they may change
# between two starts of one run.
SAFETY_KEYS = ("save_every", "keep_checkpoints", "async_save", "on_save_error", "skip_bad_batches", "group")


@dataclass
class TrainConfig:
    """One training run: how long, how it stops, when it is evaluated."""

    batch_size: int = option(512, "global batch: rows of one step over all ranks", low=1)
    eval_batch_size: int = option(8192, "global batch of evaluation", low=1)
    epochs: int = option(10, "at most this many epochs", low=1)
    steps: int = option(0, "stop after this many steps; 0 = no bound", low=0)
    evals_per_epoch: int = option(1, "evaluations on the validation split per epoch", low=1)
    metric: str = option(
        "auc", "auc | logloss: what early stopping and the best checkpoint look at", choices=("auc", "logloss")
    )
    group: str = option("", "a field, such as a user's id, inside whose values AUC is measured too; empty = none")
    patience: int = option(2, "stop after this many evaluations without a better metric; 0 = never", low=0)
    lr_cut: float = option(
        1.0, "factor on the learning rates after each evaluation without a better metric", above=0, high=1
    )
    schedule: str = option(
        "constant",
        "constant | cosine: falls from the learning rates to zero over all steps",
        choices=("constant", "cosine"),
    )
    warmup: float = option(
        0.0, "share of all steps in which the learning rates rise from zero, in either schedule", low=0, below=1
    )
    log_every: int = option(100, "steps between two lines of the log", low=1)
    save_every: int = option(0, "steps between two checkpoints; 0 = only at evaluations", low=0)
    keep_checkpoints: int = option(
        2, "how many of the last checkpoints stay, beside the best one; one may be damaged", low=2
    )
    async_save: bool = option(False, "write checkpoints while training goes on; takes memory for a copy of the model")
    on_save_error: str = option(
        "continue", "continue | stop: what to do when a checkpoint cannot be written", choices=("continue", "stop")
    )
    skip_bad_batches: int = option(
        0, "skip so many batches in all whose loss or gradient is not finite, then stop", low=0
    )

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
    hbm_gb: float = option(
        0.0, "GPU memory of a rank, GiB; 0 = the smallest GPU in use, 80 where none is (A100 80GB)", low=0
    )
    ddr_gb: float = option(128.0, "main memory of a rank, GiB")
    reserve: float = option(0.15, "share of that memory that is left to the dense part and the batches", low=0, below=1)
    hbm_bandwidth: float = option(
        0.0, "GiB/s of GPU memory; 0 = of the GPU in use, 1899 where none is (A100 80GB)", low=0
    )
    ddr_bandwidth: float = option(47.7, "GiB/s of main memory")
    hbm_to_ddr_bandwidth: float = option(29.8, "GiB/s between the two")
    intra_host_bandwidth: float = option(559.0, "GiB/s between ranks of one machine")
    inter_host_bandwidth: float = option(23.3, "GiB/s between machines")
    column_width: int = option(16, "narrowest column shard; a multiple of 4")
    offload: bool = option(False, "GPU only: what does not fit HBM may lie in main memory (slow)")

    def check(self) -> None:
        widths = [f.name for f in dataclasses.fields(self) if "width" in f.name and f.name != "hbm_bandwidth"]
        for key in ("batch_size", "ddr_gb", *widths):
            number = getattr(self, key)
            require(0 < number < math.inf, f"dist.planner.{key}", f"must be above 0 and finite, got {number}")
        require(self.column_width % 4 == 0, "dist.planner.column_width", "must be a multiple of 4")


@dataclass
class DistConfig:
    """How tables are spread over ranks."""

    sharding: str = option("auto", "auto | table_wise | row_wise | column_wise | data_parallel | planner (TorchRec's)")
    tables: dict[str, str] = option(
        {}, "sharding of single fields, e.g. {user_id: row_wise}; the planner also knows table_row_wise, grid_shard"
    )
    timeout_s: int = option(
        120, "seconds without a sign of life after which a rank counts as lost, and the others end", low=10
    )
    wait_s: int = option(600, "seconds that a collective waits for a rank that is alive but busy", low=10)
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


S = TypeVar("S")
"""Dataclass of a method's ``search`` section."""


@dataclass
class Config(Generic[S]):
    """Everything a run depends on. ``search`` is the chosen method's own dataclass."""

    method: str
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    dist: DistConfig
    search: S

    def check(self) -> None:
        for name in (*SECTIONS, "search"):
            check_section(getattr(self, name), name)
        if name := getattr(self.search, "name", ""):
            plain_word(name, "config key search.name")

    def to_dict(self) -> dict[str, Any]:
        """All keys; ``data.path`` as it was given, also where the data were fetched meanwhile."""
        body = dataclasses.asdict(self)
        body["data"]["path"] = _fetched.get(body["data"]["path"], body["data"]["path"])
        return body

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(held(self.to_dict()))).replace(HELD, "${")

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
