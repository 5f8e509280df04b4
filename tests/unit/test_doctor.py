"""The doctor names each known way to break an installation, and its cure, without installing any of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist import doctor
from embsearch_dist.doctor import FAIL, OK, SKIP, WARN, Check

GOOD_CPU: dict[str, str | None] = dict.fromkeys(doctor.REQUIRED, "1.0") | {
    "torch": "2.13.0+cpu",
    "torch.cuda": None,
    "torchrec": "1.8.0",
    "torchx": "0.7.0",
    "urllib3": "1.26.20",
    "fbgemm-gpu-cpu": "1.8.0",
    "fbgemm-gpu": None,
}
GOOD_CUDA = GOOD_CPU | {"torch": "2.13.0", "torch.cuda": "13.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None}
REMOVE = "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu"

Change = dict[str, str | None]


@pytest.mark.parametrize("versions", [GOOD_CPU, GOOD_CUDA])
def test_good_pairs_pass(versions: Change) -> None:
    assert {check.status for check in doctor.version_checks(versions, (3, 11, 7))} == {OK}


@pytest.mark.parametrize(
    ("check", "change", "status", "says", "fix"),
    [
        # pip resolved torchrec's unpinned requirement beside the CPU build
        (
            doctor.check_fbgemm,
            {"fbgemm-gpu": "1.9.0"},
            FAIL,
            "share one folder",
            (REMOVE, "pip install --no-deps fbgemm-gpu-cpu==1.8.0"),
        ),
        (
            doctor.check_fbgemm,
            {"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None},
            FAIL,
            "a CPU build",
            (REMOVE, "pip install --no-deps fbgemm-gpu-cpu==1.8.0"),
        ),
        (
            doctor.check_fbgemm,
            {"fbgemm-gpu-cpu": None},
            FAIL,
            "neither",
            ("pip install --no-deps fbgemm-gpu-cpu==1.8.0",),
        ),
        (
            doctor.check_fbgemm,
            {"torch": "2.13.0+cu130", "torch.cuda": "13.0"},
            WARN,
            "runs on the CPU only",
            (REMOVE, "pip install --no-deps fbgemm-gpu==1.8.0"),
        ),
        (
            doctor.check_fbgemm,
            {"torch": "2.11.0+cu130", "torch.cuda": "13.0", "fbgemm-gpu-cpu": None},
            FAIL,
            "neither",
            ("pip install --no-deps fbgemm-gpu==1.6.0",),
        ),
        (
            doctor.check_pairing,
            {"torchrec": "1.9.2"},
            FAIL,
            "torchrec 1.9.2",
            ("pip install --no-deps torchrec==1.8.0",),
        ),
        (
            doctor.check_pairing,
            {"torch": "2.12.1+cpu"},
            FAIL,
            "torch 2.12.1+cpu needs 1.7",
            ("pip install --no-deps torchrec==1.7.0 fbgemm-gpu-cpu==1.7.0",),
        ),
        (doctor.check_pairing, {"torch": "2.13.1", "torchrec": "1.8.2"}, OK, "1.8", ()),
        (doctor.check_pairing, {"torch": None}, SKIP, "no torch", ()),
        (
            doctor.check_packages,
            {"torchrec": None, "PyYAML": None, "polars": None},
            FAIL,
            "missing: torchrec, polars, PyYAML",
            ("pip install polars PyYAML", "pip install --no-deps torchrec==1.8.0"),
        ),
        (doctor.check_packages, {"torch": None}, FAIL, "missing: torch", ("pip install torch==2.13.0",)),
        (doctor.check_urllib3, {"urllib3": "2.8.0"}, WARN, "< 1.27", ('pip install "urllib3<1.27"',)),
        (doctor.check_urllib3, {"urllib3": "2.8.0", "torchx": None}, OK, "2.8.0", ()),
    ],
)
def test_mismatches(
    check: Callable[[doctor.Versions], Check], change: Change, status: str, says: str, fix: tuple[str, ...]
) -> None:
    found = check(GOOD_CPU | change)
    assert (found.status, found.fix) == (status, fix)
    assert says in found.detail


@pytest.mark.parametrize(("version", "status"), [((3, 10, 1), FAIL), ((3, 11, 0), OK), ((3, 13), OK), ((3, 14), FAIL)])
def test_python(version: tuple[int, ...], status: str) -> None:
    assert doctor.check_python(version).status == status


@pytest.mark.parametrize(
    ("error", "change", "cause", "fix"),
    [
        (
            "OSError: libtorch_cuda.so: cannot open shared object file: No such file or directory",
            {"fbgemm-gpu": "1.9.0"},
            "a CUDA build of FBGEMM is in place",
            (REMOVE, "pip install --no-deps fbgemm-gpu-cpu==1.8.0"),
        ),
        (  # both were installed and one was removed: metadata is fine, files are not
            "OSError: libtorch_cuda.so: cannot open shared object file",
            {},
            "a CUDA build of FBGEMM is in place",
            (REMOVE, "pip install --no-deps --force-reinstall torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0"),
        ),
        (
            "ImportError: fbgemm_gpu_py.so: undefined symbol: _ZN3c10",
            {"fbgemm-gpu-cpu": "1.7.0"},
            "another torch",
            ("pip install --no-deps fbgemm-gpu-cpu==1.8.0",),
        ),
        (
            "ModuleNotFoundError: No module named 'yaml'",
            {"PyYAML": None},
            "yaml is missing",
            ("pip install PyYAML",),
        ),
        (  # the other build was removed, and took this one's files
            "ModuleNotFoundError: No module named 'fbgemm_gpu'",
            {},
            "fbgemm_gpu is missing",
            ("pip install --no-deps --force-reinstall fbgemm-gpu-cpu==1.8.0",),
        ),
        (
            "ModuleNotFoundError: No module named 'fbgemm_gpu.split'",
            {"fbgemm-gpu-cpu": None},
            "fbgemm_gpu is missing",
            ("pip install --no-deps fbgemm-gpu-cpu==1.8.0",),
        ),
        (
            "crashed with SIGSEGV",
            {},
            "does not work here",
            ("pip install --no-deps --force-reinstall torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0",),
        ),
    ],
)
def test_import_errors_are_explained(error: str, change: Change, cause: str, fix: tuple[str, ...]) -> None:
    said, cure = doctor.explain_import_error(error, GOOD_CPU | change)
    assert cause in said
    assert cure == fix


@pytest.mark.parametrize(
    ("code", "good", "says"),
    [
        ("print('noise'); print('fine')", True, "fine"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", False, "crashed with SIGSEGV"),
        ("raise OSError('libtorch_cuda.so: gone')", False, "OSError: libtorch_cuda.so: gone"),
        (  # as fbgemm_gpu reports a library that does not load
            "try:\n raise OSError('libtorch_cuda.so: gone')\nexcept OSError as e:\n raise OSError('no .so') from e",
            False,
            "OSError: libtorch_cuda.so: gone",
        ),
        ("import time; time.sleep(30)", False, "no answer"),
        ("raise SystemExit(3)", False, "exit code 3"),
    ],
)
def test_a_broken_import_cannot_take_the_doctor_down(code: str, good: bool, says: str) -> None:
    ended_well, text = doctor.run_python(code, timeout=2)
    assert ended_well == good
    assert says in text


def test_low_space_is_only_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": int(0.064e9)}))
    assert doctor.check_space(tmp_path, shm=tmp_path).status == WARN


def test_report_and_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("a", OK, "fine", ("pip unused",)), Check("b", FAIL, "broken", ("pip install x", "bash y"))]
    monkeypatch.setattr(doctor, "examine", lambda quick: checks)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert f"  {sys.executable} -m pip install x\n  bash y" in text and "unused" not in text
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1] == {
        "name": "b",
        "status": "FAIL",
        "detail": "broken",
        "fix": ["pip install x", "bash y"],
    }
    monkeypatch.setattr(doctor, "examine", lambda quick: [Check("c", WARN, "meh")])
    assert doctor.main([]) == 0


def test_the_doctor_itself_imports_none_of_its_patients() -> None:
    code = (
        "import sys, embsearch_dist.doctor as d; d.examine(quick=True)\n"
        "print([m for m in ('torch', 'torchrec', 'fbgemm_gpu', 'torchx', 'numpy') if m in sys.modules])"
    )
    root = Path(doctor.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_operator_runs_here() -> None:
    check = doctor.check_operator(doctor.installed_versions())
    assert check.status == OK, check
