"""The model card: what the model is, what it was measured to do, and how it is used, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embsearch_dist.files import read_json
from embsearch_dist.schema import Schema
from embsearch_dist.serving.programs import PROGRAM_ROWS, RUNNERS

WORDS = {
    "single": "one model",
    "gated": "one model whose columns are weighed row by row",
    "routed": "a model per group",
}


def card(body: Mapping[str, Any], schema: Schema, source: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    """The text of ``README.md``.

    Args:
        body: ``model.json``.
        source: ``source.json``.
        files: what was copied from the training; its ``evaluation.json`` gives the figures of that time.
    """
    parts = [_head(body, schema), _measured(body), _inputs(body, schema, source), _tables(body, schema)]
    if "evaluation.json" in files:
        parts.append(_evaluation(read_json(files["evaluation.json"])))
    parts.append(_use(body))
    rows = [f"| {name} | {version} |" for name, version in body["versions"].items()]
    parts.append("\n".join(["## Made with", "", "| package | version |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def cell(name: str) -> str:
    """A name of a user's data as Markdown shows it, on one line and inside a table."""
    text = " ".join(name.split()) if name.strip() else repr(name)
    for sign, written in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "&#124;"),
        ("`", "&#96;"),
        ("*", "&#42;"),
    ):
        text = text.replace(sign, written)
    return text


def _head(body: Mapping[str, Any], schema: Schema) -> str:
    model = body["model"]
    backbone = model["backbone"] + (f" {model['hidden']}" if model["backbone"] not in ("fm", "nasrec") else "")
    router = f", routed by {body['router']['kind']}" if body["kind"] == "routed" else ""
    return "\n".join(
        [
            f"# {body['name']}",
            "",
            f"Predicts the probability of a click. Trained on `{schema.dataset}`"
            + (f" (data {schema.data})" if schema.data else "")
            + f": {WORDS[body['kind']]}{router}, backbone {backbone}; embedding tables at {body['precision']}, "
            "everything else at float32.",
        ]
    )


def _measured(body: Mapping[str, Any]) -> str:
    measured = body["measured"]
    lines = [
        f"## Measured on the {measured['split']} split",
        "",
        "| | rows | AUC | to the trained model | logloss | normalised entropy | calibration | ECE | largest difference "
        "of logits |",
        f"|{' --- |' * 9}",
    ]
    names = {"trained": "trained model", "served": "this directory", **{n: RUNNERS[n][0] for n in RUNNERS}}
    for key, name in names.items():
        if key in measured:
            m = measured[key]
            apart = m["auc"] - measured["trained"]["auc"]
            entropy, ratio, error = (
                "" if m.get(key) is None else f"{m[key]:.{digits}f}"
                for key, digits in (("ne", 4), ("calibration", 4), ("ece", 5))
            )
            known = f"{m['auc']:.5f} | {apart:+.1e}" if m["rows"] == measured["rows"] else f"{m['auc']:.5f} |"
            lines.append(
                f"| {name} | {m['rows']:,} | {known} | {m['logloss']:.5f} | {entropy} | {ratio} | {error} | "
                f"{m['max_difference']:.3g} |"
            )
    same = "the same bits as" if measured["bitwise"] else "not the same bits as"
    lines += [
        "",
        f"On the machine of the export this directory gave {same} the trained model, in batches of "
        f"{body['batch_rows']:,} rows. Normalised entropy is logloss against that of the click rate alone, calibration "
        "predicted clicks over clicks, ECE the mean distance of predictions and click rates. Programs are compared on "
        f"the first {PROGRAM_ROWS:,} rows at most.",
    ]
    lines += ["", "| file, or tables as TorchRec serves them | bytes |", "| --- | --- |"]
    lines += [f"| {name.replace('served_', 'tables, TorchRec, ')} | {n:,} |" for name, n in body["sizes"].items()]
    return "\n".join(lines)


def _inputs(body: Mapping[str, Any], schema: Schema, source: Mapping[str, Any]) -> str:
    columns = {c["name"]: c for c in source["columns"]}
    used, given = set(body["fields"]), bool(source.get("given_ids"))
    lines = [
        "## Rows with ids" if given else f"## Raw rows (format {source['format']})",
        "",
        "| column | as | kind | values |",
        "| --- | --- | --- | --- |",
    ]
    for f in schema.fields:
        if f.name in used:
            c = columns[f.name]
            names = f"{cell(c.get('column', f.name))} | {cell(f.name)}"
            kind = ("list of ids" if f.is_list else "id") if given else c["kind"]
            known = f"0 to {f.cardinality - 1:,}" if given else f"{f.cardinality - 1:,} known"
            lines.append(f"| {names} | {kind} | {known} |")
    for name in schema.dense:
        c, scale = columns[name], source["dense"][name]
        said = f"mean {scale['mean']:.6g}, deviation {scale['std']:.6g}"
        names = f"{cell(c.get('column', name))} | {cell(name)}"
        lines.append(f"| {names} | dense{', log' if c.get('log') else ''} | {said} |")
    left = [cell(n) for n in schema.names if n not in used]
    unknown = "Values that the training rows did not have often enough, and missing ones, are id 0."
    if given:
        unknown = (
            "The ids are those of the engine that made the training rows, and only it knows the values behind them: "
            "rows need ids from there, and numbers scaled as they were there. A missing id is 0."
        )
    lines += ["", unknown]
    return "\n".join(lines + ([f"Not looked at: {', '.join(left)}."] if left else []))


def _tables(body: Mapping[str, Any], schema: Schema) -> str:
    if body["kind"] == "gated":
        return f"## Widths\n\nEvery field {body['width']}."
    heads = [f"group {k}" for k in range(len(body["widths"]))] if body["kind"] == "routed" else ["width"]
    lines = ["## Widths", "", f"| field | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for name in schema.names:
        lines.append(f"| {cell(name)} | {' | '.join(str(w[name]) for w in body['widths'])} |")
    return "\n".join(lines)


def _evaluation(body: Mapping[str, Any]) -> str:
    keys = ("split", "rows", "auc", "logloss", "embedding_parameters", "dense_parameters", "flops_per_sample", "seed")
    rows = [f"| {k} | {body[k]} |" for k in keys if k in body]
    return "\n".join(["## As the training left it", "", "| | |", "| --- | --- |", *rows])


def _use(body: Mapping[str, Any]) -> str:
    lines = ["## Use", "", "```", "python launch/predict.py --model . --input ROWS --out scores.parquet"]
    lines += ["python -m embsearch_dist.serve .", "```", "", "Inputs of the programs, each with the batch first:", ""]
    for port in body["inputs"]:
        what = f": {', '.join(map(cell, body['ids']))}" if port["name"] == "ids" else ""
        columns = "L" if port["columns"] < 0 else port["columns"]
        lines.append(f"- `{cell(port['name'])}` {port['type']} [B, {columns}]{what}")
    return "\n".join([*lines, "", "Outputs: `logit` and `probability`, float32 [B]."])
