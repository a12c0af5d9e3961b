"""Trains a small T5 on image-caption pairs with CLIP's contrastive loss.

    .venv/bin/python benchmarks/contrastive_text.py --config=configs/shapes.py:base --out=runs/clip

The counterpart of `pretrain_text`, which trains on text alone, with the same network, vocabulary,
batch size and number of steps. The data are the training images of the shapes world with their
captions. The vector of a caption is that of its end-of-sequence token; a small image tower gives
the vector of the image; both are projected and trained with CLIP's loss (arXiv:2103.00020, Fig. 3).
Image tower and projections are discarded. The result is a folder that `embed` reads like any T5.
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
from imagen_jax.config.text import T5Config
from imagen_jax.io import images
from imagen_jax.models import clip, t5
from imagen_jax.parallel import partitioning
from imagen_jax.training import pretrain_text, text_corpus
from imagen_jax.worlds.shapes import scenes

IMAGES = 20_000  # The whole training split.
SIDE = 16  # of the images that the base stage generates
WIDTH = 64
# Log of the inverse temperature: initial value and maximum (CLIP, Sec. 2.4-2.5).
LOG_SCALE_INIT, LOG_SCALE_MAX = float(np.log(1 / 0.07)), float(np.log(100.0))
LOG_EVERY = 100


class State(NamedTuple):
    """Parameters of both towers, and the optimizer's state."""

    params: dict[str, Any]
    opt_state: Any


def tower_of(side: int) -> clip.ClipVisionConfig:
    """The image tower: patches of 4 pixels, width 64, 2 layers."""
    return clip.ClipVisionConfig(side, 4, 64, 2, 4, 128)


def init_params(
    key: jax.Array, t5_config: T5Config, tower_config: clip.ClipVisionConfig
) -> dict[str, Any]:
    """Text encoder and its projection, image tower, and the log of the inverse temperature."""
    text_key, head_key, image_key = jax.random.split(key, 3)
    # The initialisation of `pretrain_text`.
    encoder = pretrain_text.init_params(text_key, t5_config, WIDTH)
    tower = clip.ImageEmbedding(tower_config, WIDTH)
    side = tower_config.image_size
    image_params = tower.init(image_key, jnp.zeros((1, side, side, 3)))["params"]
    projection = jax.random.normal(head_key, (t5_config.emb_dim, WIDTH)) * t5_config.emb_dim**-0.5
    return {
        "encoder": encoder["encoder"],
        "projection": projection,
        "images": partitioning.unbox(image_params),
        "scale": jnp.asarray(LOG_SCALE_INIT),
    }


@functools.partial(
    jax.jit, static_argnames=("config", "t5_config", "tower_config"), donate_argnums=0
)
def train_step(
    state: State,
    ids: Int[Array, "b l"],
    image_batch: Float[Array, "b s s 3"],
    *,
    config: Any,
    t5_config: T5Config,
    tower_config: clip.ClipVisionConfig,
) -> tuple[State, Float[Array, ""]]:
    """A step of Adam; returns the new state and the loss in nats."""

    def loss_fn(params: dict[str, Any]) -> Float[Array, ""]:
        x: Any = t5.T5Encoder(t5_config).apply({"params": params["encoder"]}, ids, ids != 0)
        end = x[jnp.arange(len(ids)), (ids != 0).sum(1) - 1]
        tower = clip.ImageEmbedding(tower_config, WIDTH)
        image_emb: Any = tower.apply({"params": params["images"]}, image_batch)
        return contrast(end @ params["projection"], image_emb, params["scale"])

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    optimizer = pretrain_text.pretraining_optimizer(config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return State(params, opt_state), loss


def contrast(
    text_emb: Float[Array, "b d"], image_emb: Float[Array, "b d"], scale: Float[Array, ""]
) -> Float[Array, ""]:
    """CLIP's loss: mean cross entropy of matching captions to images and images to captions."""
    text_emb, image_emb = (
        emb / jnp.linalg.norm(emb, axis=1, keepdims=True) for emb in (text_emb, image_emb)
    )
    logits = text_emb @ image_emb.T * jnp.exp(jnp.minimum(scale, LOG_SCALE_MAX))
    labels = jnp.arange(len(logits))
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(side, labels) for side in (logits, logits.T)
    ]
    return jnp.mean(jnp.stack(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="its section pretrain_text is used")
    parser.add_argument("--out", required=True, help="encoder folder to write")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of the training images")
    flags, rest = parser.parse_known_args()
    changes = [argument.removeprefix("--config.") for argument in rest]
    config = overrides.load(flags.config, changes)
    settings = config.pretrain_text
    start = time.perf_counter()
    corpus = text_corpus.read(settings.corpus, settings.max_groups)
    model = text_corpus.train_vocabulary(
        [c for group in corpus for c in group], settings.vocab_size
    )
    groups = [scenes.paraphrases("train", i) for i in range(IMAGES)]
    captions = [caption for group in groups for caption in group]
    ids, pieces = text_corpus.tokenize(captions, model, config.text.max_len)
    ids = text_corpus.by_group(ids, groups)
    pixels = np.stack([scenes.render(scenes.scene("train", i), flags.side) for i in range(IMAGES)])

    t5_config = pretrain_text.encoder_config(settings, pieces)
    tower_config = tower_of(flags.side)
    params = init_params(jax.random.key(config.seed), t5_config, tower_config)
    state = State(params, pretrain_text.pretraining_optimizer(settings).init(params))
    rng = np.random.default_rng(config.seed)
    loss = jnp.nan
    for step in range(1, settings.steps + 1):
        rows = rng.integers(0, IMAGES, settings.batch_size)
        words = ids[rows, rng.integers(0, ids.shape[1], len(rows))]
        image_batch = images.to_float(pixels[rows])
        state, loss = train_step(
            state,
            words,
            image_batch,
            config=settings,
            t5_config=t5_config,
            tower_config=tower_config,
        )
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
