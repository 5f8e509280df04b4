"""Set-up files agree with each other and with what the code imports; scripts parse and keep their promises."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from embsearch_dist import doctor

TIERS = {"unit", "distributed", "launch", "pretend", "cluster", "gpu", "slow"}
SCRIPTS = ("tools/setup.sh", "tools/test.sh", "tools/demo.sh", "tools/site.sh", "tools/wheel_check.sh", ".ci/run")
PIP_NAME = {"yaml": "pyyaml", "sklearn": "scikit-learn", "fbgemm_gpu": "fbgemm-gpu"}


def pins(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def setup_call(repo_root: Path) -> dict[str, object]:
    """The arguments of setup(), read without running it."""
    tree = ast.parse((repo_root / "setup.py").read_text())
    call = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    values = {}
    for keyword in call.keywords:
        try:
            values[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:  # computed, e.g. the version
            continue
    return values


def pinned(repo_root: Path, pair: str) -> dict[str, dict[str, str]]:
    """Pins by file, as ``tools/setup.sh --pair`` installs them; "" is the default pair."""
    instead = pins(repo_root / "requirements" / f"pair-{pair}.txt") if pair else {}
    files = {name: pins(repo_root / "requirements" / f"{name}.txt") for name in ("common", "cpu", "cuda", "test")}
    assert set(instead) <= {package for found in files.values() for package in found}
    return {name: {package: instead.get(package, found[package]) for package in found} for name, found in files.items()}


@pytest.mark.parametrize("which", range(2))
def test_the_pinned_pairs_fit(repo_root: Path, which: int) -> None:
    """They are the tested ones; the first needs no option."""
    tested = doctor.PAIRS[which]
    files = pinned(repo_root, "1.6" if which else "")
    common = files["common"]
    assert common["torch"] == tested.torch
    for variant, build in (("cpu", "fbgemm-gpu-cpu"), ("cuda", "fbgemm-gpu")):
        pair = files[variant]
        assert pair == {"torchrec": tested.torchrec, build: tested.fbgemm}
        cuda = "13.0" if variant == "cuda" else None
        versions = {"torch": common["torch"], "torch.cuda": cuda, **pair}
        assert doctor.check_pairing(versions).status == doctor.OK
        assert doctor.check_fbgemm(versions).status == doctor.OK
    assert not set(common) & {"torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"}  # these go in last, without dependencies


@pytest.mark.parametrize(("pair", "suffix"), [("", ""), ("1.6", "-torch211")])
def test_pins_are_within_the_ranges_of_setup(repo_root: Path, setup_call: dict, pair: str, suffix: str) -> None:
    packaging = pytest.importorskip("packaging.requirements")
    files, extras = pinned(repo_root, pair), setup_call["extras_require"]
    ranges = [(files["common"], setup_call["install_requires"]), (files["test"], extras["test"])]
    ranges += [(files["test"], extras[name]) for name in doctor.EXTRAS]
    ranges += [(files["common"] | files[variant], extras[variant + suffix]) for variant in ("cpu", "cuda")]
    for found, lines in ranges:
        for line in lines:
            requirement = packaging.Requirement(line)
            assert requirement.specifier.contains(found[normal(requirement.name)]), line
    # pip would follow torchrec to the CUDA build
    assert not any(line.startswith("torchrec") for line in extras["cpu" + suffix])


def test_a_package_has_one_version_in_all_files(repo_root: Path) -> None:
    ours = {name: pins(repo_root / "requirements" / f"{name}.txt") for name in ("common", "test", "docs")}
    for name, version in ours["docs"].items():
        assert {ours[other].get(name, version) for other in ("common", "test")} == {version}, name


def test_setup_admits_only_what_is_tested(setup_call: dict) -> None:
    packaging = pytest.importorskip("packaging.requirements")
    (line,) = [line for line in setup_call["install_requires"] if re.match(r"torch\W", line)]
    admitted = [f"2.{minor}.0" for minor in range(20) if packaging.Requirement(line).specifier.contains(f"2.{minor}.0")]
    assert admitted == sorted(pair.torch for pair in doctor.PAIRS)


def test_the_doctor_knows_the_requirements(setup_call: dict) -> None:
    required = {normal(re.split(r"[<>=]", line)[0]) for line in setup_call["install_requires"]}
    assert {normal(name) for name in doctor.REQUIRED} == (required - {"urllib3"}) | {"torchrec"}
    extras = setup_call["extras_require"]
    for name, packages in doctor.EXTRAS.items():
        assert [re.split(r"[<>=]", line)[0] for line in extras[name]] == list(packages)
        assert set(extras[name]) <= set(extras["test"])  # or their tests would not run everywhere


def test_everything_imported_is_required(repo_root: Path) -> None:
    optional = {package for packages in doctor.EXTRAS.values() for package in packages}
    known = {normal(name) for name in (*doctor.REQUIRED, *optional)} | {"fbgemm-gpu"}
    strange = set()
    for path in [*(repo_root / "embsearch_dist").rglob("*.py"), *(repo_root / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top in ("embsearch_dist", "launch"):
                    continue
                if normal(PIP_NAME.get(top, top)) not in known:
                    strange.add(f"{path.relative_to(repo_root)}: {top}")
    assert not strange


def test_every_package_folder_is_installed(repo_root: Path) -> None:
    """A folder without __init__.py is left out of the wheel, though it works from the repository."""
    folders = {path.parent for name in ("embsearch_dist", "launch") for path in (repo_root / name).rglob("*.py")}
    assert [str(f.relative_to(repo_root)) for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_torchx_registration(repo_root: Path, setup_call: dict) -> None:
    entries = dict(line.split(" = ") for line in setup_call["entry_points"]["torchx.components"])
    assert entries["dist"] == "launch.ddp"
    assert entries["utils"] == "torchx.components.utils"  # else ours would hide TorchX's own
    config = configparser.ConfigParser()
    config.read(repo_root / ".torchxconfig")
    assert config["cli:run"]["scheduler"] == "local_cwd"


def test_markers_and_default_selection(repo_root: Path) -> None:
    options = tomllib.loads((repo_root / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert {line.split(":")[0] for line in options["markers"]} == TIERS
    assert options["addopts"][-2:] == ["-m", "not slow"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts(repo_root: Path, script: str) -> None:
    path = repo_root / script
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_no_addresses_in_tracked_setup_files(repo_root: Path) -> None:
    files = [*SCRIPTS, "setup.py", "pyproject.toml", ".torchxconfig", *map(str, (repo_root / "requirements").glob("*"))]
    for name in files:
        assert not re.search(r"https?://|--index-url [^\"$]", (repo_root / name).read_text()), name


def test_ignore_rules_hide_no_source(repo_root: Path) -> None:
    if not shutil.which("git") or not (repo_root / ".git").exists():
        pytest.skip("not a git checkout")
    folders = [repo_root / name for name in ("embsearch_dist", "launch", "tests", "configs", "tools")]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    sources = [str(p.relative_to(repo_root)) for p in files if p.suffix != ".so"]
    done = subprocess.run(["git", "check-ignore", *sources], cwd=repo_root, capture_output=True, text=True)
    assert done.stdout == ""


def test_ruff_sees_every_source(repo_root: Path) -> None:
    """Its default excludes hold ``dist``, the name of a package here."""
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    listed = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60, check=True)
    seen = {Path(line).resolve() for line in listed.stdout.splitlines()}
    sources = [p for name in ("embsearch_dist", "launch", "tests", "tools") for p in (repo_root / name).rglob("*.py")]
    assert [str(p.relative_to(repo_root)) for p in sources if p.resolve() not in seen] == []


# ---- tools/setup.sh with a stand-in for Python: what it does, without installing anything ----

FAKE_PYTHON = """#!/usr/bin/env bash
# Notes each call; `-m venv FOLDER` makes a folder whose python is this script again.
echo "$*" >> "$FAKE_LOG"
case "$*" in
    "-c import sys; sys.exit"*) exit 0 ;;
    "-c "*) echo 3.11 ;;
    --version) echo "Python 3.11.0" ;;
    "-m venv --clear --without-pip "*) [[ "$FAKE_VENV" == nopip ]] || exit 1; folder=${*: -1} ;;
    "-m venv "*) [[ "$FAKE_VENV" == ok ]] || exit 1; folder=${*: -1} ;;
    "-m virtualenv "*) exit 1 ;;
    *"$FAKE_FAIL"*) exit 1 ;;
esac
if [[ -n ${folder:-} ]]; then
    mkdir -p "$folder/bin"
    touch "$folder/pyvenv.cfg"
    cp "$0" "$folder/bin/python"
fi
"""


class FakeSetup:
    """Runs a copy of tools/setup.sh whose every Python is FAKE_PYTHON."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.tree, self.log = folder / "tree", folder / "log"
        (self.tree / "tools").mkdir(parents=True)
        shutil.copy(root / "tools" / "setup.sh", self.tree / "tools")
        shutil.copytree(root / "requirements", self.tree / "requirements")
        shutil.copy(root / "setup.py", self.tree)
        (self.tree / "embsearch_dist" / "kernels").mkdir(parents=True)
        shutil.copy(root / "embsearch_dist" / "kernels" / "attention.c", self.tree / "embsearch_dist" / "kernels")
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def run(self, *args: str, venv: str = "ok", fail: str = "#none#", **env: str) -> tuple[int, str, str]:
        """Exit code, output, and the Python calls made."""
        self.log.write_text("")
        fakes = {"PYTHON": str(self.python), "FAKE_LOG": str(self.log), "FAKE_VENV": venv, "FAKE_FAIL": fail}
        command = ["bash", str(self.tree / "tools" / "setup.sh"), *args]
        clean = {k: v for k, v in os.environ.items() if k != "TORCH_INDEX_URL"}
        done = subprocess.run(command, env=clean | fakes | env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, self.log.read_text()


@pytest.fixture
def fake(repo_root: Path, tmp_path: Path) -> FakeSetup:
    return FakeSetup(repo_root, tmp_path)


def test_setup_order_and_second_run(fake: FakeSetup) -> None:
    code, output, calls = fake.run()
    assert code == 0, output
    order = ["-r requirements/common.txt", "uninstall", "--no-deps -r requirements/cpu.txt", "--editable", "doctor"]
    places = [calls.index(word) for word in order]
    assert places == sorted(places)
    code, output, calls = fake.run()
    assert code == 0
    assert "pip install" not in calls and "doctor --quick" in calls
    code, _, calls = fake.run("--test")
    assert "requirements/test.txt" in calls and "requirements/common.txt" not in calls
    assert "pip install" not in fake.run("--test")[2]


def test_setup_again_after_requirements_changed(fake: FakeSetup) -> None:
    fake.run()
    with (fake.tree / "requirements" / "common.txt").open("a") as f:
        f.write("another==1\n")
    assert "requirements/common.txt" in fake.run()[2]


@pytest.mark.parametrize("fail", ["requirements/common.txt", "requirements/cpu.txt"])
def test_a_half_built_environment_is_rebuilt(fake: FakeSetup, fail: str) -> None:
    code, output, _ = fake.run(fail=fail)
    assert code == 1 and "failed; run this again" in output
    (fake.tree / ".venv" / "leftover").touch()
    code, output, calls = fake.run()
    assert code == 0 and "removing the half-built" in output
    assert "-m venv" in calls and not (fake.tree / ".venv" / "leftover").exists()


def test_a_failing_doctor_fails_the_setup_and_is_not_remembered(fake: FakeSetup) -> None:
    assert fake.run(fail="embsearch_dist.doctor")[0] == 1
    assert "requirements/common.txt" in fake.run()[2]


def test_without_ensurepip(fake: FakeSetup) -> None:
    code, output, calls = fake.run(venv="nopip")
    assert code == 0, output
    assert "-m pip --python" in calls


def test_without_any_way_to_make_an_environment(fake: FakeSetup) -> None:
    code, output, _ = fake.run(venv="none")
    assert code == 1 and "apt-get install python3.11-venv" in output


def test_a_folder_that_is_no_environment_is_left_alone(fake: FakeSetup) -> None:
    precious = fake.tree / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    code, output, _ = fake.run("cpu", "precious")
    assert code == 1 and "was not made by this script" in output
    assert (precious / "thesis.txt").exists()


def test_an_environment_without_pip_that_others_made_is_left_alone(fake: FakeSetup) -> None:
    """As uv and ``python -m venv --without-pip`` make them, in the default folder."""
    package = fake.tree / ".venv" / "lib" / "package.py"
    package.parent.mkdir(parents=True)
    package.touch()
    (fake.tree / ".venv" / "pyvenv.cfg").touch()
    code, output, calls = fake.run()
    assert code == 1 and "has no pip, and was not made by this script" in output
    assert package.exists() and "-m venv" not in calls


def test_cpu_and_cuda_do_not_mix(fake: FakeSetup) -> None:
    fake.run("cpu")
    code, output, _ = fake.run("cuda")
    assert code == 1 and "set up for cpu" in output


def test_another_pair_replaces_the_pins_and_needs_a_folder_of_its_own(fake: FakeSetup) -> None:
    code, output, calls = fake.run("cpu", "--test", ".venv-old", "--pair", "1.6", TORCH_INDEX_URL="file:///wheels")
    assert code == 0, output
    folder = fake.tree / ".venv-old" / "requirements"
    assert "--index-url file:///wheels torch==2.11.0" in calls
    assert [f"-r .venv-old/requirements/{name}.txt" in calls for name in ("common", "cpu", "test")] == [True] * 3
    common, cpu = pins(folder / "common.txt"), pins(folder / "cpu.txt")
    assert (common["torch"], cpu) == ("2.11.0", {"torchrec": "1.6.1", "fbgemm-gpu-cpu": "1.6.0"})
    default = pins(fake.tree / "requirements" / "common.txt")
    assert {name for name in default if common[name] != default[name]} == {"torch", "setuptools"}
    assert "pip install" not in fake.run("cpu", ".venv-old", "--pair", "1.6")[2]
    code, output, _ = fake.run("cpu", ".venv-old")
    assert code == 1 and "is set up for cpu-1.6" in output
    with (fake.tree / "requirements" / "pair-1.6.txt").open("a") as f:
        f.write("numpy==2.0.0\n")
    assert "pip install" in fake.run("cpu", ".venv-old", "--pair", "1.6")[2]


@pytest.mark.parametrize("words", [["--pair", "1.7"], ["--pair"]])
def test_an_unknown_pair_changes_nothing(fake: FakeSetup, words: list[str]) -> None:
    code, output, calls = fake.run(*words)
    assert code == 2 and "--pair" in output and not calls
    assert not (fake.tree / ".venv").exists()
    assert "are 1.8 (the default) and 1.6" in output or words == ["--pair"]


def test_torch_index(fake: FakeSetup) -> None:
    _, _, calls = fake.run("cuda", TORCH_INDEX_URL="file:///wheels")
    assert re.search(r"--no-deps --index-url file:///wheels torch==\d", calls)
    assert calls.index("file:///wheels") < calls.index("requirements/common.txt")
