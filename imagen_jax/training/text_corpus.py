"""Corpus for pre-training a small text encoder: groups of paraphrases, vocabulary, token ids."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from imagen_jax.config.fields import ConfigError
from imagen_jax.io import copies, text
from imagen_jax.text import vocabulary as vocabularies
from imagen_jax.text.vocabulary import SentencePieceVocabulary

_BYTE_PIECES = 256 + 3  # every byte, padding, end mark and unknown


def read(path: str, limit: int) -> list[list[str]]:
    """The first `limit` lines of a corpus file, each a JSON list of paraphrases.

    Raises:
      ConfigError: no such file, or a line that is not a list of strings.
    """
    file = pathlib.Path(copies.local(path))
    if not file.is_file():
        raise ConfigError(
            f"config.pretrain_text.corpus={path!r} is not a file; leave it empty to train on the "
            "captions of the images"
        )
    groups = []
    try:
        for number, line in enumerate(text.read_lines(file), start=1):
            if len(groups) == limit:
                break
            if line.text.strip():
                groups.append(_group(f"{path}:{number}", line))
    except text.TextError as error:
        raise ConfigError(f"{path}: {error}; write it as UTF-8") from error
    return groups


def _group(where: str, line: text.Line) -> list[str]:
    """The paraphrases of a line. Raises ConfigError."""
    try:
        group = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise _not_a_group(where, line.text.strip()[:40]) from error
    if not isinstance(group, list) or not all(isinstance(one, str) for one in group):
        raise _not_a_group(where, json.dumps(group)[:40])
    if fault := line.fault or next(filter(None, map(text.fault, group)), ""):
        raise ConfigError(f"{where}: a text with {fault}; correct or remove the line")
    return group


def _not_a_group(where: str, got: str) -> ConfigError:
    return ConfigError(
        f'{where}: {got!r} must be a JSON list of strings, such as ["a red cross", "one red cross"]'
    )


def train_vocabulary(captions: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece byte-pair model with T5's special ids; any text can be tokenized with it.

    Args:
      captions: text to train on.
      vocab_size: largest number of pieces, of which 259 are bytes and special ids; a small text
        gives fewer.

    Returns:
      The content of a `spiece.model` file.

    Raises:
      ConfigError: vocab_size is too small for the letters of the text.
    """
    import sentencepiece

    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=writer,
            # Not unigram: its candidates are substrings repeated across different words, so with
            # a vocabulary of a hundred words it splits frequent words into letters.
            model_type="bpe",
            # Folds case: "A Red Circle" gets the ids of "a red circle".
            normalization_rule_name="nmt_nfkc_cf",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            max_sentence_length=1 << 16,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        letters = len(set("".join(captions)))
        raise ConfigError(
            f"config.pretrain_text.vocab_size={vocab_size} must exceed {_BYTE_PIECES} bytes and "
            f"special ids plus the text's {letters} letters; try {_BYTE_PIECES + 2 * letters + 100}"
        ) from error
    return writer.getvalue()


def tokenize(
    captions: Sequence[str], model: bytes, max_len: int
) -> tuple[Int[np.ndarray, "n l"], int]:
    """Token ids with the end-of-sequence id, zero-padded to the longest caption.

    Returns:
      ids: int32, at most `max_len` long.
      pieces: size of the vocabulary.
    """
    vocabulary = SentencePieceVocabulary(model, "the new vocabulary")
    batch = vocabularies.tokenize(vocabulary, captions, max_len=max_len)
    return batch.ids[:, : batch.mask.sum(axis=1).max()], vocabulary.size


def by_group(
    ids: Int[np.ndarray, "n l"], groups: Sequence[Sequence[str]]
) -> Int[np.ndarray, "g k l"]:
    """Stacks the rows of consecutive groups; smaller groups repeat their captions."""
    ends = np.cumsum([len(group) for group in groups])
    size = max(map(len, groups))
    rows = [np.arange(end - len(g), end) for g, end in zip(groups, ends, strict=True)]
    return ids[np.stack([np.resize(row, size) for row in rows])]
