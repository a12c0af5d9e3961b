"""Padding and cutting of token ids: one function for encoders and for pre-training."""

import numpy as np
import sentencepiece

from imagen_jax.text import vocabulary
from imagen_jax.training import text_corpus

CAPTIONS = ["a red circle above a blue square", "two small green crosses", "", "naïve 日本 " * 9]


def test_the_corpus_has_the_ids_of_sentencepiece():
    model = text_corpus.train_vocabulary(CAPTIONS * 4, 400)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for max_len in (4, 500):
        rows = [[*row[: max_len - 1], 1] for row in processor.encode(CAPTIONS)]
        expected = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for i, row in enumerate(rows):
            expected[i, : len(row)] = row
        ids, pieces = text_corpus.tokenize(CAPTIONS, model, max_len)
        np.testing.assert_array_equal(ids, expected)
        assert ids.dtype == np.int32 and pieces == processor.get_piece_size()
        batch = vocabulary.tokenize(
            vocabulary.SentencePieceVocabulary(model, "test"), CAPTIONS, max_len=max_len
        )
        np.testing.assert_array_equal(batch.ids[:, : ids.shape[1]], expected)


class Marked(vocabulary.ByteVocabulary):
    """Bytes between a start and an end token."""

    start, end = (300,), 301


def test_start_and_end_tokens_frame_a_caption_cut_or_not():
    batch = vocabulary.tokenize(Marked(), ["ab", "abc", "abcd", ""], max_len=5)
    a = ord("a") + 3
    assert batch.ids.tolist() == [
        [300, a, a + 1, 301, 0],
        [300, a, a + 1, a + 2, 301],
        [300, a, a + 1, a + 2, 301],
        [300, 301, 0, 0, 0],
    ]
    assert batch.mask.sum(axis=1).tolist() == [4, 5, 5, 2]
    assert batch.truncated == (2,)
