"""Editing: what is kept is kept bit for bit, what is drawn fits the exact answer on Gaussians."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.schema import DiffusionConfig
from imagen_jax.diffusion import editing, process, samplers
from imagen_jax.diffusion.editing import Edit, EditError
from imagen_jax.inference.cascade import Cascade
from imagen_jax.stages.stage import Stage

COUNT = 3


@pytest.fixture(scope="module")
def chain(base_config, sr_config, random_params):
    return Cascade([Stage(config, random_params(config)) for config in (base_config, sr_config)])


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    emb = rng.normal(size=(COUNT, 4, 8)).astype(np.float32)
    return {"text_emb": emb, "text_mask": np.ones((COUNT, 4), bool)}


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(1).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)


def test_a_times_that_never_goes_back():
    start, end = editing.timesteps(4)
    np.testing.assert_allclose(start, [1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(end, [0.75, 0.5, 0.25, 0.0])
    start, end = editing.timesteps(10, strength=0.3)
    np.testing.assert_allclose(start, [0.3, 0.2, 0.1], rtol=1e-6)
    assert len(editing.timesteps(3, strength=0.01)[0]) == 1


def test_a_times_that_goes_back():
    start, end = editing.timesteps(6, resamplings=3, jump=2)
    stretches = np.round(np.stack([start, end], 1) * 6).astype(int).tolist()
    first, second, last = [[6, 5], [5, 4]], [[4, 3], [3, 2]], [[2, 1], [1, 0]]
    assert stretches == first * 3 + second * 3 + last


def test_noising_again_is_noising_once():
    """q(z_t | z_s) after q(z_s | x0) has the moments of q(z_t | x0)."""
    x0, many = jnp.full((200_000, 1), 0.7), jnp.ones(200_000)
    keys = jax.random.split(jax.random.key(0), 2)
    z_s = process.q_sample(x0, 2.0 * many, jax.random.normal(keys[0], x0.shape))
    eps = jax.random.normal(keys[1], x0.shape)
    z_t = editing.renoise(z_s, 2.0 * many, -1.0 * many, eps)
    alpha, sigma = process.alpha_sigma(jnp.float32(-1.0))
    np.testing.assert_allclose(float(z_t.mean()), 0.7 * alpha, atol=6e-3)
    np.testing.assert_allclose(float(z_t.std()), sigma, atol=6e-3)
    # Noise between equal levels is none.
    np.testing.assert_array_equal(editing.renoise(z_s, many, many, eps), z_s)


def correlated(resamplings: int) -> float:
    """Mean of an unknown pixel whose correlation with a known one, of value 1, is 0.9.

    The exact denoiser of a Gaussian N(0, C) is the posterior mean C alpha (alpha^2 C + sigma^2)^-1
    z; the exact answer is the conditional mean, 0.9.
    """
    pictures = 2000
    covariance = jnp.array([[1.0, 0.9], [0.9, 1.0]])

    def denoise(z, logsnr):
        alpha, sigma = process.alpha_sigma(logsnr[0])
        gain = alpha * covariance @ jnp.linalg.inv(alpha**2 * covariance + sigma**2 * jnp.eye(2))
        return (z.reshape(-1, 2) @ gain.T).reshape(z.shape)

    known = jnp.ones((pictures, 1, 2, 1))
    mask = jnp.broadcast_to(jnp.array([True, False]).reshape(1, 1, 2, 1), known.shape)
    sampler = editing.repaint_sampler(samplers.ddpm(), known, mask)
    keys = jax.random.split(jax.random.key(0), pictures)
    z = samplers.normal(keys, known.shape[1:])
    times = editing.timesteps(40, resamplings=resamplings, jump=2)
    levels = [process.logsnr_at(jnp.asarray(times), DiffusionConfig()) for times in times]
    at = samplers.init_state(sampler, z)
    # Not jitted: the loop itself compiles.
    at = samplers.denoise_steps(sampler, denoise, at, *levels, keys, 0, len(levels[0]))
    return float(at.x0[:, 0, 0, 0].mean())


def test_resampling_makes_what_is_drawn_fit_what_is_kept():
    once, often = correlated(1), correlated(8)
    assert abs(often - 0.9) < 0.05 < abs(once - 0.9)


def test_pixels_outside_of_the_mask_come_out_as_they_are(chain, texts, pictures):
    masks = np.zeros((COUNT, 16, 16), bool)
    masks[:, 3:9, 5:12] = True
    edit = Edit(pictures, masks=masks, resamplings=2, jump=2)
    drawn = chain.sample(seed=3, edit=edit, **texts)
    np.testing.assert_array_equal(drawn[~masks], pictures[~masks])
    assert (drawn[masks] != pictures[masks]).mean() > 0.9
    other = chain.sample(seed=4, edit=edit, **texts)
    assert (other[masks] != drawn[masks]).mean() > 0.5


def test_what_is_under_the_mask_is_not_seen(chain, texts, pictures):
    """At no stage: a small pixel of which a part is to be drawn counts as unknown."""
    masks = np.zeros((COUNT, 16, 16), bool)
    masks[:, 3:9, 5:12] = True
    inverted = np.where(masks[..., None], 255 - pictures, pictures)
    draws = [
        chain.sample(seed=3, edit=Edit(shown, masks=masks), **texts)
        for shown in (pictures, inverted)
    ]
    # The start from noise at logsnr -20 holds e^-10 of the picture.
    assert np.abs(draws[0].astype(int) - draws[1].astype(int)).max() <= 1


def test_strength_says_how_much_of_the_picture_stays(chain, texts, pictures):
    far = []
    for strength in (0.02, 0.5, 1.0):
        drawn = chain.sample(seed=3, edit=Edit(pictures, strength=strength), **texts)
        far.append(np.corrcoef(drawn.ravel(), pictures.ravel())[0, 1])
    assert far[0] > far[1] > far[2]


def test_from_noise_alone_it_is_what_is_drawn_without_a_picture(chain, texts, pictures):
    drawn = chain.sample(seed=3, edit=Edit(pictures, strength=1.0), **texts)
    plain = chain.sample(seed=3, **texts)
    # Logsnr -20 leaves e^-10 of the picture.
    assert np.abs(drawn.astype(int) - plain.astype(int)).max() <= 1


def test_enlarging_a_picture_of_ones_own(sr_config, random_params, texts, pictures):
    stage = Stage(sr_config, random_params(sr_config))
    sr, small = Cascade([stage]), pictures[:, ::2, ::2]
    drawn = {
        level: sr.sample(lowres=small, stage_settings={"sr": {"aug_level": level}}, **texts)
        for level in (0.0, 0.9)
    }
    black = sr.sample(
        lowres=np.zeros_like(small), stage_settings={"sr": {"aug_level": 0.9}}, **texts
    )
    assert drawn[0.0].shape == (COUNT, 16, 16, 3)
    assert (drawn[0.0] != drawn[0.9]).any() and (drawn[0.9] != black).any()
    # Without a low-resolution picture an edit brings its own.
    edited = sr.sample(edit=Edit(pictures, strength=0.5), **texts)
    assert edited.shape == (COUNT, 16, 16, 3)


def test_what_is_refused(pictures):
    for arguments, says in [
        ({"strength": 0.0}, "strength=0.0 must be above 0 and at most 1"),
        ({"strength": 1.5}, "strength=1.5"),
        ({"resamplings": 0}, "resamplings=0 must be at least 1"),
        ({"jump": 0}, "jump=0 must be at least 1"),
        ({"resamplings": 2}, "needs masks"),
    ]:
        with pytest.raises(EditError, match=says):
            dataclasses.replace(Edit(pictures), **arguments)
