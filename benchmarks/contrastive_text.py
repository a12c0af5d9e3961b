"""A small T5 that learns from pictures, as CLIP's text tower does: the other kind of text encoder.

    .venv/bin/python benchmarks/contrastive_text.py --config=configs/shapes.py:base --out=runs/clip

`pretrain_text` learns from text alone. Here the same network, with the same vocabulary, batches and
steps, learns from the shapes world's training pictures with their captions: the end mark's vector
of each caption and the vector of its picture, by a small picture tower, both projected, are to be
more alike than those of other pairs of the batch (arXiv:2103.00020, Fig. 3). Picture tower and
projections are thrown away. The result is a folder that `embed` reads as any T5.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from imagen_jax.config import overrides
from imagen_jax.config.schema import T5Config
from imagen_jax.io import images
from imagen_jax.models import clip, t5
from imagen_jax.parallel import partitioning
from imagen_jax.training import pretrain_text, text_corpus
from imagen_jax.worlds.shapes import scenes

PICTURES = 20_000  # Those of the data set.
SIDE = 16
TOWER = clip.ClipVisionConfig(SIDE, 4, 64, 2, 4, 128)
WIDTH = 64
# log of the factor on cosines at the start, and at most.
START, MOST = float(np.log(1 / 0.07)), float(np.log(100.0))
LOG_EVERY = 100


class State(NamedTuple):
    """Parameters of both towers, and the optimizer's state."""

    params: dict[str, Any]
    opt_state: Any


def init_params(key: jax.Array, t5_config: T5Config) -> dict[str, Any]:
    """Text encoder and its projection, picture tower, and the log of the factor on cosines."""
    text_key, head_key, picture_key = jax.random.split(key, 3)
    # Starts as the other encoder starts.
    encoder = pretrain_text.init_params(text_key, t5_config, WIDTH)
    tower = clip.ImageEmbedding(TOWER, WIDTH)
    pictures = tower.init(picture_key, jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    projection = jax.random.normal(head_key, (t5_config.emb_dim, WIDTH)) * t5_config.emb_dim**-0.5
    return {
        "encoder": encoder["encoder"],
        "projection": projection,
        "pictures": partitioning.unbox(pictures),
        "scale": jnp.asarray(START),
    }


@functools.partial(jax.jit, static_argnames=("config", "t5_config"), donate_argnums=0)
def train_step(
    state: State,
    ids: Int[Array, "b l"],
    pictures: Float[Array, "b s s 3"],
    *,
    config: Any,
    t5_config: T5Config,
) -> tuple[State, Float[Array, ""]]:
    """A step of Adam; returns the loss, nats per caption and picture."""

    def loss_fn(params: dict[str, Any]) -> Float[Array, ""]:
        x: Any = t5.T5Encoder(t5_config).apply({"params": params["encoder"]}, ids, ids != 0)
        end = x[jnp.arange(len(ids)), (ids != 0).sum(1) - 1]
        tower = clip.ImageEmbedding(TOWER, WIDTH)
        seen: Any = tower.apply({"params": params["pictures"]}, pictures)
        return contrast(end @ params["projection"], seen, params["scale"])

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    optimizer = pretrain_text.pretraining_optimizer(config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return State(params, opt_state), loss


def contrast(
    texts: Float[Array, "b d"], pictures: Float[Array, "b d"], scale: Float[Array, ""]
) -> Float[Array, ""]:
    """CLIP's loss: cross entropy of captions among pictures, and of these among captions."""
    texts, pictures = (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (texts, pictures))
    logits = texts @ pictures.T * jnp.exp(jnp.minimum(scale, MOST))
    own = jnp.arange(len(logits))
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(side, own) for side in (logits, logits.T)
    ]
    return jnp.mean(jnp.stack(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="its section pretrain_text is read")
    parser.add_argument("--out", required=True, help="encoder folder to write")
    flags, rest = parser.parse_known_args()
    changes = [argument.removeprefix("--config.") for argument in rest]
    config = overrides.load(flags.config, changes)
    settings = config.pretrain_text
    start = time.perf_counter()
    corpus = text_corpus.read(settings.corpus, settings.max_groups)
    model = text_corpus.train_vocabulary(
        [c for group in corpus for c in group], settings.vocab_size
    )
    groups = [scenes.paraphrases("train", i) for i in range(PICTURES)]
    captions = [caption for group in groups for caption in group]
    ids, pieces = text_corpus.tokenize(captions, model, config.text.max_len)
    ids = text_corpus.by_group(ids, groups)
    pixels = np.stack([scenes.render(scenes.scene("train", i), SIDE) for i in range(PICTURES)])

    t5_config = pretrain_text.encoder_config(settings, pieces)
    params = init_params(jax.random.key(config.seed), t5_config)
    state = State(params, pretrain_text.pretraining_optimizer(settings).init(params))
    rng = np.random.default_rng(config.seed)
    loss = jnp.nan
    for step in range(1, settings.steps + 1):
        rows = rng.integers(0, PICTURES, settings.batch_size)
        words = ids[rows, rng.integers(0, ids.shape[1], len(rows))]
        shown = images.to_float(pixels[rows])
        state, loss = train_step(state, words, shown, config=settings, t5_config=t5_config)
        if step % LOG_EVERY == 0:
            print(f"step {step}/{settings.steps}: loss {float(loss):.3f}", flush=True)
    metrics = {
        "steps": settings.steps,
        "loss": round(float(loss), 4),
        "vocabulary": pieces,
        "seconds": round(time.perf_counter() - start, 1),
    }
    encoder = jax.device_get(state.params["encoder"])
    pretrain_text.write_encoder(pathlib.Path(flags.out), t5_config, encoder, model, metrics)


if __name__ == "__main__":
    main()
