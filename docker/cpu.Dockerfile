# dynmoe_ds on CPUs. From the root of the repository:
#
#   docker build -f docker/cpu.Dockerfile --build-arg PIP_EXTRA_INDEX_URL=INDEX_OF_PYTORCHS_CPU_BUILDS -t dynmoe:cpu .
#   docker run --rm dynmoe:cpu                                    # dynmoe doctor
#   mkdir -p runs && docker run --rm -v "$PWD/runs:/home/dynmoe/runs" dynmoe:cpu train experiment=demo
#   docker compose -f docker/compose.yaml up                      # two hosts that share the experts of one training
#
# The run folder belongs to user 1000; add --build-arg USER_ID="$(id -u)" if you are another one. There is no compiler
# inside: plain torch computes the experts. podman and buildah leave the health check out without --format docker.
FROM docker.io/library/python:3.11.13-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY docker/constraints.txt docker/
# Torch first and by itself, so that a change of the code does not download it again.
RUN python -m venv --without-pip /opt/dynmoe \
    && pip --python /opt/dynmoe/bin/python install --constraint docker/constraints.txt 'torch==2.13.*' \
    && /opt/dynmoe/bin/python -c "import sys, torch; sys.exit(torch.version.cuda and 'This is the CUDA build of torch: name the index of the CPU builds with --build-arg PIP_EXTRA_INDEX_URL, or use docker/gpu.Dockerfile.')" \
    && rm -r /opt/dynmoe/lib/python3.11/site-packages/torch/include /opt/dynmoe/lib/python3.11/site-packages/torch/test
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY kernels kernels
COPY dynmoe_ds dynmoe_ds
RUN pip --python /opt/dynmoe/bin/python install --constraint docker/constraints.txt .

FROM docker.io/library/python:3.11.13-slim-bookworm
ARG USER_ID=1000
# The run folder is there so that a volume mounted on it belongs to the user, too.
RUN useradd --create-home --uid "$USER_ID" dynmoe && install --directory --owner=dynmoe --group=dynmoe /home/dynmoe/runs
COPY --from=build /opt/dynmoe /opt/dynmoe
ENV PATH=/opt/dynmoe/bin:$PATH DS_ACCELERATOR=cpu
USER $USER_ID
WORKDIR /home/dynmoe
HEALTHCHECK --interval=5m --timeout=3m CMD ["dynmoe", "doctor"]
ENTRYPOINT ["dynmoe"]
CMD ["doctor"]
