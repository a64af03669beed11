# docker build -t inpo .                           CPUs alone
# docker build -t inpo --build-arg TORCH=cu128 .   NVIDIA GPUs; run it with --gpus all
# TORCH is a build of torch by the name that https://pytorch.org/get-started has for it. With it come CUDA's libraries,
# so the base image needs none, and the host no more than a driver.
FROM python:3.11-slim

ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/inpo

# What changes seldom comes first: a change of our code installs torch no second time.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --no-deps --index-url "https://download.pytorch.org/whl/${TORCH}" torch

COPY pyproject.toml README.md LICENSE THIRD_PARTY.md ./
COPY inpo inpo
COPY common common
COPY data data
COPY evaluation evaluation
COPY inspection inspection
COPY precompute precompute
COPY recipes recipes
COPY rounds rounds
COPY toyworld toyworld
COPY train train
RUN pip install --constraint constraints.txt '.[tables]'

# Caches, runs and what the hub's client downloads are the user's: mount a folder here, and run as yourself with --user.
WORKDIR /work
ENV HF_HOME=/work/huggingface MPLCONFIGDIR=/tmp/matplotlib
ENTRYPOINT ["inpo"]
CMD ["--help"]
