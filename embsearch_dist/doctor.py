"""Preflight: ``python -m embsearch_dist.doctor`` says what is wrong with an installation and how to cure it.

The usual trouble is a torch, TorchRec and FBGEMM that do not belong together; it shows as a missing
``libtorch_cuda.so``, an undefined symbol, or a crash. So nothing of them is imported here: versions
are read from package metadata, and imports are tried in a process of their own, which may die.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from embsearch_dist import compiled

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"


@dataclass(frozen=True)
class Pair:
    """Releases that belong together."""

    torch: str
    torchrec: str
    fbgemm: str


PAIRS = (Pair("2.13.0", "1.8.0", "1.8.0"), Pair("2.11.0", "1.6.1", "1.6.0"))
"""What this project is tested with; the first is what tools/setup.sh installs. There is no TorchRec 1.6.0 on PyPI."""
MINOR_GAP = 5
"""TorchRec and FBGEMM 1.N are built for torch 2.(N + 5)."""
PYTHONS = ((3, 11), (3, 13))
REQUIRED = (
    *("torch", "torchrec", "numpy", "pyarrow", "polars", "tensorboard", "tqdm", "omegaconf", "PyYAML", "scipy"),
    *("matplotlib", "psutil", "torchx", "iopath", "tensordict", "torchmetrics", "pyre-extensions"),
)
"""Packages (by their pip name) without which some part does not import."""
EXTRAS = {
    "export": ("safetensors", "onnx", "onnxscript", "onnxruntime"),
    "serve": ("safetensors", "starlette", "uvicorn"),
}
"""Packages of extras: what needs them says so."""
CPU_BUILD, CUDA_BUILD = "fbgemm-gpu-cpu", "fbgemm-gpu"
BUILT_FOR = {"1.6": ((8, 0), (9, 0), (10, 0)), "1.8": ((8, 0), (9, 0), (10, 0))}
"""Compute capabilities that the CUDA build of FBGEMM holds machine code for, by its release: read from the fat
binaries in its wheels (it offers no way to ask). None holds PTX, so no other card can run it."""

Versions = Mapping[str, str | None]
"""Installed version by pip name, None when absent; ``torch.cuda`` is the CUDA version torch was built for."""


@dataclass(frozen=True)
class Check:
    """One line of the report; ``fix`` holds the commands that cure it, in order."""

    name: str
    status: str
    detail: str
    fix: tuple[str, ...] = ()


# ---- checks of versions: pure, so that every mismatch is tested without installing it ----


def check_python(version: Sequence[int]) -> Check:
    """Python is one that the pinned packages have wheels for."""
    low, high = PYTHONS
    text = ".".join(map(str, version[:3]))
    if low <= tuple(version[:2]) <= high:
        return Check("python", OK, text)
    wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return Check("python", FAIL, f"{text}, needs {wanted}", ("PYTHON=python3.11 bash tools/setup.sh",))


def check_packages(versions: Versions) -> Check:
    """Everything that gets imported is there."""
    missing = [name for name in REQUIRED if not versions.get(name)]
    if not missing:
        return Check("packages", OK, f"all {len(REQUIRED)} present")
    plain = [name for name in missing if name not in ("torch", "torchrec")]
    fix = []
    if "torch" in missing:
        fix.append(f"pip install torch=={_pair_of(versions.get('torchrec')).torch}")
    if plain:
        fix.append(f"pip install {' '.join(plain)}")
    if "torchrec" in missing:
        fix.append(f"pip install --no-deps torchrec=={_pair_for(versions.get('torch')).torchrec}")
    return Check("packages", FAIL, f"missing: {', '.join(missing)}", tuple(fix))


def check_pairing(versions: Versions) -> Check:
    """torch 2.(N+5) goes with TorchRec 1.N and FBGEMM 1.N, and this project is tested with some such pairs."""
    torch = versions.get("torch")
    if not torch:
        return Check("pairing", SKIP, "no torch")
    pair = _pair_for(torch)
    wanted = {"torchrec": pair.torchrec, CPU_BUILD: pair.fbgemm, CUDA_BUILD: pair.fbgemm}
    found = {name: version for name in wanted if (version := versions.get(name))}
    wrong = {name: version for name, version in found.items() if _minor(version) != _minor(wanted[name])}
    if wrong:
        told = ", ".join(f"{name} {version}" for name, version in wrong.items())
        fix = "pip install --no-deps " + " ".join(f"{name}=={wanted[name]}" for name in wrong)
        return Check("pairing", FAIL, f"torch {torch} needs {_minor(pair.fbgemm)}, found {told}", (fix,))
    detail = f"torch {torch} with TorchRec and FBGEMM {_minor(pair.fbgemm)}"
    if pair not in PAIRS:
        tested = " and ".join(_minor(p.torch) for p in PAIRS)
        return Check("pairing", WARN, f"{detail}: they fit, but this project is tested with torch {tested}")
    return Check("pairing", OK, detail)


def check_fbgemm(versions: Versions) -> Check:
    """Exactly one build of FBGEMM, and the one for this build of torch."""
    name, cpu, cuda = "fbgemm", versions.get(CPU_BUILD), versions.get(CUDA_BUILD)
    torch_cuda, pair = versions.get("torch.cuda"), _pair_for(versions.get("torch"))
    build = CUDA_BUILD if torch_cuda else CPU_BUILD
    install = f"pip install --no-deps {build}=={pair.fbgemm}"
    remove = f"pip uninstall -y {CUDA_BUILD} {CPU_BUILD}"
    if cpu and cuda:
        detail = f"{CUDA_BUILD} {cuda} and {CPU_BUILD} {cpu} share one folder (pip resolved torchrec's dependency)"
        return Check(name, FAIL, detail, (remove, install))
    if not cpu and not cuda:
        return Check(name, FAIL, "neither build is installed", (install,))
    if cuda and not torch_cuda:
        detail = f"{CUDA_BUILD} {cuda} is a CUDA build, torch {versions.get('torch')} a CPU build"
        return Check(name, FAIL, detail, (remove, install))
    if cpu and torch_cuda:
        detail = f"{CPU_BUILD} {cpu} beside torch for CUDA {torch_cuda}: runs on the CPU only"
        return Check(name, WARN, detail, (remove, install))
    return Check(name, OK, f"{CPU_BUILD} {cpu}" if cpu else f"{CUDA_BUILD} {cuda}, torch for CUDA {torch_cuda}")


def check_urllib3(versions: Versions) -> Check:
    """torchx 0.7 requires urllib3 < 1.27; the kubernetes package replaces it."""
    torchx, urllib3 = versions.get("torchx"), versions.get("urllib3")
    if not torchx or not torchx.startswith("0.7") or not urllib3 or _release(urllib3) < (1, 27):
        return Check("urllib3", OK, urllib3 or "absent")
    return Check("urllib3", WARN, f"{urllib3}, torchx {torchx} asks for < 1.27", ('pip install "urllib3<1.27"',))


def version_checks(versions: Versions, python: Sequence[int]) -> list[Check]:
    """All checks that need no import."""
    checks: list[Callable[[Versions], Check]] = [check_packages, check_pairing, check_fbgemm, check_urllib3]
    return [check_python(python), *(check(versions) for check in checks)]


def _release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _minor(version: str) -> str:
    return ".".join(map(str, _release(version)[:2]))


def _pair_for(torch: str | None) -> Pair:
    """The releases for a torch; the first of ``PAIRS`` when torch is absent or unheard of."""
    release = _release(torch or "")
    if len(release) < 2 or release[0] != 2 or release[1] < MINOR_GAP:
        return PAIRS[0]
    ruled = Pair(f"2.{release[1]}.0", *[f"1.{release[1] - MINOR_GAP}.0"] * 2)
    return next((p for p in PAIRS if _minor(p.torch) == _minor(ruled.torch)), ruled)


def _pair_of(torchrec: str | None) -> Pair:
    """The releases for a TorchRec, in the same way."""
    release = _release(torchrec or "")
    return _pair_for(f"2.{release[1] + MINOR_GAP}" if len(release) > 1 and release[0] == 1 else None)


# ---- checks that run something ----

_OPERATOR = """
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
kjt = KeyedJaggedTensor.from_lengths_sync(["a"], torch.tensor([1, 2]), torch.tensor([1, 1], dtype=torch.int32))
ebc = EmbeddingBagCollection([EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["a"])])
assert ebc(kjt).values().shape == (2, 4)
cuda = torch.cuda.is_available() and FLAVOUR == "cuda"
place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
device = "cuda" if cuda else "cpu"
table = SplitTableBatchedEmbeddingBagsCodegen([(4, 4, *place)], optimizer=EmbOptimType.EXACT_SGD, learning_rate=1.0)
weight = table.split_embedding_weights()[0]
weight.data.fill_(1.0)
table(torch.tensor([1], device=device), torch.tensor([0, 1], device=device)).sum().backward()
assert weight[1].eq(0).all() and weight[0].eq(1).all(), "the fused update did not happen"
print("look-up and fused update ran on", torch.cuda.get_device_name() if cuda else "the CPU")
"""

_TORCHX = """
from torchx.specs.finder import get_component
print("dist.ddp is", get_component("dist.ddp").fn.__module__)
"""


DRIVER = re.compile(r"libnvidia-ml|libcuda\.so|Found no NVIDIA driver")
"""Errors of an installation that is whole, on a machine without the driver that its CUDA build loads."""
NO_DRIVER = "no NVIDIA driver here. A login node or CI needs none; on the node of the job run this again"


def explain_import_error(error: str, versions: Versions) -> tuple[str, tuple[str, ...]]:
    """A cause in words and its cure, from the last line a failed import printed."""
    fbgemm = check_fbgemm(versions)
    torch_cuda = versions.get("torch.cuda")
    build, pair = (CUDA_BUILD if torch_cuda else CPU_BUILD), _pair_for(versions.get("torch"))
    again = f"pip install --no-deps --force-reinstall torchrec=={pair.torchrec} {build}=={pair.fbgemm}"
    if "libtorch_cuda" in error or "libcudart" in error:
        remove = f"pip uninstall -y {CUDA_BUILD} {CPU_BUILD}"
        return "CUDA libraries are wanted: a CUDA build of FBGEMM is in place", fbgemm.fix or (remove, again)
    if "no kernel image" in error:
        return "FBGEMM holds no code for this card: see the check gpu", ()
    if "undefined symbol" in error:
        return "FBGEMM was built for another torch", check_pairing(versions).fix or (again,)
    if found := re.search(r"No module named '([\w.]+)'", error):
        top = found[1].split(".")[0]
        package = {"yaml": "PyYAML", "pyre_extensions": "pyre-extensions", "fbgemm_gpu": build}.get(top, top)
        # Removing one FBGEMM build takes files of the other: pip then believes what is gone to be there.
        options = "--no-deps --force-reinstall " if versions.get(package) else ""
        release = {"torchrec": pair.torchrec, build: pair.fbgemm}.get(package)
        if release:
            options, package = options or "--no-deps ", f"{package}=={release}"
        return f"{top} is missing", (f"pip install {options}{package}",)
    return "TorchRec or FBGEMM does not work here", fbgemm.fix or (again,)


def run_python(code: str, timeout: float) -> tuple[bool, str]:
    """Run code in a fresh interpreter; whether it ended well, and its last line or what it died of."""
    # Without -P a file of the current folder, such as launch/ddp.py, could stand in for a package.
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {timeout:.0f} s"
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    said = lines[-1].strip() if lines else f"exit code {done.returncode}"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return False, f"crashed with {name} after: {said}" if lines else f"crashed with {name}"
    if done.returncode > 0:
        # Of chained exceptions the first is the cause; the last only says that loading failed.
        said = next((line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)), said)
    return done.returncode == 0, said


def check_operator(versions: Versions, timeout: float = 120) -> Check:
    """An embedding look-up and its fused update give the right numbers."""
    flavour = "cuda" if versions.get(CUDA_BUILD) else "cpu"
    good, text = run_python(f"FLAVOUR = {flavour!r}\n{_OPERATOR}", timeout)
    if good:
        return Check("operator", OK, text)
    if DRIVER.search(text):
        return Check("operator", WARN, f"not checked: {NO_DRIVER} ({text[:200]})")
    cause, fix = explain_import_error(text, versions)
    return Check("operator", FAIL, f"{cause} ({text[:200]})", fix)


def check_torchx(timeout: float = 60) -> Check:
    """``torchx run dist.ddp`` finds this repository's component, which takes the script as its first word."""
    good, text = run_python(_TORCHX, timeout)
    root = Path(__file__).resolve().parent.parent
    fix = (f"pip install --no-deps --no-build-isolation -e {root}",)
    if good and text == "dist.ddp is launch.ddp":
        return Check("torchx", OK, text)
    return Check("torchx", FAIL, f"{text[:200]}, should be launch.ddp", fix)


def check_kernel(folder: Path = compiled.FOLDER) -> Check:
    """The compiled kernels are there; without them everything runs on CPU, but slower."""
    missing = [name for name in compiled.KERNELS if not compiled.built(name, folder)]
    if not missing:
        return Check("kernel", OK, f"{' and '.join(compiled.KERNELS)} are compiled")
    fix = ("apt-get install gcc", f"pip install --no-deps --no-build-isolation -e {folder.parent}")
    costs = {"attention": "NASRec", "adam": "optim.embedding adam"}
    slower = " and ".join(costs[name] for name in missing)
    text = f"not compiled (no C compiler?): {', '.join(missing)}; on CPU {slower} will be slower"
    return Check("kernel", WARN, text, fix)


def check_space(folder: Path, shm: Path = Path("/dev/shm")) -> Check:
    """Hints only: room for prepared data and checkpoints here, and for worker processes in shared memory."""
    free = shutil.disk_usage(folder).free / 1e9
    notes = [f"{free:.0f} GB free here"]
    low = free < 5
    if shm.is_dir():
        shared = shutil.disk_usage(shm).free / 1e9
        notes.append(f"{shared:.1f} GB of shared memory")
        low = low or shared < 0.5  # docker gives 64 MB unless told --shm-size
    return Check("space", WARN if low else OK, ", ".join(notes))


def check_gpu(versions: Versions, timeout: float = 20) -> Check:
    """A GPU that the installed build cannot use is worth a word."""
    if not shutil.which("nvidia-smi"):
        return Check("gpu", OK, "none")
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return Check("gpu", WARN, "nvidia-smi does not answer")
    if done.returncode:
        # It is there but finds no driver, or is too old to tell a card's capability.
        said = (done.stdout + done.stderr).strip().splitlines()
        return Check("gpu", WARN, f"nvidia-smi says: {said[0] if said else f'exit code {done.returncode}'}")
    return check_cards([line.strip() for line in done.stdout.splitlines() if line.strip()], versions)


def check_cards(cards: Sequence[str], versions: Versions) -> Check:
    """Cards as nvidia-smi lists them, ``name, capability``, against what FBGEMM was built for."""
    found = f"{len(cards)} found"
    if cards and not versions.get("torch.cuda"):
        fix = ("bash tools/setup.sh cuda .venv-cuda",)
        return Check("gpu", WARN, f"{found}, but this is a CPU build of torch", fix)
    release = versions.get(CUDA_BUILD)
    built = BUILT_FOR.get(_minor(release)) if release else None
    unfit = [card for card in cards if built and not _runs_on(card.rpartition(",")[2], built)]
    if not unfit or not built:
        return Check("gpu", OK, f"{found}: {'; '.join(dict.fromkeys(cards))}" if cards else found)
    capable = ", ".join(f"{major}.{minor}" for major, minor in built)
    detail = f"{CUDA_BUILD} {release} has code for compute capability {capable} only and cannot run on {unfit[0]}"
    # Code for 8.0 also runs on 8.6 and 8.9, but never on another generation.
    fix = ("bash tools/setup.sh cpu .venv-cpu   # or take a card of a generation named above, such as A100 or H100",)
    return Check("gpu", FAIL if len(unfit) == len(cards) else WARN, detail, fix)


def _runs_on(capability: str, built: Sequence[tuple[int, int]]) -> bool:
    """Whether machine code for one of ``built`` runs on a card: same major number, minor not above the card's."""
    card = _release(capability.strip())
    return len(card) < 2 or any(major == card[0] and minor <= card[1] for major, minor in built)


def installed_versions() -> dict[str, str | None]:
    """Read what is installed from package metadata, importing none of it."""
    versions: dict[str, str | None] = {}
    for name in (*REQUIRED, CPU_BUILD, CUDA_BUILD, "urllib3"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch.cuda"] = _torch_cuda() if versions["torch"] else None
    return versions


def _torch_cuda() -> str | None:
    """CUDA version in torch/version.py; a wheel's own version need not tell (``2.13.0`` may be either)."""
    path = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py")))
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else None


def examine(quick: bool = False) -> list[Check]:
    """All checks of this interpreter; ``quick`` leaves out those that import TorchRec or TorchX."""
    versions = installed_versions()
    checks = version_checks(versions, sys.version_info[:3])
    if not quick:
        checks += [check_operator(versions), check_torchx(), check_kernel()]
        checks += [check_gpu(versions), check_space(Path.cwd())]
    return checks


def render(checks: Sequence[Check]) -> str:
    """The report as text: one line a check, then the cures."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.status:<5} {check.name:<{width}}  {check.detail}" for check in checks]
    seen: list[str] = []
    for check in checks:
        if check.status in (FAIL, WARN):
            seen += [command for command in check.fix if command not in seen]
    if seen:
        lines += ["", "To fix:"]
        lines += [f"  {sys.executable} -m {c}" if c.startswith("pip ") else f"  {c}" for c in seen]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="python -m embsearch_dist.doctor", description="Check this installation.")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("--quick", action="store_true", help="only what needs no import of TorchRec")
    args = parser.parse_args(argv)
    checks = examine(args.quick)
    print(json.dumps([asdict(check) for check in checks], indent=2) if args.json else render(checks))
    return int(any(check.status == FAIL for check in checks))


if __name__ == "__main__":
    sys.exit(main())
