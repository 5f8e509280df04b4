"""A user's own module, named by a config or a command line: it registers backbones and data sources."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from embsearch_dist.errors import UserError

_loaded: dict[Path, str] = {}  # file of a user's -> the module that it was last imported as


def load_module(module: str, key: str) -> None:
    """Import a user's own module, which runs its code; nothing for an empty name. Twice in a process is once.

    Args:
        module: a file that ends in ``.py``, seen from the current folder, or the dotted name of an installed module.
        key: what named it, for messages.

    Raises:
        UserError: it is missing, or its code fails.
    """
    if not module:
        return
    try:
        _load_file(Path(module), key) if module.endswith(".py") else importlib.import_module(module)
    except UserError:
        raise
    except ModuleNotFoundError as e:
        more = "" if e.name and module.startswith(e.name) else f" (it imports {e.name})"
        raise UserError(
            f"{key}: {module} cannot be imported{more}: no module of that name is installed or on PYTHONPATH. Give the "
            "path of a file that ends in .py, or install it"
        ) from e
    except Exception as e:  # whatever the user's code raises
        raise UserError(f"{key}: {module} fails when it is imported ({type(e).__name__}: {e}). Mend it") from e


def _load_file(path: Path, key: str) -> None:
    try:
        body = path.read_bytes()
    except OSError as e:
        raise UserError(
            f"{key}: {path} cannot be read ({e.strerror}); it is looked for from the current folder, {Path.cwd()}"
        ) from e
    # Named by its content too: a notebook that writes the file anew gets the new class.
    name = "embsearch_dist_own_" + hashlib.sha256(str(path.resolve()).encode() + b"\0" + body).hexdigest()[:12]
    if _loaded.get(path.resolve()) == name:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    try:
        # Not by the loader: it would run the bytecode of a file of the same second and size, and leave its own there.
        exec(compile(body, spec.origin or str(path), "exec", dont_inherit=True), made.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[path.resolve()] = name
