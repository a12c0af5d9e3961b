"""A folder of captioned images and its embedding store, shared by the tests of data/."""

import io
import json
import pathlib
import tarfile

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.data.embeddings import store
from imagen_jax.data.sources.registry import open_source

DIM = 6


def write_images(folder: pathlib.Path, count: int, size: int = 64) -> None:
    """Writes `count` random images; every third has two captions."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        texts = [f"picture {i}", f"the picture of number {i}"][: 1 + (i % 3 == 0)]
        rows.append(json.dumps({"file_name": f"{i:03d}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def add_sample(shard: tarfile.TarFile, key: str, parts: dict[str, bytes]) -> None:
    """Adds a webdataset sample, a member KEY.PART for each part."""
    for part, data in parts.items():
        member = tarfile.TarInfo(f"{key}.{part}")
        member.size = len(data)
        shard.addfile(member, io.BytesIO(data))


def write_store(folder: pathlib.Path, captions: list[str]) -> store.EmbeddingStore:
    """A store in two units; the caption at i has 1 + i mod 5 tokens."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    rows = [
        rng.normal(size=(1 + i % 5, DIM)).astype(ml_dtypes.bfloat16) for i in range(len(captions))
    ]
    units = []
    for part in (slice(0, len(rows) // 2), slice(len(rows) // 2, None)):
        path = folder / store.unit_name(captions[part], encoder="fake")
        store.write_unit(path, captions[part], rows[part])
        units.append(store.describe_unit(path))
    store.write_manifest(folder, units, {"encoder": "fake", "max_len": 4})
    return store.EmbeddingStore.open(str(folder))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(DataConfig, source, store) of 23 images of 64 px, read without TensorFlow."""
    root = tmp_path_factory.mktemp("world")
    (root / "images").mkdir()
    write_images(root / "images", 23)
    data = DataConfig(
        kind="folder",
        path=str(root / "images"),
        embeddings=str(root / "store"),
        image_size=64,
        lowres_size=16,
        batch_size=8,
        max_text_len=4,
        loader="numpy",
    )
    source = open_source(data)
    captions = sorted({text for i in range(len(source)) for text in source.captions(i)})
    return data, source, write_store(root / "store", captions)
