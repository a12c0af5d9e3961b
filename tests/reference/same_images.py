"""Samples the same images in several orders and batch sizes and writes images and noise.

    python tests/reference/same_images.py STAGE[,STAGE...] TEXTS.npz OUT.npz

TEXTS.npz holds text_emb and text_mask of N images. OUT.npz holds the images of the last stage as
"BATCH_ORDER" and the initial noise of the first stage as "noise_BATCH_ORDER", both sorted by image.
The environment sets the number of devices.
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
    """The initial noise of all images, sampled in batches as in `Cascade`."""
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
    arrays = {}
    for batch in BATCHES:
        for name, order in orders(len(texts["text_emb"])).items():
            samples = cascade.sample(
                seed=SEED,
                prompt_indices=order.tolist(),
                batch_size=batch,
                **{key: value[order] for key, value in texts.items()},
            )
            arrays[f"{batch}_{name}"] = samples[np.argsort(order)]
            arrays[f"noise_{batch}_{name}"] = noise_of(cascade.configs[0], texts, order, batch)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
