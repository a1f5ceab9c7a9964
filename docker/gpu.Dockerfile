# dynmoe_ds on NVIDIA GPUs: NVIDIA's PyTorch image, whose torch, apex and Transformer Engine stay what they are, and this
# package. The machine needs the driver (580 or newer) and the NVIDIA container toolkit. From the root of the repository:
#
#   docker build -f docker/gpu.Dockerfile -t dynmoe:gpu .
#   docker run --rm --gpus all dynmoe:gpu                         # dynmoe doctor
#   mkdir -p runs && docker run --rm --gpus all --ipc host -v "$PWD/runs:/home/dynmoe/runs" dynmoe:gpu train experiment=demo
#
# The ranks of one machine talk through shared memory, hence --ipc host. The run folder belongs to user 1000; add
# --build-arg USER_ID="$(id -u)" to the build if you are another one. 26.06 is the first release with torch 2.13 (2.13.0a0,
# CUDA 13.3, Python 3.12, Transformer Engine 2.16); another release: --build-arg BASE=nvcr.io/nvidia/pytorch:RELEASE-py3.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3@sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1
FROM ${BASE}
ARG USER_ID=1000
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/dynmoe
COPY docker/constraints.txt docker/gpu_base.py docker/
RUN python3 docker/gpu_base.py pin docker/constraints.txt > constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY kernels kernels
COPY dynmoe_ds dynmoe_ds
# The base's own PIP_CONSTRAINT would hold packages back that transformers needs newer.
RUN PIP_CONSTRAINT='' python3 -m pip install --constraint constraints.txt . \
    && python3 docker/gpu_base.py check constraints.txt \
    && dynmoe doctor
# Ubuntu's own user has the number 1000.
RUN if id ubuntu; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid "$USER_ID" dynmoe \
    && install --directory --owner=dynmoe --group=dynmoe /home/dynmoe/runs
USER $USER_ID
WORKDIR /home/dynmoe
HEALTHCHECK --interval=5m --timeout=3m CMD ["dynmoe", "doctor"]
# NVIDIA's script makes the image run with older drivers, and then becomes the command.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "dynmoe"]
CMD ["doctor"]
