"""store.py and unit_file.py: a store reads back as written; errors name the damaged part."""

import hashlib
import json
import struct

import ml_dtypes
import numpy as np
import pytest

from imagen_jax.data.embeddings import store as embeddings
from imagen_jax.data.embeddings import unit_file
from imagen_jax.data.embeddings.store import EmbeddingError, EmbeddingStore

FINGERPRINT = {"encoder": "t5", "vocabulary": "ab12", "max_len": 8}
TEXTS = ["a", "красный круг", "c" * 500, "", "e", "f", "g"]


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return {t: rng.normal(size=(1 + i, 5)).astype(ml_dtypes.bfloat16) for i, t in enumerate(TEXTS)}


@pytest.fixture
def folder(tmp_path, rows):
    units = []
    for texts in (TEXTS[:4], TEXTS[4:]):
        path = tmp_path / embeddings.unit_name(texts)
        embeddings.write_unit(path, texts, [rows[t] for t in texts])
        units.append(embeddings.describe_unit(path))
    embeddings.write_manifest(tmp_path, units, FINGERPRINT)
    return tmp_path


def test_lookup_gives_back_every_row_padded_or_cut(folder, rows):
    store = EmbeddingStore.open(str(folder), FINGERPRINT)
    assert (store.dim, store.captions) == (5, 7)
    wanted = [TEXTS[i] for i in (6, 0, 3, 3, 1, 5, 2, 4)]
    text_emb, mask = store.lookup(wanted, 4)
    assert text_emb.shape == (8, 4, 5) and text_emb.dtype == ml_dtypes.bfloat16
    for text, emb, real in zip(wanted, text_emb, mask, strict=True):
        kept = min(len(rows[text]), 4)
        np.testing.assert_array_equal(emb[:kept], rows[text][:kept])
        assert not emb[kept:].any()
        assert real.tolist() == [True] * kept + [False] * (4 - kept)


def test_missing_captions_are_listed(folder):
    store = EmbeddingStore.open(str(folder))
    assert store.missing(["a", "b", "g", "z", "b"]) == ["b", "z"]
    with pytest.raises(EmbeddingError, match="lacks 1 caption.*'a blue dog'.*imagen embed"):
        store.lookup(["a", "a blue dog"], 4)


def test_another_encoder_is_rejected_with_the_differing_fields(folder):
    expected = {"encoder": "t5", "vocabulary": "cd34", "layers": 4, "max_len": 8}
    with pytest.raises(EmbeddingError) as error:
        EmbeddingStore.open(str(folder), expected)
    message = str(error.value)
    assert "vocabulary: store 'ab12', expected 'cd34'" in message
    assert "layers: store None, expected 4" in message
    assert "max_len" not in message and "run `imagen embed`" in message


def test_missing_and_incomplete_stores_are_rejected(folder, tmp_path):
    with pytest.raises(EmbeddingError, match="is no store; run `imagen embed`"):
        EmbeddingStore.open(str(tmp_path / "nowhere"))
    (folder / "manifest.json").unlink()
    with pytest.raises(EmbeddingError, match="incomplete .2 finished units.*embed` again"):
        EmbeddingStore.open(str(folder))


def test_a_truncated_or_missing_unit_is_rejected_when_opening(folder):
    unit = folder / json.loads((folder / "manifest.json").read_text())["units"][1]["file"]
    content = unit.read_bytes()
    unit.write_bytes(content[:-2])
    with pytest.raises(EmbeddingError, match=f"{unit.name} is missing or damaged"):
        EmbeddingStore.open(str(folder))
    unit.unlink()
    with pytest.raises(EmbeddingError, match=f"{unit.name} is missing or damaged"):
        EmbeddingStore.open(str(folder))


def test_a_flipped_bit_is_found_by_verify(folder):
    store = EmbeddingStore.open(str(folder))
    store.verify()
    unit = next(folder.glob("unit_*.bin"))
    content = bytearray(unit.read_bytes())
    content[-1] ^= 1
    unit.write_bytes(content)
    with pytest.raises(EmbeddingError, match=f"{unit.name} is damaged"):
        EmbeddingStore.open(str(folder)).verify()


def test_a_unit_is_named_by_all_that_its_bytes_depend_on():
    name = embeddings.unit_name(TEXTS, encoder=FINGERPRINT, length=8)
    assert name == embeddings.unit_name(list(TEXTS), length=8, encoder=dict(FINGERPRINT))
    others = [
        embeddings.unit_name(TEXTS[::-1], encoder=FINGERPRINT, length=8),
        embeddings.unit_name(TEXTS, encoder=FINGERPRINT, length=16),
        embeddings.unit_name(TEXTS, encoder={**FINGERPRINT, "max_len": 9}, length=8),
    ]
    assert len({name, *others}) == 4


def test_a_store_of_the_first_layout_is_still_read(tmp_path, rows):
    """A header of 32 bytes, bfloat16, no hash at the end: what was written before int8."""
    counts = np.array([len(rows[t]) for t in TEXTS], "<i4")
    header = struct.pack("<8sQQQ", b"IMGNEMB1", len(TEXTS), counts.sum(), 5)
    content = header + b"".join(map(embeddings.caption_hash, TEXTS)) + counts.tobytes()
    content += np.concatenate([rows[t] for t in TEXTS]).tobytes()
    (tmp_path / "unit_old.bin").write_bytes(content)
    unit = embeddings.describe_unit(tmp_path / "unit_old.bin")
    assert unit.sha256 == hashlib.sha256(content).hexdigest()
    embeddings.write_manifest(tmp_path, [unit], FINGERPRINT)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["relative_rms_error"] is None
    store = EmbeddingStore.open(str(tmp_path), FINGERPRINT)
    store.verify()
    text_emb, mask = store.lookup(TEXTS, 8)
    for text, emb, real in zip(TEXTS, text_emb, mask, strict=True):
        np.testing.assert_array_equal(emb[real], rows[text])


def test_more_units_than_may_be_mapped_at_a_time(folder, rows, monkeypatch):
    monkeypatch.setattr(embeddings, "MAX_OPEN_UNITS", 1)
    store = EmbeddingStore.open(str(folder))
    for text in TEXTS + TEXTS:
        text_emb, mask = store.lookup([text], 8)
        np.testing.assert_array_equal(text_emb[0][mask[0]], rows[text])


def test_int8_of_silent_channels_and_tokens():
    exact = np.zeros((3, 4), np.float32)
    exact[1] = [0, 1, -2, 0]
    np.testing.assert_allclose(unit_file.dequantize(*unit_file.quantize(exact)), exact, atol=0.01)
