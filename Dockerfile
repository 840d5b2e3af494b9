# An image with the command line and the app, for a user without rights in it.
#
#   docker build -t zepad .                                                                       # CPU
#   docker build -t zepad:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .   # CUDA
#   docker run --rm -v "$PWD:/home/zepad/work" zepad demo --out zepad-demo
#   docker run --rm -p 127.0.0.1:7860:7860 -v "$PWD:/home/zepad/work" zepad app zepad-demo/model --host 0.0.0.0
#
# The wheels of PyTorch bring CUDA along, so that both need no other base; for CUDA add `--gpus all` to `docker run`.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=app
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --from=build /dist /dist
# PyTorch first and from its own index: the one of PyPI has CUDA in every wheel for Linux.
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.7" "torchvision>=0.22" \
    && pip install --no-cache-dir "zepad[$EXTRAS] @ file://$(echo /dist/*.whl)" \
    && useradd --create-home zepad \
    && install --directory --owner zepad /home/zepad/work
USER zepad
WORKDIR /home/zepad/work
EXPOSE 7860
ENTRYPOINT ["zepad"]
CMD ["--help"]
