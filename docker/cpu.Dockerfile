# dynmoe_ds on CPUs. From the root of the repository:
#
#   docker build -f docker/cpu.Dockerfile --build-arg PIP_EXTRA_INDEX_URL=INDEX_OF_PYTORCHS_CPU_BUILDS -t dynmoe:cpu .
#   docker run --rm dynmoe:cpu                                    # dynmoe doctor
#   mkdir -p runs && docker run --rm -v "$PWD/runs:/home/dynmoe/runs" dynmoe:cpu train experiment=demo
#
# The run folder belongs to user 1000; add --build-arg UID="$(id -u)" if you are another one.
FROM python:3.11.13-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/dynmoe
# First and by itself, so that a change of the code does not download it again.
RUN /opt/dynmoe/bin/pip install 'torch==2.13.*' \
    && /opt/dynmoe/bin/python -c "import sys, torch; sys.exit(torch.version.cuda and 'This is the CUDA build of torch: name the index of the CPU builds with --build-arg PIP_EXTRA_INDEX_URL, or use docker/gpu.Dockerfile.')"
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
ENV PATH=/opt/dynmoe/bin:$PATH DS_ACCELERATOR=cpu
USER dynmoe
WORKDIR /home/dynmoe
ENTRYPOINT ["dynmoe"]
CMD ["doctor"]
