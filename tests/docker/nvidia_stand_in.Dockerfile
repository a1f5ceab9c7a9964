# What the GPU image's build looks at in NVIDIA's PyTorch image, on the CPU image's base: a torch whose version is no
# index's, an older numpy, an older package that transformers needs newer, apex and Transformer Engine by name, pip's
# constraints, a user with number 1000, and the entry point.
FROM docker.io/library/python:3.11.13-slim-bookworm
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/etc/pip/constraint.txt
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN mkdir -p /etc/pip /opt/nvidia \
    && PIP_CONSTRAINT='' python3 -m pip install 'torch==2.13.*' numpy==1.26.4 click==8.1.8 \
    && site="$(python3 -c 'import torch; print(torch.__path__[0][:-6])')" \
    && sed -i 's/^Version: .*/Version: 2.13.0a0+8145d630e8.nv26.6/' "$site"/torch-2.13.0*.dist-info/METADATA \
    && mv "$site"/torch-2.13.0*.dist-info "$site/torch-2.13.0a0+8145d630e8.nv26.6.dist-info" \
    && python3 -m pip list --format=freeze > /etc/pip/constraint.txt \
    && mkdir -p "$site"/apex/optimizers "$site"/apex/normalization "$site"/transformer_engine \
    && touch "$site"/apex/__init__.py "$site"/transformer_engine/__init__.py "$site"/amp_C.py "$site"/fused_layer_norm_cuda.py \
    && echo 'class FusedAdam: ...' > "$site"/apex/optimizers/__init__.py \
    && echo 'class FusedRMSNorm: ...' > "$site"/apex/normalization/__init__.py \
    && printf '#!/bin/bash\nexec "$@"\n' > /opt/nvidia/nvidia_entrypoint.sh && chmod +x /opt/nvidia/nvidia_entrypoint.sh \
    && useradd --uid 1000 --create-home ubuntu
