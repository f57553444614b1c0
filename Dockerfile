# Twinstack and everything that its tests need (docs/launching.md#containers). Build it in the root of a clone:
#   docker build -t twinstack .
# It runs on CPUs and on NVIDIA GPUs: torch's packages bring CUDA, the host has the driver and the NVIDIA Container Toolkit.
FROM python:3.12-slim-bookworm

# g++ (with nm): torch.compile, DeepSpeed's Adam on the CPU, scripts/simulate.py. git: the commit in run.json.
# libaio: deepspeed.nvme. iproute2: the tests of two nodes on one machine.
# Versions are not pinned (hadolint DL3008): Debian keeps only the newest of a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git iproute2 libaio-dev \
    && rm -rf /var/lib/apt/lists/*

# The packages come before the code, so that a change of the code does not install them again.
WORKDIR /twinstack
COPY pyproject.toml constraints.txt ./
COPY scripts/setup.sh scripts/
RUN PIP_NO_CACHE_DIR=1 bash scripts/setup.sh test

COPY . .
RUN .venv/bin/pip install --no-deps --no-build-isolation -e .
ENV PATH=/twinstack/.venv/bin:$PATH
CMD ["bash"]
