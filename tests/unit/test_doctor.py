"""The doctor names each known way to break an installation, and its cure, without installing any of them."""

from __future__ import annotations

import json
import os
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
OLD_CPU = GOOD_CPU | {"torch": "2.11.0+cpu", "torchrec": "1.6.1", "fbgemm-gpu-cpu": "1.6.0"}
OLD_CUDA = GOOD_CUDA | {"torch": "2.11.0+cu130", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0"}
REMOVE = "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu"

Change = dict[str, str | None]


@pytest.mark.parametrize("versions", [GOOD_CPU, GOOD_CUDA, OLD_CPU, OLD_CUDA])
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
        (  # there is no torchrec 1.6.0
            doctor.check_pairing,
            {"torch": "2.11.0"},
            FAIL,
            "torch 2.11.0 needs 1.6",
            ("pip install --no-deps torchrec==1.6.1 fbgemm-gpu-cpu==1.6.0",),
        ),
        (
            doctor.check_packages,
            {"torch": "2.11.0", "torchrec": None},
            FAIL,
            "missing: torchrec",
            ("pip install --no-deps torchrec==1.6.1",),
        ),
        (
            doctor.check_packages,
            {"torch": None, "torchrec": "1.6.1"},
            FAIL,
            "missing: torch",
            ("pip install torch==2.11.0",),
        ),
        (
            doctor.check_pairing,
            {"torch": "2.12.1", "torchrec": "1.7.0", "fbgemm-gpu-cpu": "1.7.0"},
            WARN,
            "they fit, but this project is tested with torch 2.13 and 2.11",
            (),
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
            "ModuleNotFoundError: No module named 'torchrec'",
            {"torch": "2.11.0", "torchrec": None},
            "torchrec is missing",
            ("pip install --no-deps torchrec==1.6.1",),
        ),
        ("torch.AcceleratorError: CUDA error: no kernel image is available", {}, "no code for this card", ()),
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


@pytest.mark.parametrize(
    "error",
    [
        "OSError: libnvidia-ml.so.1: cannot open shared object file: No such file or directory",
        "OSError: libcuda.so.1: cannot open shared object file: No such file or directory",
        "RuntimeError: Found no NVIDIA driver on your system.",
    ],
)
def test_a_machine_without_a_driver_is_no_broken_installation(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    monkeypatch.setattr(doctor, "run_python", lambda code, timeout: (False, error))
    found = doctor.check_operator(GOOD_CUDA)
    assert (found.status, found.fix) == (WARN, ())  # nothing to reinstall
    assert "not checked: no NVIDIA driver here" in found.detail and error in found.detail
    monkeypatch.setattr(doctor, "run_python", lambda code, timeout: (False, "OSError: libcudart.so.13: gone"))
    assert doctor.check_operator(GOOD_CUDA).status == FAIL


@pytest.mark.parametrize(
    ("cards", "versions", "status", "says"),
    [
        (["NVIDIA H100 80GB HBM3, 9.0"] * 2, GOOD_CUDA, OK, "2 found: NVIDIA H100 80GB HBM3, 9.0"),
        (["NVIDIA A100-SXM4-80GB, 8.0"], OLD_CUDA, OK, "1 found"),
        (["NVIDIA L4, 8.9"], GOOD_CUDA, OK, "1 found"),  # code for 8.0 runs on it
        (["Tesla V100-SXM2-32GB, 7.0"], GOOD_CUDA, FAIL, "8.0, 9.0, 10.0 only and cannot run on Tesla V100-SXM2-32GB"),
        (["Tesla T4, 7.5"], OLD_CUDA, FAIL, "fbgemm-gpu 1.6.0 has code for compute capability 8.0"),
        (["NVIDIA GeForce RTX 5090, 12.0"], GOOD_CUDA, FAIL, "RTX 5090, 12.0"),  # newer, but of another generation
        (["NVIDIA H100, 9.0", "Tesla T4, 7.5"], GOOD_CUDA, WARN, "cannot run on Tesla T4"),
        (["Tesla T4, 7.5"], GOOD_CUDA | {"fbgemm-gpu": "1.9.0"}, OK, "1 found"),  # nothing is known of that release
        (["Some card, [N/A]"], GOOD_CUDA, OK, "1 found"),
        (["NVIDIA H100, 9.0"], GOOD_CPU, WARN, "a CPU build of torch"),
        ([], GOOD_CUDA, OK, "0 found"),
    ],
)
def test_a_card_is_compared_with_what_fbgemm_was_built_for(
    cards: list[str], versions: Change, status: str, says: str
) -> None:
    found = doctor.check_cards(cards, versions)
    assert found.status == status, found
    assert says in found.detail
    assert bool(found.fix) == (status != OK)


def test_cards_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answers(body: str) -> Check:
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        return doctor.check_gpu(GOOD_CUDA)

    query = '[ "$*" = "--query-gpu=name,compute_cap --format=csv,noheader" ]'
    found = answers(f"{query} && echo Tesla V100, 7.0")
    assert found.status == FAIL and "cannot run on Tesla V100, 7.0" in found.detail
    found = answers("echo NVIDIA-SMI has failed because it could not communicate with the driver; exit 9")
    assert found.status == WARN and "NVIDIA-SMI has failed" in found.detail


def test_every_tested_pair_is_in_the_table_of_cards() -> None:
    assert set(doctor.BUILT_FOR) == {".".join(pair.fbgemm.split(".")[:2]) for pair in doctor.PAIRS}


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
