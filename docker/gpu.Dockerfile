# dynmoe_ds on NVIDIA GPUs. The machine needs the driver and the NVIDIA container toolkit; CUDA itself comes with torch.
# From the root of the repository:
#
#   docker build -f docker/gpu.Dockerfile -t dynmoe:gpu .
#   docker run --rm --gpus all dynmoe:gpu                         # dynmoe doctor
#   mkdir -p runs && docker run --rm --gpus all --ipc host -v "$PWD/runs:/home/dynmoe/runs" dynmoe:gpu train experiment=demo
#
# The ranks of one machine talk through shared memory, hence --ipc host. The run folder belongs to user 1000; add
# --build-arg UID="$(id -u)" to the build if you are another one. There is no compiler inside, so DeepSpeed's own CUDA
# operators cannot be built there; the optimiser that `dynmoe train` uses is torch's.
FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/dynmoe
# First and by itself, so that a change of the code does not download it again.
RUN /opt/dynmoe/bin/pip install 'torch==2.13.*' \
    && /opt/dynmoe/bin/python -c "import sys, torch; sys.exit(None if torch.version.cuda else 'This build of torch has no CUDA: build without an index of CPU builds, or use docker/cpu.Dockerfile.')"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY kernels kernels
COPY dynmoe_ds dynmoe_ds
RUN /opt/dynmoe/bin/pip install .

FROM python:3.11.13-slim-bookworm
ARG UID=1000
RUN useradd --create-home --uid "$UID" dynmoe
COPY --from=build /opt/dynmoe /opt/dynmoe
ENV PATH=/opt/dynmoe/bin:$PATH
USER dynmoe
WORKDIR /home/dynmoe
ENTRYPOINT ["dynmoe"]
CMD ["doctor"]
