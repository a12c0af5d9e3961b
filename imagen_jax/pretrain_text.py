"""Pre-trains a small T5 encoder on captions alone, for worlds where no public T5 is at hand.

The paper's thesis is that a language model trained on text alone is a good eye for a picture
model; this is its smallest instance. A vocabulary is learned, tokens are masked, and from the
vector of every token two things are predicted by linear heads that are thrown away afterwards: the
token itself where it was masked, and the tokens around it. The first teaches what words mean, the
second makes each vector say what its word stands next to (which colour, above or below what) in a
form that a linear key or value of the picture model can read. The result is a folder in Hugging
Face layout, read by `text.py` like any T5.

Differs from paper: T5 is trained by span corruption with a decoder, on far more text.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config import ConfigError, PretrainTextConfig, T5Config
from imagen_jax.interop import hf_t5
from imagen_jax.models import t5

EOS_ID = 1
LOG_EVERY = 100

# Streams of randomness: fold_in(fold_in(key(seed), STREAM), step).
INIT_STREAM, STEP_STREAM = 0, 1

_WARMUP_FRACTION = 0.1
_BYTE_PIECES = 256 + 3  # every byte, padding, end mark and unknown


class State(NamedTuple):
    """All that a step changes: encoder and head parameters, and the optimizer's."""

    params: dict[str, Any]
    opt_state: Any


def pretrain_text(
    captions: Sequence[str],
    config: PretrainTextConfig,
    out: str,
    *,
    seed: int,
    max_len: int,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Learns a vocabulary and an encoder from captions and writes them as a folder.

    Args:
      captions: text to learn from; empty ones are left out.
      config: sizes and length of the training.
      out: folder to write; an earlier result is replaced, anything else is left alone.
      seed: seed of initialisation, batches and masks.
      max_len: longer captions are cut to this many tokens, the end mark included.
      log: receives progress lines.

    Returns:
      The metrics also written to pretrain.json: steps, loss (nats per token), masked_accuracy
      (0..1), captions, captions_sha256, vocabulary, seconds.

    Raises:
      ConfigError: no caption holds text, `out` holds something else, or vocab_size is too small.
    """
    folder = _check_out(out)
    captions = [c.strip() for c in captions if c.strip()]
    if not captions:
        raise ConfigError("pretrain_text got no caption with text; check config.data.caption_key")
    start = time.perf_counter()
    model = train_vocabulary(captions, config.vocab_size)
    ids, pieces = tokenize(captions, model, max_len)
    log(f"vocabulary: {pieces} pieces; {len(ids)} captions of up to {ids.shape[1]} tokens")
    t5_config = encoder_config(config, pieces)
    params, metrics = train(ids, config, t5_config, mask_id=pieces, seed=seed, log=log)
    digest = hashlib.sha256("\n".join(captions).encode("utf-8", errors="replace")).hexdigest()
    metrics |= {
        "captions": len(captions),
        "captions_sha256": digest,
        "vocabulary": pieces,
        "seconds": round(time.perf_counter() - start, 1),
    }
    _write(folder, t5_config, params, model, metrics)
    return metrics


def train_vocabulary(captions: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece unigram model with T5's special ids; any text can be tokenized with it.

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
            model_type="unigram",
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
      ids: int32, L a multiple of 8 or max_len.
      pieces: size of the vocabulary.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rows = [[*row[: max_len - 1], EOS_ID] for row in processor.encode(list(captions))]
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), min(max_len, -(-longest // 8) * 8)), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, processor.get_piece_size()


def encoder_config(config: PretrainTextConfig, pieces: int) -> T5Config:
    """The small T5 v1.1; its table has a row for the mask after the vocabulary's."""
    if config.emb_dim % config.num_heads:
        raise ConfigError(
            f"config.pretrain_text.emb_dim={config.emb_dim} must be a multiple of "
            f"config.pretrain_text.num_heads={config.num_heads}"
        )
    return T5Config(
        vocab_size=-(-(pieces + 1) // 8) * 8,
        emb_dim=config.emb_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.emb_dim // config.num_heads,
        mlp_dim=config.mlp_dim,
    )
