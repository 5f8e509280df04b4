"""A trained model becomes a model directory: arrays, vocabulary, programs, and what all of them were measured to do."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from embsearch_dist import __version__
from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.prepare.progress import Progress
from embsearch_dist.data.prepare.vocabulary import VOCABULARY, file_name
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from embsearch_dist.precision import MIXED, PRECISIONS, served
from embsearch_dist.quantised import quantise
from embsearch_dist.schema import Schema
from embsearch_dist.serving import programs
from embsearch_dist.serving.card import card
from embsearch_dist.serving.collect import Collected, ids_of_batch
from embsearch_dist.serving.directory import (
    DENSE,
    FORMAT,
    MODEL,
    SOURCE,
    TABLES,
    load_arrays,
    new_directory,
    save_arrays,
)
from embsearch_dist.serving.model import build, config_of, fill, values_of
from embsearch_dist.serving.triton import write_repository
from embsearch_dist.train.metrics import Predictions, shown
from embsearch_dist.train.metrics import figures as quality


@dataclass(frozen=True)
class Wish:
    """What to make.

    Attributes:
        out: the directory.
        precision: of the tables; one of :data:`embsearch_dist.precision.PRECISIONS`, or ``mixed``.
        formats: programs, of :data:`embsearch_dist.serving.programs.FORMATS`.
        overwrite: replace an earlier model directory.
        name: of the model.
    """

    out: Path
    precision: str
    formats: Sequence[str]
    overwrite: bool
    name: str


def export(
    wish: Wish,
    found: Collected,
    prepared: Path,
    schema: Schema,
    stream: BatchStream,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the model directory and measure it on the rows of ``stream``; gives ``model.json``.

    Args:
        found: the trained model.
        prepared: the data it was trained on, for vocabulary and source.
        schema: of these data.
        stream: the test split, not shuffled.
        tell: given a line before each piece of long work; without it there is no progress either.

    Raises:
        UserError: ``wish.out`` is in the way, the data do not tell their source, or a format cannot carry the model.
    """
    say = tell or (lambda text: None)
    source = source_of(prepared, schema)
    if wish.precision == MIXED and not found.body.get("precisions"):
        raise UserError(
            "--precision mixed: this model has no precision for each field. Only searches with search.precision mixed "
            f"choose some; give one of {', '.join(PRECISIONS)}"
        )
    with new_directory(wish.out, wish.overwrite) as partial:
        schema.save(partial)
        write_json(partial / SOURCE, source)
        fields = found.fields(schema)
        if not source.get("given_ids"):
            _copy_vocabulary(prepared, partial, fields)
        for name, file in found.files.items():
            shutil.copyfile(file, partial / name)
        save_arrays(partial / TABLES, _quantised(found, wish.precision))
        save_arrays(partial / DENSE, found.dense)
        body = {
            "format": FORMAT,
            "name": wish.name,
            "dataset": schema.dataset,
            "data": schema.data,
            "precision": wish.precision,
            "fields": fields,
            "batch_rows": stream.global_batch,
            **({"given_ids": True} if source.get("given_ids") else {}),
            **found.body,
        }
        model = fill(build(body, schema, partial), body, load_arrays(partial / TABLES), load_arrays(partial / DENSE))
        program = programs.Program(model, schema)
        body["inputs"] = [{"name": p.name, "type": p.kind, "columns": p.columns} for p in program.ports]
        body["ids"] = program.single
        files = _write_programs(wish, program, stream, schema, partial, say)
        say(f"measuring on the {stream.rows:,} rows of the {stream.shards.split} split")
        with Progress("measure", stream.rows, "rows", tell is None) as bar:
            body["measured"] = measure(found, model, program, files, stream, schema, bar.add)
        body |= {"sizes": sizes(body, schema, partial), "versions": versions()}
        write_json(partial / MODEL, body)
        (partial / "README.md").write_text(card(body, schema, source, found.files), encoding="utf-8")
    return body


def source_of(prepared: Path, schema: Schema) -> dict[str, Any]:
    """How raw rows are read and encoded: what the preparation has noted.

    Raises:
        UserError: the data were prepared by a version that did not note it.
    """
    described, dense = schema.provenance.get("source"), schema.provenance.get("dense", {})
    if not isinstance(described, Mapping) or not isinstance(dense, Mapping):
        raise UserError(
            f"{prepared}: prepared by a version that kept no description of its source. Give --source FILE.yaml, or "
            "--source criteo; the ids stay those of the training"
        )
    return {**described, "dense": {name: dict(dense[name]) for name in schema.dense}}


def described_by(text: str, schema: Schema) -> dict[str, Any]:
    """The description of a source that ``--source`` names: a YAML source file, or a format with its option.

    Raises:
        UserError: its columns are not those of the data.
    """
    from embsearch_dist.data.formats import FORMATS
    from embsearch_dist.data.formats.clicks import CRITEO_CATEGORIES, CRITEO_NUMBERS
    from embsearch_dist.data.formats.source_file import read_source_file

    if text == "criteo":
        numbers = "dense" if set(CRITEO_NUMBERS) <= set(schema.dense) else "bucketed"
        kinds = [{"name": n, "kind": numbers} | ({"log": True} if numbers == "dense" else {}) for n in CRITEO_NUMBERS]
        columns = kinds + [{"name": n, "kind": "categorical"} for n in CRITEO_CATEGORIES]
        described: dict[str, Any] = {"format": "criteo", "columns": columns, "genres": "one", "numbers": numbers}
    elif text in FORMATS:
        raise UserError(f"--source {text}: give its files as a YAML source file, or prepare the data again")
    else:
        described = read_source_file(Path(text)).describe()
    names = {c["name"] for c in described["columns"]}
    wanted = {*schema.names, *schema.dense}
    if names != wanted:
        raise UserError(f"--source {text}: column {sorted(names ^ wanted)[0]!r} is only in one of it and the data")
    return described


def _copy_vocabulary(prepared: Path, target: Path, fields: Sequence[str]) -> None:
    (target / VOCABULARY).mkdir()
    for name in fields:
        file = Path(VOCABULARY) / file_name(name)
        origin = next((p for p in (prepared, *prepared.resolve().parents) if (p / file).exists()), None)
        if origin is None:
            raise UserError(f"{prepared / file} is missing: the values behind the ids. Copy it back, or prepare again")
        shutil.copyfile(origin / file, target / file)


def _quantised(found: Collected, precision: str) -> dict[str, torch.Tensor]:
    arrays = {}
    for name, table in found.tables.items():
        own = found.body["precisions"][name] if precision == MIXED else precision
        own = "fp32" if name.startswith(found.keep_exact or ("\0",)) else own
        for part, tensor in quantise(table, own, name).items():
            arrays[f"{name}/{part}" if part else name] = tensor
    return arrays


def _write_programs(
    wish: Wish,
    program: programs.Program,
    stream: BatchStream,
    schema: Schema,
    directory: Path,
    say: Callable[[str], None],
) -> dict[str, Path]:
    """The programs of the wish in ``directory``, by format."""
    wanted = set(wish.formats) | ({"onnx"} if "triton" in wish.formats else set())
    if not wanted:
        return {}
    batch = next(iter(stream.epoch(0)))
    ids = ids_of_batch(batch, schema).take(slice(0, programs.EXAMPLE_ROWS))
    say("tracing the model")
    traced = programs.exported(program, ids)
    files = {name: directory / file for name, (file, _) in programs.RUNNERS.items() if name in wanted}
    if "torch" in files:
        programs.save_torch(traced, files["torch"])
    if "aoti" in files:
        say("compiling with AOTInductor, which takes minutes")
        programs.save_aoti(traced, files["aoti"])
    if "onnx" in files:
        say("writing ONNX")
        programs.save_onnx(program, traced, files["onnx"])
    if "triton" in wish.formats:
        write_repository(directory / "triton", wish.name, program.ports, files["onnx"])
        if "onnx" not in wish.formats:
            files["onnx"].unlink()
            files["onnx"] = directory / "triton" / wish.name / "1" / "model.onnx"
    return files


@torch.no_grad()
def measure(
    found: Collected,
    model: Any,
    program: programs.Program,
    files: Mapping[str, Path],
    stream: BatchStream,
    schema: Schema,
    tick: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """What the served model, and each program, does on a split beside the training model."""
    runners = {name: programs.RUNNERS[name][1](path) for name, path in files.items()}
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("label", "trained", "served", *runners)}
    rows = 0
    for batch in stream.epoch(0):
        ids = ids_of_batch(batch, schema)
        kept["label"].append(batch.label)
        kept["trained"].append(found.predict(batch).float())
        kept["served"].append(model(ids))
        if runners and rows < programs.PROGRAM_ROWS:
            inputs = program.inputs(ids)
            for name, runner in runners.items():
                kept[name].append(runner(inputs))
        rows += batch.size
        tick(batch.size)
    all_of = {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in kept.items()}
    trained, label = all_of["trained"], all_of["label"]
    figures: dict[str, Any] = {"split": stream.shards.split, "rows": rows}
    for name in ("trained", "served", *runners):
        logits = all_of[name]
        part = quality(Predictions(logits, label[: len(logits)], None, None))
        figures[name] = {
            "rows": len(logits),
            "auc": part["auc"],
            "logloss": part["logloss"],
            "calibration": _calibration(logits, label[: len(logits)]),
            **{key: None if math.isnan(part[key]) else part[key] for key in ("ne", "ece")},
            "max_difference": float((logits - trained[: len(logits)]).abs().max()) if len(logits) else 0.0,
            "max_difference_to_served": float((logits - all_of["served"][: len(logits)]).abs().max()),
        }
    figures["bitwise"] = bool(torch.equal(all_of["served"], trained))
    return figures


def _calibration(logits: torch.Tensor, label: torch.Tensor) -> float | None:
    """Predicted clicks over clicks; None where there are none."""
    clicks = float(label.double().sum())
    return float(torch.sigmoid(logits.double()).sum()) / clicks if clicks else None


def sizes(body: Mapping[str, Any], schema: Schema, directory: Path) -> dict[str, int]:
    """Bytes on disk, and what the tables take in TorchRec's inference tables at this precision and at float32; those of
    a router of centres stay float32."""
    made = {p.name: p.stat().st_size for p in sorted(directory.iterdir()) if p.is_file() and p.suffix != ".json"}
    made.pop("PREPARING", None)
    if body["kind"] == "gated":
        allocations = [Allocation.uniform(schema, body["width"])]
    else:
        extra = config_of(body["model"], directory).extra
        own, values = dict(body.get("precisions", {})), values_of(body, schema)
        allocations = [Allocation(schema, dict(w), {}, extra, own, values=values) for w in body["widths"]]
    router, at = body.get("router", {}), dict.fromkeys(("fp32", body["precision"]))
    base = Allocation.uniform(schema, router["width"]).total(served("fp32")) if "width" in router else 0
    return made | {served(p): base + sum(a.total(served(p)) for a in allocations) for p in at}


def versions() -> dict[str, str]:
    """Of what made the directory."""
    found = {"embsearch_dist": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "torchrec", "safetensors", "onnx", "onnxscript", "onnxruntime", "polars", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary(body: Mapping[str, Any], out: Path) -> str:
    """A few lines for people."""
    measured, lines = body["measured"], []
    trained, served = measured["trained"], measured["served"]
    rows = f"{measured['rows']:,} {measured['split']} rows"
    lines.append(
        f"{body['name']}: {body['kind']}, tables at {body['precision']}, {rows}: auc {shown(served['auc'])} (trained "
        f"model {shown(trained['auc'])}), largest difference of logits {served['max_difference']:.2g}"
        f"{', the same bits' if measured['bitwise'] else ''}"
    )
    for name in programs.RUNNERS:
        if name in measured:
            lines.append(f"{name}: largest difference of logits {measured[name]['max_difference']:.2g}")
    if body.get("given_ids"):
        lines.append("rows to predict need the ids of the engine that made those of the training, not values")
    lines.append(f"{out}: {json.dumps(body['sizes'])}")
    return "\n".join(lines)
