# Trivium in a container, run by an unprivileged user.
#
#   docker build -t trivium .
#   docker run --rm -it trivium make demo
#
# The same image works on NVIDIA GPUs, since torch for Linux is a CUDA build that brings its libraries. --ipc host gives
# NCCL the shared memory that it needs:
#
#   docker run --rm -it --gpus all --ipc host -v "$PWD/runs:/trivium/runs" trivium \
#       torchrun --nproc-per-node 8 -m pretrain.train CONFIG
#
# To start from a CUDA image instead, name one of pytorch/pytorch's runtime tags that has Python 3.11 to 3.13:
#
#   docker build --build-arg BASE=pytorch/pytorch:TAG-runtime -t trivium:cuda .

ARG BASE=python:3.13-slim
FROM ${BASE}

# make is for the targets of the Makefile; torch.compile (train.compile = true) needs a C++ compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --user-group trivium \
    && install --directory --owner trivium --group trivium /trivium /trivium/runs

USER trivium
WORKDIR /trivium
COPY --chown=trivium:trivium . .
RUN PIP_NO_CACHE_DIR=1 make install
ENV PATH=/trivium/.venv/bin:${PATH} HF_HUB_OFFLINE=1
CMD ["trivium", "--help"]
