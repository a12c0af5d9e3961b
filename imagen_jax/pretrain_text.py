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

from imagen_jax import partitioning
from imagen_jax.config import ConfigError, OptimizerConfig, PretrainTextConfig, T5Config
from imagen_jax.interop import hf_t5
from imagen_jax.models import t5
from imagen_jax.optimizer import make_optimizer

EOS_ID = 1
LOG_EVERY = 100

# Streams of randomness: fold_in(fold_in(key(seed), STREAM), step).
INIT_STREAM, STEP_STREAM = 0, 1

# Context heads trained per step: a random few cost a fraction of all and serve as well.
_OFFSETS_PER_STEP = 4

# Spread of the relative bias at the start (nats of attention), and how much faster it learns.
_PLACE_STD, _PLACE_RATE = 2.0, 10.0

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


def train(
    ids: Int[np.ndarray, "n l"],
    config: PretrainTextConfig,
    t5_config: T5Config,
    *,
    mask_id: int,
    seed: int,
    log: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains encoder and heads; the heads are thrown away.

    Args:
      ids: the corpus.
      config: length and rates.
      t5_config: shape of the encoder.
      mask_id: id that stands for a masked token.
      seed: seed of everything random.
      log: receives a line every 100 steps.

    Returns:
      The encoder's parameters, and the metrics of the last steps.
    """
    key = jax.random.key(seed)
    # The heads choose among the pieces that occur: most of a small vocabulary is unused bytes.
    used, targets = np.unique(ids, return_inverse=True)
    corpus = jax.device_put((ids, targets.reshape(ids.shape).astype(np.int32)))
    params = init_params(jax.random.fold_in(key, INIT_STREAM), t5_config, config, len(used))
    state = State(params, pretraining_optimizer(config).init(params))
    step_key = jax.random.fold_in(key, STEP_STREAM)
    recent: list[dict[str, jax.Array]] = []
    start = time.perf_counter()
    for step in range(config.steps):
        state, step_metrics = train_step(
            state,
            corpus,
            jax.random.fold_in(step_key, step),
            config=config,
            t5_config=t5_config,
            mask_id=mask_id,
        )
        recent.append(step_metrics)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
            metrics = _mean(recent)
            recent.clear()
            left = (time.perf_counter() - start) * (config.steps / (step + 1) - 1)
            log(
                f"step {step + 1}/{config.steps}: loss {metrics['loss']:.3f}, masked accuracy "
                f"{metrics['masked_accuracy']:.3f}, context accuracy "
                f"{metrics['context_accuracy']:.3f}, {left:.0f} s left"
            )
    return jax.device_get(state.params["encoder"]), {"steps": config.steps, **metrics}


def init_params(
    key: jax.Array, t5_config: T5Config, config: PretrainTextConfig, pieces: int
) -> dict[str, Any]:
    """Encoder, and one linear head [D, pieces] per offset in -context..context."""
    encoder_key, head_key, bias_key = jax.random.split(key, 3)
    encoder = partitioning.unbox(t5.init_params(t5_config, encoder_key))
    # In a few hundred steps T5's even start never learns to tell one neighbour from the next.
    # Heads that begin by looking at distinct places do, and bind colours to their shapes.
    table = encoder["relpos_bias"]["rel_embedding"]
    encoder["relpos_bias"]["rel_embedding"] = _PLACE_STD * jax.random.normal(bias_key, table.shape)
    shape = (2 * config.context + 1, t5_config.emb_dim, pieces)
    heads = jax.random.normal(head_key, shape) * t5_config.emb_dim**-0.5
    return {"encoder": encoder, "heads": heads}


def pretraining_optimizer(config: PretrainTextConfig) -> optax.GradientTransformation:
    """Adam with a short warm-up and a decay to zero; the relative bias learns faster."""
    adam = make_optimizer(
        OptimizerConfig(
            learning_rate=config.learning_rate,
            schedule="cosine",
            warmup_steps=config.steps // 10,
            b2=0.99,
        ),
        config.steps,
    )

    def is_bias(params: dict[str, Any]) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "rel_embedding" in jax.tree_util.keystr(path), params
        )

    return optax.chain(adam, optax.masked(optax.scale(_PLACE_RATE), is_bias))


@functools.partial(jax.jit, static_argnames=("config", "t5_config", "mask_id"), donate_argnums=0)
def train_step(
    state: State,
    corpus: tuple[Int[Array, "n l"], Int[Array, "n l"]],
    key: jax.Array,
    *,
    config: PretrainTextConfig,
    t5_config: T5Config,
    mask_id: int,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of Adam on a random batch of the corpus (ids, and the same among used pieces)."""
    row_key, mask_key, offset_key = jax.random.split(key, 3)
    rows = jax.random.randint(row_key, (config.batch_size,), 0, len(corpus[0]))
    ids, targets = corpus[0][rows], corpus[1][rows]
    real = ids != 0
    hidden = real & (ids != EOS_ID) & jax.random.bernoulli(mask_key, config.mask_rate, ids.shape)
    shown = jnp.where(hidden, mask_id, ids)
    offsets = draw_offsets(offset_key, config.context)

    def loss_fn(params: dict[str, Any]) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        x = t5.T5Encoder(t5_config).apply({"params": params["encoder"]}, shown, real)
        return predict(x, params["heads"], targets, real, hidden, offsets)

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = pretraining_optimizer(config).update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state), metrics


def draw_offsets(key: jax.Array, context: int) -> Int[Array, "s"]:
    """Zero, then a few random distances of at most `context` to either side."""
    count = min(2 * context, _OFFSETS_PER_STEP)
    steps = jax.random.randint(key, (count,), 1, max(2 * context + 1, 2))
    signed = jnp.where(steps <= context, steps, context - steps)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), signed])


def predict(
    x: Float[Array, "b l d"],
    heads: Float[Array, "o d v"],
    targets: Int[Array, "b l"],
    real: Bool[Array, "b l"],
    hidden: Bool[Array, "b l"],
    offsets: Int[Array, "s"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """How well each vector tells its own hidden token and those `offsets` away.

    Args:
      x: the encoder's vectors.
      heads: linear heads of the offsets -context..context.
      targets: the true tokens, among the used pieces.
      real: False at padding.
      hidden: True where the encoder saw the mask.
      offsets: the first is 0 (counted at hidden tokens only), the others are not.

    Returns:
      The loss in nats (masked plus context, each per token), and the metrics.
    """
    length = x.shape[1]
    places = jnp.arange(length) + offsets[:, None]
    inside = (places >= 0) & (places < length)
    places = jnp.clip(places, 0, length - 1)
    goals = jnp.moveaxis(targets[:, places], 1, 0)
    counted = inside[:, None] & jnp.moveaxis(real[:, places], 1, 0) & real
    counted = counted.at[0].set(hidden)
    logits = jnp.einsum("bld,sdv->sblv", x, heads[offsets + len(heads) // 2])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, goals)
    right = logits.argmax(-1) == goals

    def mean(values: Array, where: Bool[Array, "..."]) -> Float[Array, ""]:
        return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)

    loss = mean(losses[0], counted[0]) + mean(losses[1:], counted[1:])
    return loss, {
        "loss": loss,
        "masked_accuracy": mean(right[0], counted[0]),
        "context_accuracy": mean(right[1:], counted[1:]),
    }


def _mean(rows: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    host = jax.device_get(list(rows))
    return {name: round(float(np.mean([row[name] for row in host])), 4) for name in host[0]}


def _check_out(out: str) -> pathlib.Path:
    folder = pathlib.Path(out)
    ours = (folder / "pretrain.json").is_file()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"--out={out} exists and is not an earlier pretrain_text; give a new folder"
        )
    return folder


def _write(
    folder: pathlib.Path,
    t5_config: T5Config,
    params: dict[str, Any],
    model: bytes,
    metrics: dict[str, Any],
) -> None:
    """Writes beside the folder, then renames: nobody picks up a half-written encoder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    hf_t5.save(temporary, t5_config, params)
    (temporary / "spiece.model").write_bytes(model)
    (temporary / "pretrain.json").write_text(json.dumps(metrics, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
