# The server, for the CPU or for NVIDIA GPUs; for research only, never for clinical decisions.
#
#     docker build -t llavamed-jax .                                        for the CPU
#     docker build -t llavamed-jax --build-arg ACCEL=cuda12 .               for NVIDIA GPUs (cuda13 too)
#     docker run --rm -p 127.0.0.1:8000:8000 -v /path/to/checkpoint:/model:ro llavamed-jax
#     docker run --rm --gpus all --shm-size=8g … llavamed-jax --checkpoint /model --host 0.0.0.0 --api_keys /keys
FROM python:3.12-slim

ARG ACCEL=cpu
ENV PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1

WORKDIR /llavamed
# The dependencies are a layer of their own: a change of the code installs none of them again.
COPY pyproject.toml requirements.txt README.md LICENSE ./
RUN mkdir llavamed_jax && touch llavamed_jax/__init__.py \
    && extras=serve,medical && if [ "$ACCEL" != cpu ]; then extras="$extras,$ACCEL"; fi \
    && pip install --editable ".[$extras]"
COPY llavamed_jax llavamed_jax
COPY configs configs
COPY convert convert
COPY samples samples
COPY train.py eval.py serve.py ./

# Weights are read, never written; compiled programs are kept in the volume.
RUN useradd --create-home --uid 1000 llavamed && mkdir /cache && chown llavamed /cache
USER llavamed
ENV JAX_COMPILATION_CACHE_DIR=/cache
VOLUME /cache

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "serve.py"]
CMD ["--checkpoint", "/model", "--host", "0.0.0.0"]
