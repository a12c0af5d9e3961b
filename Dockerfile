# The image of launch/gke_jobset.sh and launch/xpk.sh, and of a server.
#   docker build -t IMAGE .                                     CPU
#   docker build -t IMAGE --build-arg EXTRAS=data,serve,tpu .   TPU
#   docker build -t IMAGE --build-arg EXTRAS=data,serve,cuda .  NVIDIA GPUs
# tests/launch/test_dockerfile.py runs every RUN line in a clean environment.
FROM python:3.11-slim
ARG EXTRAS=data,serve
WORKDIR /imagen_jax
COPY . .
# Editable: configs/ and launch/ are read from /imagen_jax.
RUN python -m pip install --no-cache-dir -c constraints.txt -e ".[$EXTRAS]"
RUN python -m imagen_jax configs
CMD ["python", "-m", "imagen_jax", "--help"]
