"""Pre-trains a small T5 encoder on captions, for data sets without a suitable public T5.

A small text encoder trained on text alone, after Imagen's finding (Sec. 2.1) that frozen language
models are effective text encoders. First a vocabulary is trained. Then one linear head predicts,
from the vector of every word of a caption, the words near the same word in its paraphrases (all
words of a paraphrase that lacks the word). Paraphrases are the captions of one image, or one line
of the corpus file. This is skip-gram (arXiv:1310.4546) with a T5 in place of the word table.

Paraphrases share their meaning and not their wording, so the vectors encode meaning. The head is
the same at every distance, so "small", "red" and "circle" of one phrase all predict these three
words: attributes and object are bound in one vector. The head is discarded; the result is a folder
in Hugging Face layout, which `text.encoders` reads like any T5.

Differs from paper: T5 is trained by span corruption with a decoder, on far more text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import OptimizerConfig
from imagen_jax.config.text import PretrainTextConfig, T5Config
from imagen_jax.interop import hf_t5
from imagen_jax.io import atomic
from imagen_jax.models import t5
from imagen_jax.parallel import partitioning
from imagen_jax.text.vocabulary import EOS_ID
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.text_corpus import by_group, tokenize, train_vocabulary

LOG_EVERY = 100

# PRNG streams: fold_in(fold_in(key(seed), STREAM), step).
INIT_STREAM, STEP_STREAM = 0, 1

# Relative position bias: standard deviation at initialisation, nats; factor on its learning rate.
_POSITION_BIAS_STD, _POSITION_BIAS_RATE = 2.0, 10.0


class State(NamedTuple):
    """Parameters of encoder and head, and the state of the optimizer."""

    params: dict[str, Any]
    opt_state: Any


def pretrain_text(
    groups: Sequence[Sequence[str]],
    config: PretrainTextConfig,
    out: str,
    *,
    seed: int,
    max_len: int,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a vocabulary and an encoder on captions and writes them as a folder.

    Args:
      groups: groups of paraphrases, such as the captions of each image. A single caption is its
        own paraphrase. Empty captions are skipped.
      config: sizes and length of the training.
      out: folder to write; replaces an earlier result and nothing else.
      seed: seed of initialisation and batches.
      max_len: longer captions are truncated to this many tokens, including the end of sequence.
      log: called with progress lines.

    Returns:
      The metrics also written to pretrain.json: steps, loss (nats per word), near_mass
      (0..1), captions, captions_sha256, vocabulary, seconds.

    Raises:
      ConfigError: no caption has text, or vocab_size is too small.
      OutputError: `out` exists and is not a result of pretrain_text.
    """
    folder = atomic.check_replaceable(out, "pretrain.json", "earlier pretrain_text")
    stripped = ([c.strip() for c in group if c.strip()] for group in groups)
    groups = [group for group in stripped if group]
    captions = [caption for group in groups for caption in group]
    if not captions:
        raise ConfigError("pretrain_text got no caption with text; check config.data.caption_key")
    start = time.perf_counter()
    model = train_vocabulary(captions, config.vocab_size)
    ids, pieces = tokenize(captions, model, max_len)
    log(f"vocabulary: {pieces} pieces; {len(ids)} captions of up to {ids.shape[1]} tokens")
    t5_config = encoder_config(config, pieces)
    params, metrics = train(by_group(ids, groups), config, t5_config, seed=seed, log=log)
    digest = hashlib.sha256("\n".join(captions).encode("utf-8", errors="replace")).hexdigest()
    metrics |= {
        "captions": len(captions),
        "captions_sha256": digest,
        "vocabulary": pieces,
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_encoder(folder, t5_config, params, model, metrics)
    return metrics


def encoder_config(config: PretrainTextConfig, pieces: int) -> T5Config:
    """Configuration of the small T5 v1.1 encoder, with the vocabulary padded to a multiple of 8."""
    if config.emb_dim % config.num_heads:
        raise ConfigError(
            f"config.pretrain_text.emb_dim={config.emb_dim} must be a multiple of "
            f"config.pretrain_text.num_heads={config.num_heads}"
        )
    return T5Config(
        vocab_size=-(-pieces // 8) * 8,
        emb_dim=config.emb_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.emb_dim // config.num_heads,
        mlp_dim=config.mlp_dim,
    )


def train(
    ids: Int[np.ndarray, "g k l"],
    config: PretrainTextConfig,
    t5_config: T5Config,
    *,
    seed: int,
    log: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains encoder and head; discards the head.

    Args:
      ids: token ids of the corpus, K paraphrases in each group.
      config: number of steps and learning rate.
      t5_config: sizes of the encoder.
      seed: seed of initialisation and batches.
      log: called with a line every 100 steps.

    Returns:
      The parameters of the encoder, and the mean metrics of the last steps.
    """
    key = jax.random.key(seed)
    # The head's classes are the pieces that occur: most of a small vocabulary is unused bytes.
    used, targets = np.unique(ids, return_inverse=True)
    corpus = jax.device_put((ids, targets.reshape(ids.shape).astype(np.int32)))
    is_word = jnp.asarray((used != 0) & (used != EOS_ID))
    params = init_params(jax.random.fold_in(key, INIT_STREAM), t5_config, len(used))
    state = State(params, pretraining_optimizer(config).init(params))
    step_key = jax.random.fold_in(key, STEP_STREAM)
    recent: list[dict[str, jax.Array]] = []
    start = time.perf_counter()
    for step in range(config.steps):
        state, step_metrics = train_step(
            state,
            corpus,
            is_word,
            jax.random.fold_in(step_key, step),
            config=config,
            t5_config=t5_config,
        )
        recent.append(step_metrics)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
            metrics = _mean(recent)
            recent.clear()
            left = (time.perf_counter() - start) * (config.steps / (step + 1) - 1)
            log(
                f"step {step + 1}/{config.steps}: loss {metrics['loss']:.3f}, probability of "
                f"nearby words {metrics['near_mass']:.3f}, {left:.0f} s left"
            )
    return jax.device_get(state.params["encoder"]), {"steps": config.steps, **metrics}


def init_params(key: jax.Array, t5_config: T5Config, pieces: int) -> dict[str, Any]:
    """Parameters of the encoder and of a linear head [D, pieces]."""
    encoder_key, head_key, bias_key = jax.random.split(key, 3)
    encoder = partitioning.unbox(t5.init_params(t5_config, encoder_key))
    # T5's uniform initial bias does not learn to separate adjacent words in a few hundred steps.
    # Heads that start by attending to distinct positions do, and bind colours to their shapes.
    table = encoder["relpos_bias"]["rel_embedding"]
    encoder["relpos_bias"]["rel_embedding"] = _POSITION_BIAS_STD * jax.random.normal(
        bias_key, table.shape
    )
    shape = (t5_config.emb_dim, pieces)
    head = jax.random.normal(head_key, shape) * t5_config.emb_dim**-0.5
    return {"encoder": encoder, "head": head}


def pretraining_optimizer(config: PretrainTextConfig) -> optax.GradientTransformation:
    """Adam with warm-up and cosine decay; a higher learning rate for the position bias."""
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

    return optax.chain(adam, optax.masked(optax.scale(_POSITION_BIAS_RATE), is_bias))


@functools.partial(jax.jit, static_argnames=("config", "t5_config"), donate_argnums=0)
def train_step(
    state: State,
    corpus: tuple[Int[Array, "g k l"], Int[Array, "g k l"]],
    is_word: Bool[Array, " v"],
    key: jax.Array,
    *,
    config: PretrainTextConfig,
    t5_config: T5Config,
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """One step of Adam on random captions, each with all its paraphrases.

    `corpus` holds the token ids, and the same tokens as indices into the used pieces.
    """
    group_key, caption_key = jax.random.split(key)
    rows = jax.random.randint(group_key, (config.batch_size,), 0, len(corpus[0]))
    columns = jax.random.randint(caption_key, (config.batch_size,), 0, corpus[0].shape[1])
    ids, words = corpus[0][rows, columns], corpus[1][rows, columns]
    targets = sum(
        target_counts(words, corpus[1][rows, other], is_word, config.context)
        for other in range(corpus[0].shape[1])
    )

    def loss_fn(params: dict[str, Any]) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        x: Any = t5.T5Encoder(t5_config).apply({"params": params["encoder"]}, ids, ids != 0)
        return word_loss(x, params["head"], targets * (ids != 0)[..., None])

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = pretraining_optimizer(config).update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return State(params, opt_state), metrics


def target_counts(
    words: Int[Array, "b l"], other: Int[Array, "b l"], is_word: Bool[Array, " v"], context: int
) -> Float[Array, "b l v"]:
    """Word counts that each position of a caption must predict of its paraphrase `other`.

    These are the words near the same word in `other`. A position without a match, such as "a" or
    the end of sequence, must predict all words of `other`.
    """
    matches = matching_positions(words, other, is_word)
    near = nearby_word_counts(other, is_word, context)
    near_match = jnp.einsum("bij,bjv->biv", matches.astype(jnp.float32), near)
    all_words = nearby_word_counts(other, is_word, other.shape[1])[:, :1]
    return jnp.where(matches.any(-1)[..., None], near_match, all_words)


def matching_positions(
    words: Int[Array, "b l"], other: Int[Array, "b l"], is_word: Bool[Array, " v"]
) -> Bool[Array, "b l l"]:
    """[i, j] is True if word i of a caption is word j of its paraphrase and unique in both."""
    same = (words[:, :, None] == other[:, None, :]) & is_word[words][:, :, None]
    alone = (words[:, :, None] == words[:, None, :]).sum(2) == 1
    return same & (same.sum(2) == 1)[:, :, None] & alone[:, :, None]


def nearby_word_counts(
    words: Int[Array, "b l"], is_word: Bool[Array, " v"], context: int
) -> Float[Array, "b l v"]:
    """Counts of the words at most `context` positions from position j, including j."""
    position = jnp.arange(words.shape[1])
    near = jnp.abs(position[:, None] - position) <= context
    counted = jax.nn.one_hot(words, len(is_word)) * is_word
    return jnp.einsum("jk,bkv->bjv", near.astype(jnp.float32), counted)


def word_loss(
    x: Float[Array, "b l d"], head: Float[Array, "d v"], targets: Float[Array, "b l v"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross entropy of the predicted words against the target counts.

    Args:
      x: the encoder's vectors.
      head: the linear head.
      targets: word counts; positions without any are ignored.

    Returns:
      The cross entropy in nats per word, averaged over positions; and the metrics: this loss, and
      `near_mass`, the probability of the target words.
    """
    log_p = jax.nn.log_softmax(x @ head)
    count = targets.sum(-1)
    has_target = count > 0
    loss = -(targets * log_p).sum(-1) / jnp.maximum(count, 1)
    mass = (jnp.exp(log_p) * (targets > 0)).sum(-1)

    def mean(values: Float[Array, "b l"]) -> Float[Array, ""]:
        return jnp.sum(values * has_target) / jnp.maximum(jnp.sum(has_target), 1)

    return mean(loss), {"loss": mean(loss), "near_mass": mean(mass)}


def _mean(rows: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    host = jax.device_get(list(rows))
    return {name: round(float(np.mean([row[name] for row in host])), 4) for name in host[0]}


def write_encoder(
    folder: pathlib.Path,
    t5_config: T5Config,
    params: dict[str, Any],
    model: bytes,
    metrics: dict[str, Any],
) -> None:
    """Writes an encoder as a folder that `load_text_encoder` reads; complete or not at all.

    Args:
      folder: replaced; check it with `atomic.check_replaceable` first.
      t5_config: sizes of the encoder.
      params: parameters of the encoder.
      model: content of `spiece.model`.
      metrics: content of `pretrain.json`.
    """
    with atomic.folder(folder) as temporary:
        hf_t5.save(temporary, t5_config, params)
        (temporary / "spiece.model").write_bytes(model)
        (temporary / "pretrain.json").write_text(json.dumps(metrics, indent=2) + "\n")
