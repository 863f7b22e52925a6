# Two targets from one file:
#   docker build --target cpu -t longreach:cpu .
#   docker build --target cuda -t longreach:cuda .
# pip's own configuration decides where packages come from. A build secret hands it in without leaving a trace in the
# image (this is also how the cpu target gets a CPU build of torch, instead of PyPI's CUDA build of several GB):
#   docker build --target cpu --secret id=pip.conf,src=$HOME/.config/pip/pip.conf -t longreach:cpu .

ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
RUN python -m venv /opt/longreach
ENV PATH=/opt/longreach/bin:$PATH
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    pip install torch==2.13.0

# Dependencies change with pyproject.toml alone, so editing the code leaves this layer as it is.
FROM build AS dependencies-cpu
COPY pyproject.toml deploy/constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > requirements.txt \
    && pip install -r requirements.txt -c constraints.txt

FROM dependencies-cpu AS dependencies-cuda
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["gpu"], sep="\n")' \
      > requirements-gpu.txt \
    && pip install -r requirements-gpu.txt -c constraints.txt

FROM dependencies-cpu AS installed-cpu
COPY README.md LICENSE ./
COPY kernels kernels
COPY models models
COPY samples samples
COPY service service
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    pip install --no-deps .

FROM dependencies-cuda AS installed-cuda
COPY README.md LICENSE ./
COPY kernels kernels
COPY models models
COPY samples samples
COPY service service
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    pip install --no-deps .

# What both targets run as: no root, a passwd entry (torch asks for the user's name), everything written under one volume.
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 longreach \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/longreach --shell /usr/sbin/nologin longreach \
    && install -d -o 10001 -g 10001 /var/lib/longreach
ENV HOME=/home/longreach \
    USER=longreach \
    PATH=/opt/longreach/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HOME=/var/lib/longreach/huggingface \
    TRITON_CACHE_DIR=/var/lib/longreach/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/lib/longreach/inductor \
    LONGREACH_CACHE_DIR=/var/lib/longreach/models \
    LONGREACH_HOST=0.0.0.0 \
    LONGREACH_PORT=8000
WORKDIR /home/longreach
VOLUME /var/lib/longreach
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['LONGREACH_PORT']}/livez\", timeout=4)"]
ENTRYPOINT ["longreach"]
CMD ["serve"]

FROM runtime AS cuda
# The torch wheel brings CUDA itself, the driver comes from the host. Triton compiles its launchers with a C compiler.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc=4:12.2.0-3 libc6-dev=2.36-9+deb12u* \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LONGREACH_DEVICE=cuda
COPY --from=installed-cuda /opt/longreach /opt/longreach
USER 10001:10001

FROM runtime AS cpu
COPY --from=installed-cpu /opt/longreach /opt/longreach
USER 10001:10001
