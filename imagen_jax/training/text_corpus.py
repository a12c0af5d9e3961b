"""Text to pre-train a small encoder on: paraphrases, their vocabulary, their ids."""

from __future__ import annotations

import io
import itertools
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from imagen_jax.config.fields import ConfigError

EOS_ID = 1
_BYTE_PIECES = 256 + 3  # every byte, padding, end mark and unknown


def read(path: str, limit: int) -> list[list[str]]:
    """The first `limit` lines of a corpus file, each a JSON list of paraphrases.

    Raises:
      ConfigError: no such file, or a line that is no list of strings.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(
            f"config.pretrain_text.corpus={path!r} is no file; leave it empty to learn from the "
            "captions of the pictures"
        )
    groups = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(itertools.islice(lines, limit), start=1):
            try:
                group = json.loads(line)
            except ValueError:
                group = None
            if not isinstance(group, list) or not all(isinstance(text, str) for text in group):
                raise ConfigError(
                    f"{path}:{number}: {line.strip()[:40]!r} must be a JSON list of strings, "
                    'such as ["a red cross", "one red cross"]'
                )
            groups.append(group)
    return groups


def train_vocabulary(captions: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece byte-pair model with T5's special ids; any text can be tokenized with it.

    Args:
      captions: text to learn from.
      vocab_size: wanted pieces, of which 259 are bytes and special ids; fewer where the text has
        no more.

    Returns:
      The content of a `spiece.model` file.

    Raises:
      ConfigError: vocab_size leaves no room for the text's letters.
    """
    import sentencepiece

    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=writer,
            # Not unigram, whose seeds are repeats across different words: on a world of a hundred
            # words it never proposes whole ones and spells colours in letters.
            model_type="bpe",
            # Folds case, so that "A Red Circle" is what was learned.
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
    """Ids with the end mark, zero-padded, as short as the captions allow.

    Returns:
      ids: int32, L the longest caption's.
      pieces: size of the vocabulary.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rows = [[*row[: max_len - 1], EOS_ID] for row in processor.encode(list(captions))]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, processor.get_piece_size()


def by_group(
    ids: Int[np.ndarray, "n l"], groups: Sequence[Sequence[str]]
) -> Int[np.ndarray, "g k l"]:
    """Rows of consecutive groups as one array; smaller groups repeat their captions to fill it."""
    ends = np.cumsum([len(group) for group in groups])
    size = max(map(len, groups))
    rows = [np.arange(end - len(g), end) for g, end in zip(groups, ends, strict=True)]
    return ids[np.stack([np.resize(row, size) for row in rows])]
