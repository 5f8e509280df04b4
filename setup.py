"""Package metadata. For a working environment run ``tools/setup.sh``: see the note on ``extras_require``."""

import re
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup

HERE = Path(__file__).resolve().parent


def _version() -> str:
    text = (HERE / "embsearch_dist" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if not found:
        raise RuntimeError("embsearch_dist/__init__.py sets no __version__")
    return found[1]


def _long_description() -> str:
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="embsearch_dist",
    version=_version(),
    description="Distributed search of embedding dimensions for recommendation models, on TorchRec",
    long_description=_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    # The shipped configs lie beside launch/ in an installation, too: scripts look for them there.
    packages=[
        *find_packages(include=["embsearch_dist", "embsearch_dist.*", "launch", "launch.*"]),
        *find_namespace_packages(include=["configs.*"]),
    ],
    package_data={"": ["*.yaml"]},
    # Read with ctypes, so Python's headers are not needed; without a C compiler torch does the same, slower.
    ext_modules=[
        Extension(
            "embsearch_dist.kernels._attention",
            ["embsearch_dist/kernels/attention.c"],
            extra_compile_args=["-O3", "-Wno-psabi"],
            optional=True,
        ),
        Extension(
            "embsearch_dist.kernels._adam",
            ["embsearch_dist/kernels/adam.c"],
            extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=off"],
            optional=True,
        ),
    ],
    install_requires=[
        "torch>=2.11,!=2.12.*,<2.14",  # the two that it is tested with, each with the TorchRec below
        "numpy>=2,<3",
        "pyarrow>=20",
        "polars>=1.30,<3",
        "tensorboard>=2.18,<3",
        "tqdm>=4.66,<5",
        "omegaconf>=2.3,<3",
        "PyYAML>=6,<7",
        "scipy>=1.14,<2",
        "matplotlib>=3.9,<4",
        "psutil>=6",
        "torchx>=0.7,<0.8",
        "urllib3<1.27",
        "iopath>=0.1.10",
        "tensordict>=0.12",
        "torchmetrics>=1.0,<2",
        "pyre-extensions>=0.0.32",
    ],
    # Every torchrec wheel requires `fbgemm-gpu`, of any version: pip answers with the CUDA build, over the
    # files of the CPU build. So [cpu] cannot name torchrec; it goes in with --no-deps, as tools/setup.sh
    # does and `python -m embsearch_dist.doctor` checks.
    extras_require={
        "cpu": ["torch>=2.13,<2.14", "fbgemm-gpu-cpu==1.8.0"],
        "cuda": ["torch>=2.13,<2.14", "torchrec==1.8.0", "fbgemm-gpu==1.8.0"],
        "cpu-torch211": ["torch>=2.11,<2.12", "fbgemm-gpu-cpu==1.6.0"],
        "cuda-torch211": ["torch>=2.11,<2.12", "torchrec==1.6.1", "fbgemm-gpu==1.6.0"],
        "export": ["safetensors>=0.5,<1", "onnx>=1.18,<2", "onnxscript>=0.5,<1", "onnxruntime>=1.20,<2"],
        "serve": ["safetensors>=0.5,<1", "starlette>=0.46,<2", "uvicorn>=0.34,<1"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.14",
            "scikit-learn>=1.6",
            "hypothesis>=6.100,<7",
            "types-PyYAML",
            # export and serve, and what asks the server
            "safetensors>=0.5,<1",
            "onnx>=1.18,<2",
            "onnxscript>=0.5,<1",
            "onnxruntime>=1.20,<2",
            "starlette>=0.46,<2",
            "uvicorn>=0.34,<1",
            "httpx>=0.28,<1",
            # an S3 on loopback, for the object stores
            "moto[s3]>=5,<6",
            "flask>=3,<4",
            "flask-cors>=5,<7",
        ],
    },
    entry_points={
        "console_scripts": ["embsearch = launch.cli:main"],
        # Any entry here replaces all of TorchX's own components in this environment, hence utils.
        "torchx.components": [
            "dist = launch.ddp",
            "utils = torchx.components.utils",
            "embsearch = launch.components",
        ],
    },
)
