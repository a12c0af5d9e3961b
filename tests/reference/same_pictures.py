"""Draws the same pictures in several orders and batch sizes; prints nothing, writes what it drew.

    python tests/reference/same_pictures.py STAGE[,STAGE...] TEXTS.npz OUT.npz

TEXTS.npz holds text_emb and text_mask of N pictures. OUT.npz holds, by "BATCH_ORDER", the last
stage's pictures and, with "noise_" before it, the noise that the first stage started from, both by
picture rather than in the order drawn. How many devices there are is the environment's affair.
"""

import sys

import numpy as np

from imagen_jax.inference import batches, stage_sampler
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.stage_sampler import image_keys
from imagen_jax.parallel import partitioning
from imagen_jax.stages.conditioning import Text

BATCHES, SEED = (1, 7, 64), 5


def orders(count):
    shuffled = np.random.default_rng(0).permutation(count)
    return {"given": np.arange(count), "reversed": np.arange(count)[::-1], "shuffled": shuffled}


def noise_of(config, texts, order, batch):
    """The noise of all pictures, drawn in batches as a cascade does it."""
    keys = stage_sampler.stage_keys(image_keys(SEED, order, np.zeros(len(order))), 0)
    noise = np.zeros((len(order), config.data.image_size, config.data.image_size, 3), np.float32)
    for first in range(0, len(order), batch):
        rows = np.arange(first, min(first + batch, len(order)))
        text = Text(*(texts[name][order[rows]] for name in ("text_emb", "text_mask")))
        inputs = partitioning.shard_batch(stage_sampler.SamplerInputs(text, keys[rows]))
        init, _ = batches.programs()
        noise[order[rows]] = init(stage_sampler.jit_cache_config(config), inputs)[1].z
    return noise


def main(stages, texts_file, out):
    cascade, texts = Cascade.load(stages.split(","), text_encoder=None), dict(np.load(texts_file))
    drawn = {}
    for batch in BATCHES:
        for name, order in orders(len(texts["text_emb"])).items():
            pictures = cascade.sample(
                seed=SEED,
                prompt_indices=order.tolist(),
                batch_size=batch,
                **{key: value[order] for key, value in texts.items()},
            )
            drawn[f"{batch}_{name}"] = pictures[np.argsort(order)]
            drawn[f"noise_{batch}_{name}"] = noise_of(cascade.configs[0], texts, order, batch)
    np.savez(out, **drawn)


if __name__ == "__main__":
    main(*sys.argv[1:])
