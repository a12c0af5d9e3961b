"""DeepFloyd IF against diffusers: it loads the export, and both sample the same images.

Needs torch and diffusers, the extra `peers`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import process, samplers
from imagen_jax.diffusion.process import cosine_steps
from imagen_jax.export import convert
from imagen_jax.inference.stage_sampler import image_keys
from imagen_jax.stages.conditioning import Conditioning, Text, null_text
from imagen_jax.stages.denoiser import make_denoiser
from imagen_jax.stages.folder import load_stage
from imagen_jax.stages.stage import Stage
from tests.interop.test_if_unet import CASES, folders  # noqa: F401
from tests.reference.if_unet import make_weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS, WEIGHT, PERCENTILE = 10, 3.0, 95.0
NOISE_STEP = 250  # of the low-resolution image


@pytest.fixture(scope="module")
def both(folders, tmp_path_factory):  # noqa: F811
    """case -> (our stage, diffusers' network as it loads our export of that stage)."""
    root = tmp_path_factory.mktemp("export")
    pairs = {}
    for case in CASES:
        convert.import_if(str(folders[case]), str(root / case), log=lambda line: None)
        # As if it had been trained here: other weights, and no trace of where it came from.
        (root / case / convert.SOURCE).unlink()
        convert.export_diffusers(str(root / case), str(root / f"{case}_out"), lambda line: None)
        network = diffusers.UNet2DConditionModel.from_pretrained(root / f"{case}_out")
        pairs[case] = load_stage(str(root / case)), network.eval()
    return pairs


@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_our_export(both, folders, case):  # noqa: F811
    state = both[case][1].state_dict()
    expected = make_weights({name: list(value.shape) for name, value in state.items()})
    for name, value in state.items():
        np.testing.assert_array_equal(value.numpy(), expected[name])


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def theirs(network, z, text, mask, lowres=None):
    """diffusers' DDIM with guidance towards `text` from zeros, and dynamic thresholding."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=PERCENTILE / 100,
        sample_max_value=1e9,
        clip_sample=False,
    )
    scheduler.set_timesteps(STEPS)
    null_emb, null_mask = null_text(Text(jnp.asarray(text), jnp.asarray(mask)))
    texts = torch.from_numpy(np.concatenate([text, null_emb]))
    masks = torch.from_numpy(np.concatenate([mask, null_mask]))
    conditions = {"encoder_attention_mask": masks}
    if lowres is not None:  # diffusers takes no mask where pixels attend to text alone
        conditions = {"class_labels": torch.full((2 * len(z),), NOISE_STEP)}
    z = nchw(z)
    for t in scheduler.timesteps:
        given = z if lowres is None else torch.cat([z, nchw(lowres)], dim=1)
        with torch.no_grad():
            out = network(torch.cat([given, given]), t, texts, **conditions).sample[:, :3]
        with_text, without = out.chunk(2)
        eps = without + WEIGHT * (with_text - without)
        z = scheduler.step(eps, t, z, use_clipped_model_output=True).prev_sample
    return scheduler.timesteps.numpy(), z.permute(0, 2, 3, 1).numpy()


def ours(trained: Stage, timesteps, z, text, mask, lowres=None):
    table = cosine_steps().astype(np.float32)
    config = dataclasses.replace(
        trained.config,
        sampling=dataclasses.replace(
            trained.config.sampling, guidance_weight=WEIGHT, threshold_percentile=PERCENTILE
        ),
    )
    level = None
    if lowres is not None:
        level = level_of(table[NOISE_STEP], config.diffusion, len(z))

    @jax.jit
    def sample(params):
        conditioning = Conditioning(Text(jnp.asarray(text), jnp.asarray(mask)))
        if lowres is not None:
            logsnr = process.aug_logsnr(level, config.diffusion)
            conditioning = Conditioning(conditioning.text, jnp.asarray(lowres), logsnr)
        denoise = make_denoiser(Stage(config, params), conditioning)
        levels = jnp.append(table[timesteps], table[0] + 1.0)
        keys = image_keys(0, [0] * len(z), range(len(z)))
        return samplers.sample_loop(samplers.ddim(), denoise, jnp.asarray(z), levels, keys)

    with jax.default_matmul_precision("highest"):
        return np.asarray(sample(trained.params))


def level_of(logsnr: float, config, count: int) -> jax.Array:
    """The aug_level in [0, 1] whose noise is `logsnr`."""
    levels = jnp.linspace(0.0, 1.0, 100_001)
    nearest = jnp.argmin(jnp.abs(process.aug_logsnr(levels, config) - logsnr))
    return jnp.full((count,), levels[nearest])


@pytest.mark.parametrize("case", CASES)
def test_ten_ddim_steps_agree(both, case):
    trained, network = both[case]
    size, n = trained.config.data.image_size, 2
    rng = np.random.default_rng(2)
    z = rng.normal(size=(n, size, size, 3)).astype(np.float32)
    text = rng.normal(size=(n, 7, trained.config.model.text_dim)).astype(np.float32)
    mask = np.arange(7) < np.array([[7], [4]])
    lowres = None
    if trained.config.model.lowres:
        lowres = rng.uniform(-1, 1, z.shape).astype(np.float32)
        mask = np.ones_like(mask)
    timesteps, expected = theirs(network, z, text, mask, lowres)
    generated = ours(trained, timesteps, z, text, mask, lowres)
    assert np.abs(generated - expected).max() < 1e-3
    assert expected.std() > 0.1 and np.abs(expected).max() <= 1.0
