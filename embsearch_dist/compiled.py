"""The compiled kernels: C files beside the modules that use them, built by ``setup.py`` where there is a C compiler.

They are read with ctypes. Each module has a fallback in torch, so a missing kernel costs time alone.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

KERNELS = {"attention": "kernels/_attention", "adam": "kernels/_adam"}
"""Name of each kernel -> its file without the suffix, in the package's folder."""
FOLDER = Path(__file__).resolve().parent


def built(name: str, folder: Path = FOLDER) -> list[Path]:
    """The files of a kernel that are there, best suffix first."""
    paths = (folder / f"{KERNELS[name]}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return [p for p in paths if p.exists()]


def load(name: str, version: int) -> ctypes.CDLL | None:
    """A kernel; None where it was not built, or was built from another version of its source.

    Args:
        version: what its function ``NAME_version`` must answer.
    """
    for path in built(name):
        try:
            found = ctypes.CDLL(str(path))
            if getattr(found, f"{name}_version")() == version:
                return found
        except (OSError, AttributeError):
            continue
    return None


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that share the calls of a kernel (ctypes lets go of Python's lock)."""
    return ThreadPoolExecutor(threads, "kernel")
