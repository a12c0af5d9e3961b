"""embed.py: duplicates are encoded once, killed runs go on, and all ways give the same bytes."""

import pathlib

import numpy as np
import pytest

from imagen_jax import embed
from imagen_jax.data.embeddings import EmbeddingError, EmbeddingStore
from imagen_jax.text import TokenBatch


class LetterEncoder:
    """One token per letter; a token's embedding depends on its letter, place and caption."""

    dim = 3
    max_len = 20

    def __init__(self, fail_after: int = 10**9):
        self.seen: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()
        self._left = fail_after

    def fingerprint(self) -> dict:
        return {"encoder": "letters", "max_len": self.max_len}

    def token_count(self, caption: str) -> int:
        return len(caption)

    def tokenize(self, captions):
        ids = np.zeros((len(captions), self.max_len), np.int32)
        for row, caption in zip(ids, captions, strict=True):
            cut = caption[: self.max_len].encode()
            row[: len(cut)] = list(cut)
        long = tuple(i for i, c in enumerate(captions) if self.token_count(c) > self.max_len)
        return TokenBatch(ids, ids > 0, long)

    def encode(self, ids, mask):
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        self.shapes.add(ids.shape)
        self.seen += [
            "".join(map(chr, row[m])) for row, m in zip(ids, mask, strict=True) if m.any()
        ]
        place = np.arange(ids.shape[1])[None]
        total = ids.sum(axis=1, keepdims=True)
        return np.stack([ids / 7, ids * 0 + place, ids * 0 + total], axis=-1).astype(np.float32)


CAPTIONS = [f"{'long ' * (i % 5)}{i}" for i in range(40)]


def silent(line: str) -> None:
    del line


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_distinct_caption_is_encoded_once_and_found_again(tmp_path):
    encoder = LetterEncoder()
    report = embed.embed(CAPTIONS + CAPTIONS[:7], encoder, str(tmp_path), 4, silent)
    assert sorted(encoder.seen) == sorted(c[:20] for c in CAPTIONS)
    assert (report["captions"], report["unique"], report["truncated"]) == (47, 40, 8)
    assert encoder.shapes == {(4, 8), (4, 16), (4, 20)}

    store = EmbeddingStore.open(str(tmp_path), encoder.fingerprint())
    store.verify()
    text_emb, mask = store.lookup(CAPTIONS, 20)
    truth = encoder.tokenize(CAPTIONS)
    np.testing.assert_array_equal(mask, truth.mask)
    expected = encoder.encode(truth.ids, truth.mask) * truth.mask[..., None]
    np.testing.assert_allclose(text_emb.astype(np.float32), expected, rtol=2**-8)
    tokens = int(truth.mask.sum())
    assert report["tokens"] == tokens and report["bytes"] == tokens * 3 * 2


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    units = embed.embed(CAPTIONS, LetterEncoder(), str(whole), 4, silent)["units"]
    with pytest.raises(KeyboardInterrupt):
        embed.embed(CAPTIONS, LetterEncoder(fail_after=3), str(killed), 4, silent)
    (killed / f".{next(killed.iterdir()).name}.1.tmp").write_bytes(b"half a unit")
    second = LetterEncoder()
    report = embed.embed(CAPTIONS[::-1], second, str(killed), 4, silent)
    assert report["computed"] == units - 3
    assert {n: b for n, b in files(killed).items() if not n.endswith(".tmp")} == files(whole)
    assert embed.embed(CAPTIONS, LetterEncoder(0), str(killed), 4, silent)["computed"] == 0


def test_workers_may_share_a_folder(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    embed.embed(CAPTIONS, LetterEncoder(), str(alone), 4, silent)

    class Interrupted(LetterEncoder):
        """While it encodes its second unit, another worker does the whole job."""

        def encode(self, ids, mask):
            if len(self.seen) == 4:
                embed.embed(CAPTIONS, LetterEncoder(), str(shared), 4, silent)
            return super().encode(ids, mask)

    embed.embed(CAPTIONS, Interrupted(), str(shared), 4, silent)
    assert files(shared) == files(alone)


def test_estimate_agrees_with_the_run(tmp_path):
    texts = CAPTIONS + CAPTIONS[:5]
    report = embed.embed(texts, LetterEncoder(), str(tmp_path), 4, silent)
    estimate = embed.estimate(texts, LetterEncoder(0))
    assert estimate == {name: report[name] for name in estimate}


def test_values_that_are_not_finite_are_not_stored(tmp_path):
    class Broken(LetterEncoder):
        def encode(self, ids, mask):
            return super().encode(ids, mask) / np.zeros(1, np.float32)

    with np.errstate(all="ignore"), pytest.raises(EmbeddingError, match="NaN or infinite"):
        embed.embed(CAPTIONS, Broken(), str(tmp_path), 4, silent)
    assert list(tmp_path.iterdir()) == []
