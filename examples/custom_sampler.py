"""Samples with a new sampler and with the built-in ones, from the same noise.

    python examples/custom_sampler.py --stage=runs/demo/stages/base --prompt='a red circle' \
      --out=samplers.png

A sampler is a pair (init, step). `step` receives `denoise(z, logsnr) -> x0`, logsnr before and
after the step, a key for each image, and its own state. `denoise` includes text conditioning,
guidance and thresholding; a sampler does not depend on them.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion import process, samplers
from imagen_jax.diffusion.process import alpha_sigma, expand, to_eps
from imagen_jax.diffusion.samplers import Sampler
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.stage_sampler import image_keys
from imagen_jax.io import images
from imagen_jax.stages.conditioning import Conditioning, Text
from imagen_jax.stages.denoiser import make_denoiser
from imagen_jax.stages.folder import load_stage


def averaged_ddim(share: float = 0.5) -> Sampler:
    """DDIM on a running mean of the noise estimates, which smooths the trajectory.

    eps_bar <- share eps_bar + (1 - share) eps; z_s = alpha_s x0_bar + sigma_s eps_bar, where x0_bar
    is the x0 that corresponds to eps_bar at the noisier level t.
    """

    def init(z):
        return jnp.zeros_like(z), jnp.zeros(z.shape[:1], bool)

    def step(denoise, z, logsnr_t, logsnr_s, keys, state):
        mean, has_mean = state
        eps = to_eps(denoise(z, logsnr_t), z=z, logsnr=logsnr_t)
        kept = expand(jnp.where(has_mean, share, 0.0), z)
        mean = kept * mean + (1.0 - kept) * eps
        x0 = process.to_x0("eps", mean, z=z, logsnr=logsnr_t)
        alpha_s, sigma_s = (expand(v, z) for v in alpha_sigma(logsnr_s))
        return alpha_s * x0 + sigma_s * mean, (mean, jnp.ones_like(has_mean))

    return Sampler(init, step)


samplers.SAMPLERS["averaged_ddim"] = averaged_ddim


def main() -> None:
    """Writes a row of images for each sampler; every column starts from the same noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", required=True, help="folder of a base stage")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", required=True, help="PNG file to write")
    parser.add_argument("--count", type=int, default=6, help="images per sampler")
    parser.add_argument("--steps", type=int, default=16)
    flags = parser.parse_args()

    chain = Cascade.load([flags.stage])
    config, count = chain.configs[0], flags.count
    text_emb, text_mask = chain.embed([flags.prompt] * count)
    denoise = make_denoiser(load_stage(flags.stage), Conditioning(Text(text_emb, text_mask)))
    keys = image_keys(0, range(count), [0] * count)
    size = config.data.image_size
    times = jnp.linspace(1.0, 0.0, flags.steps + 1)
    logsnrs = process.logsnr_at(times, config.diffusion)

    noise = samplers.normal(keys, (size, size, 3))
    rows = []
    for name, make in samplers.SAMPLERS.items():
        loop = functools.partial(samplers.sample_loop, make(), denoise, logsnrs=logsnrs, keys=keys)
        rows.append(images.to_uint8(np.asarray(jax.jit(loop)(z=noise))))
        print(f"{name}: mean {rows[-1].mean():.1f}, deviation {rows[-1].std():.1f} of 255")
    sheet = images.grid(np.concatenate(rows), columns=count, scale=max(64 // size, 1))
    images.save_png(flags.out, sheet, {"rows": ", ".join(samplers.SAMPLERS)})


if __name__ == "__main__":
    main()
