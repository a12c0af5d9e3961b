"""Units, packs and manifests of embedding stores for the fuzzer."""

from __future__ import annotations

import json
import pathlib
import shutil
import struct

import ml_dtypes
import numpy as np

from imagen_jax.data.embeddings import packs, store, unit_file

CAPTIONS = ["a", "b", "c"]
OFFSET = 7  # Of a unit in a pack.


def units(folder: pathlib.Path) -> list[bytes]:
    """A unit of each layout: bfloat16, int8, and the first one."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(2, 6)).astype(np.float32) for _ in CAPTIONS]
    found = []
    for dtype in unit_file.DTYPES:
        unit_file.write_unit(folder / dtype, CAPTIONS, rows, dtype)
        found.append((folder / dtype).read_bytes())
    counts = np.full(len(CAPTIONS), 2, "<i4").tobytes()
    body = np.concatenate(rows).astype(ml_dtypes.bfloat16).tobytes()
    header = struct.pack("<8sQQQ", unit_file.OLD_TAG, len(CAPTIONS), 6, 6)
    return [*found, header + b"".join(map(unit_file.caption_hash, CAPTIONS)) + counts + body]


def read_unit(path: pathlib.Path) -> bool:
    """Reads a unit as a file, and as part of a pack."""
    pack = path.with_suffix(".pack")
    pack.write_bytes(bytes(OFFSET) + path.read_bytes())
    for file, at in ((pack, OFFSET), (path, None)):
        header = unit_file.read_header(file, at)
        hashes, counts = unit_file.read_keys(file, at)
        rows = unit_file.Rows(file, at)[0 : header.tokens]
        assert rows.shape == (header.tokens, header.dim)
        assert len(hashes) == len(counts) == header.captions
    for reread in (False, True):
        unit_file.describe_unit(path, reread=reread)
    return True


def manifests(folder: pathlib.Path) -> list[bytes]:
    """The manifests of a store of two units, and of a packed one."""
    found = []
    for packed in (False, True):
        path = _store(folder / f"store{packed}", packed=packed)
        found.append((path / store.MANIFEST).read_bytes())
    return found


def read_manifest(path: pathlib.Path) -> bool:
    """Opens a store with this manifest, reads and verifies it."""
    packed = b'"packs"' in path.read_bytes()
    folder = path.parent / f"read{packed}"
    if not folder.exists():
        _store(folder, packed=packed)
    shutil.copy(path, folder / store.MANIFEST)
    opened = store.EmbeddingStore.open(str(folder))
    opened.lookup(CAPTIONS, 4)
    opened.verify()
    return True


def _store(folder: pathlib.Path, *, packed: bool) -> pathlib.Path:
    folder.mkdir()
    rows = [np.ones((2, 6), np.float32)]
    for caption in CAPTIONS:
        unit_file.write_unit(folder / f"unit_{caption}.bin", [caption], rows)
    names = [f"unit_{caption}.bin" for caption in CAPTIONS]
    if packed:
        store.write_packed(folder, names, fingerprint={"encoder": "x"}, plan="p")
        assert packs.Finished(folder).packed == set(names)
    else:
        described = [unit_file.describe_unit(folder / name) for name in names]
        store.write_manifest(folder, described, {"encoder": "x"})
    return folder


def is_json(data: bytes) -> bool:
    """Whether the manifest is JSON."""
    try:
        return bool(json.loads(data))
    except (ValueError, RecursionError):
        return False
