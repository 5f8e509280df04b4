"""Which file may import which: no circle of files, no circle of folders, and layers that only look down."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [  # from the ground up; what stands in one line does not know each other
    {"errors", "compiled", "pipes", "lockfile", "job"},
    {"precision", "quantised", "written", "doctor"},
    {"files"},
    {"rundir"},
    {"config", "schema", "kept_values"},
    {"allocation"},
    {"grouped"},
    {"kernels"},
    {"data", "width_table"},
    {"ranks"},
    {"stores"},
    {"run", "sharding"},
    {"networks"},
    {"models"},
    {"train"},
    {"methods"},
    {"serving", "report", "running", "library"},
    {"serve", "api"},
    {"launch"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@cache
def imports_of(root: Path = ROOT) -> dict[str, set[str]]:
    """File -> files it imports, anywhere in it; a name out of a package is its file if there is one."""
    files = {}
    for folder in ("embsearch_dist", "launch"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {a.name for a in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name] |= {inner if inner in files else node.module} & files.keys()
        found[name] -= {name}
    return found


def place(file: str) -> str:
    """The folder or file directly in the package that a file belongs to."""
    parts = file.split(".")
    return parts[0] if parts[0] == "launch" or len(parts) == 1 else parts[1]


def between_places(imports: Mapping[str, set[str]]) -> dict[str, dict[str, str]]:
    """Place -> the other places that it imports, each with one import as an example."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, others in imports.items():
        for other in others:
            if place(name) != place(other) and "." in other:
                found[place(name)].setdefault(place(other), f"{name} imports {other}")
    return found


def between_rooms(imports: Mapping[str, set[str]]) -> dict[str, dict[str, set[str]]]:
    """Folder -> what lies directly in it -> what else there it imports. A package's own ``__init__`` may import all."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, others in imports.items():
        for other in others:
            a, b = name.split("."), other.split(".")
            same = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            if same < min(len(a), len(b)):
                found[".".join(a[:same])][a[same]].add(b[same])
    return found


def check_circles(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"a circle of imports: {' <- '.join(e.args[1])}")


def test_no_circle_of_files() -> None:
    check_circles(imports_of())


def test_no_circle_of_folders() -> None:
    check_circles({name: set(others) for name, others in between_places(imports_of()).items()})


def test_no_circle_inside_a_folder() -> None:
    rooms = between_rooms(imports_of())
    assert {"embsearch_dist.data", "embsearch_dist.methods"} <= rooms.keys()
    for graph in rooms.values():
        check_circles(graph)


def test_layers_look_down() -> None:
    wrong = []
    for name, others in between_places(imports_of()).items():
        if name == "embsearch_dist":
            continue
        for other, example in others.items():
            if LEVEL[other] >= LEVEL[name]:
                wrong.append(example)
    assert not wrong, "\n".join(wrong)


def test_a_circle_and_a_look_upwards_are_seen(tmp_path: Path) -> None:
    for file, text in {
        "embsearch_dist/__init__.py": "",
        "embsearch_dist/config.py": "def f():\n    from embsearch_dist.methods import METHODS\n",
        "embsearch_dist/methods/__init__.py": "from embsearch_dist.methods.one import ONE\n",
        "embsearch_dist/methods/one.py": "from embsearch_dist import config\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    imports = imports_of(tmp_path)
    assert imports["embsearch_dist.config"] == {"embsearch_dist.methods"}
    assert imports["embsearch_dist.methods.one"] == {"embsearch_dist.config"}
    with pytest.raises(pytest.fail.Exception, match="embsearch_dist.config <- "):
        check_circles(imports)
    assert between_places(imports)["config"] == {"methods": "embsearch_dist.config imports embsearch_dist.methods"}


def test_what_tools_import_is_there() -> None:
    """Tools are run by hand: one whose module has moved would be found only then."""
    gone = []
    for path in sorted((ROOT / "tools").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("embsearch_dist.", "launch.")):
                base = ROOT / Path(*str(node.module).split("."))
                if not base.with_suffix(".py").exists() and not (base / "__init__.py").exists():
                    gone.append(f"{path.relative_to(ROOT)} imports {node.module}")
    assert not gone, "\n".join(gone)


@pytest.mark.parametrize("script", ["search", "retrain", "evaluate", "export", "predict"])
def test_a_script_loads_nothing_before_it_starts_itself_anew(script: str) -> None:
    """It does so for the threads' environment: what was loaded before would be loaded twice, torch in over a second."""
    before: set[str] = set()
    for node in ast.parse((ROOT / "launch" / f"{script}.py").read_text()).body:
        if isinstance(node, ast.If) and "reexec_with_tuned_environment" in ast.unparse(node):
            break
        if isinstance(node, ast.ImportFrom) and node.module:
            before.add(node.module)
        elif isinstance(node, ast.Import):
            before |= {alias.name for alias in node.names}
    else:
        pytest.fail("it does not start itself anew")
    assert before - set(sys.stdlib_module_names) - {"collections.abc"} == {"embsearch_dist.ranks.environment"}
