"""The manifest of a checkpoint: what it holds, byte for byte, and what it was made for.

``manifest.json`` is written last, so a directory without one is not a checkpoint. It names every file with
its size and SHA-256, and itself carries a checksum of the rest of it. Nothing of a checkpoint is read before
all that was compared: DCP's own metadata is a pickle, and DCP notices no flipped bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from embsearch_dist.config.settings import changed_settings, fingerprint, tell_changed
from embsearch_dist.errors import UserError
from embsearch_dist.files import digest, read_json, write_json
from embsearch_dist.schema import differs

NAME = "manifest.json"
FORMAT = 3
LAZY_ADAM = 3  # from this format on Adam moves looked-up rows alone, and the count of its steps is saved
FORM = ("model.transform", "model.first_order")  # settings that say what tensors of one shape mean


def write_manifest(directory: Path, facts: dict[str, Any]) -> None:
    """Describe every file of ``directory``; ``facts`` is what else the manifest says."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != NAME)
    listed = {str(p.relative_to(directory)): digest(p) for p in files}
    body = {**facts, "files": listed}
    write_json(directory / NAME, {**body, "sha256": _seal(body)})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, itself checked (one of an older version has no checksum of its own)."""
    path = directory / NAME
    if not path.exists():
        raise UserError(f"{directory} is not a whole checkpoint: {NAME} is missing")
    try:
        body = read_json(path)
    except (UserError, UnicodeDecodeError) as e:
        raise UserError(f"checkpoint file {path} is damaged ({e})") from e
    seal = body.pop("sha256", None)
    if ("format" in body and seal is None) or (seal is not None and seal != _seal(body)):
        raise UserError(f"checkpoint file {path} is damaged (it differs from its own checksum)")
    if not isinstance(body.get("files"), dict):
        raise UserError(f"checkpoint file {path} is damaged (it lists no files)")
    return body


def verify(directory: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return that.

    Raises:
        UserError: naming the first file that is missing, has another size or another checksum.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.exists():
            raise UserError(f"checkpoint file {path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"checkpoint file {path} is damaged (it has {size} bytes, not {entry['bytes']})")
        if digest(path)["sha256"] != entry["sha256"]:
            raise UserError(f"checkpoint file {path} is damaged (its checksum differs from the manifest)")
    return manifest


def facts_of(
    step: int, world_size: int, kinds: dict[str, str], schema: str, settings: dict[str, Any], data: str = ""
) -> dict[str, Any]:
    """What a manifest says beside its files.

    Args:
        kinds: table name -> sharding kind, the plan in short.
        schema: fingerprint of the data's schema.
        data: identity of the data, where it is known.
        settings: flat settings that the tensors and the course of training depend on.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read again: tuples become lists
    return {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "sharding": dict(sorted(kinds.items())),
        "schema": schema,
        **({"data": data} if data else {}),
        "config": fingerprint(settings),
        "settings": settings,
    }


def check_facts(directory: Path, old: dict[str, Any], new: dict[str, Any], exact: bool) -> None:
    """Compare what a checkpoint was made for with this run. What an older manifest lacks is not compared.

    World size and sharding are not compared here: whether a state can be spread anew shows in loading it.

    Args:
        old, new: the manifest, and :func:`facts_of` this run.
        exact: training is to continue, so all settings must be the same, too; else :data:`FORM` must.

    Raises:
        UserError: saying what differs and what to do.
    """
    if old.get("step", new["step"]) != new["step"]:
        raise UserError(
            f"checkpoint {directory} is of step {old['step']}, so it was renamed or copied; "
            f"give it back its name step-{old['step']}"
        )
    if new["schema"] and old.get("schema", new["schema"]) != new["schema"]:
        raise UserError(
            f"checkpoint {directory} was made for data with another schema ({old['schema']}, now {new['schema']}); "
            "set --data.path to the data it was made with, or start anew in another --run.dir"
        )
    if differs(old.get("data", ""), new.get("data", "")):
        raise UserError(
            f"checkpoint {directory} was made from data {old['data']}, this is {new['data']}: the same fields, but "
            "other rows or ids. Set --data.path to the data it was made from, or start anew in another --run.dir"
        )
    if new["settings"] and old.get("settings"):
        # Tensors of the same shapes may mean other things under these.
        keys = [k for k in changed_settings(old["settings"], new["settings"]) if k in FORM]
        if keys:
            raise UserError(
                f"checkpoint {directory} holds another model: {tell_changed(old['settings'], new['settings'], keys)}. "
                "Put that back, or start anew in another --run.dir"
            )
    key = "optim.embedding"
    both = old.get("settings", {}).get(key), new["settings"].get(key)
    if exact and both == ("adam", "adam") and old.get("format", 1) < LAZY_ADAM:
        raise UserError(
            f"checkpoint {directory} was made when {key} adam moved every row in every step, or did not save the count "
            "of its steps; today's moves looked-up rows alone, so this training cannot go on. Start anew in another "
            "--run.dir; the weights can still be evaluated and searched"
        )
    if exact and new["settings"] and old.get("config", new["config"]) != new["config"]:
        before, now = old.get("settings", {}), new["settings"]
        keys = changed_settings(before, now) if before else list(now)
        if not keys:
            return
        raise UserError(
            f"checkpoint {directory} does not fit this run of {new['world_size']} rank(s): it was made with other "
            f"settings: {tell_changed(before, now, keys)}. Put them back, or start anew in another --run.dir"
        )


def spread(facts: dict[str, Any]) -> str:
    """World size and sharding for people: ``2 rank(s), row_wise: big, table_wise: 3 tables``."""
    by_kind: dict[str, list[str]] = {}
    for table, kind in facts.get("sharding", {}).items():
        by_kind.setdefault(kind, []).append(table)
    parts = [f"{k}: {v[0] if len(v) == 1 else f'{len(v)} tables'}" for k, v in sorted(by_kind.items())]
    return ", ".join([f"{facts.get('world_size', '?')} rank(s)", *parts])


def same_spread(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether ranks and sharding are those of the checkpoint, as far as it says."""
    return all(old.get(k, new[k]) == new[k] for k in ("world_size", "sharding"))


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
