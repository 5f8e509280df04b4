# The command `embsearch` in an image: on the CPU, or with VARIANT=cuda for NVIDIA GPUs. It needs BuildKit.
#
#   docker build -t embsearch .
#   docker build -t embsearch:cuda --build-arg VARIANT=cuda .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" --shm-size 2g embsearch search --config my.yaml
#
# On Linux the default package index may answer with CUDA builds of torch, some GB: --build-arg TORCH_INDEX_URL=ADDRESS
# takes torch from the "CPU" index that the install selector on PyTorch's site prints. More in docs/docker.md.
ARG VARIANT=cpu
ARG PYTHON_IMAGE=python:3.11-slim
# torch brings the CUDA libraries, so the image only has to let the driver in.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${PYTHON_IMAGE} AS cpu-base

FROM ${CUDA_IMAGE} AS cuda-base
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# What runs and what builds it share a base, because an environment and the wheel belong to one Python.
FROM ${VARIANT}-base AS build
ARG VARIANT
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# For the compiled kernels, which the package also does without, slower.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /source
COPY requirements/ requirements/
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --no-deps --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' requirements/common.txt)"; \
    fi \
    && pip install -r requirements/common.txt \
    && pip install --no-deps -r "requirements/${VARIANT}.txt"
COPY setup.py pyproject.toml README.md LICENSE ./
COPY embsearch_dist/ embsearch_dist/
COPY launch/ launch/
COPY configs/ configs/
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip install -c requirements/common.txt -c requirements/test.txt "$(ls /wheels/*.whl)[export,serve]"

FROM ${VARIANT}-base AS runtime
COPY --from=build /opt/venv /opt/venv
# Whoever runs it (--user): scripts write into the mounted folder, and caches need a home.
RUN useradd --create-home --uid 10001 embsearch && mkdir /work && chown embsearch /work
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp USER=embsearch
WORKDIR /work
USER 10001
ENTRYPOINT ["embsearch"]
CMD ["--help"]
