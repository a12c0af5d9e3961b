"""One stage: what reaches its network, and what its loss and its denoiser make of the answer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import process
from imagen_jax.stages.conditioning import Conditioning, Text, drop_text
from imagen_jax.stages.denoiser import make_denoiser
from imagen_jax.stages.loss import loss_fn
from imagen_jax.stages.network import MODELS, init_params
from imagen_jax.stages.stage import Stage


def changed(config: Config, section: str, **values) -> Config:
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


class Answer(nn.Module):
    """A network that answers with a fixed picture, and records what it was given."""

    config: object
    picture = None
    seen = None

    def __call__(self, z, logsnr, text_emb, text_mask, lowres_logsnr=None, train=False):
        type(self).seen = dict(
            z=z, logsnr=logsnr, text_emb=text_emb, text_mask=text_mask, lowres_logsnr=lowres_logsnr
        )
        return jnp.broadcast_to(self.picture, z[..., :3].shape)


@pytest.fixture
def make_batch(make_batch):
    """The shared batches, as they look on a device."""
    return lambda config: {k: jnp.asarray(v) for k, v in make_batch(config).items()}


@pytest.fixture
def answer(monkeypatch):
    monkeypatch.setitem(MODELS, "efficient_unet", Answer)
    return Answer


def test_null_text_depends_on_neither_the_caption_nor_its_length():
    rng = np.random.default_rng(0)
    text = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32)
    mask = jnp.arange(4) < jnp.array([1, 2, 4])[:, None]
    emb, dropped = drop_text(Text(text, mask), jnp.array([True, True, False]))
    np.testing.assert_array_equal(emb[0], emb[1])
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not emb[0].any() and dropped[0].any()
    np.testing.assert_array_equal(emb[2], text[2])
    np.testing.assert_array_equal(dropped[2], mask[2])


@pytest.mark.parametrize("weight", ["x0", "truncated_v", "eps"])
def test_a_perfect_network_has_no_loss(answer, base_config, make_batch, monkeypatch, weight):
    batch = make_batch(base_config)
    monkeypatch.setattr(answer, "picture", jnp.asarray(batch["image"]))
    config = changed(base_config, "diffusion", loss_weight=weight)
    loss, report = loss_fn({}, batch, jax.random.key(0), config)
    assert float(loss) == 0.0 and float(report["x0_mse"]) == 0.0


def test_times_cover_the_process_evenly(answer, base_config, make_batch, monkeypatch):
    config = changed(base_config, "data", batch_size=64)
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    times = []
    for step in range(20):
        loss_fn({}, make_batch(config), jax.random.key(step), config)
        logsnr = np.asarray(answer.seen["logsnr"], np.float64)
        times.append(2 / np.pi * np.arctan(np.exp(-logsnr / 2)))
    # One time in each 64th of [0, 1]: sorted, they run parallel to 0, 1/64, 2/64 ...
    distances = np.sort(times, axis=1) - np.arange(64) / 64
    assert np.ptp(distances, axis=1).max() < 1e-3
    # ... and each example's own time is uniform, not tied to its place in the batch.
    first = np.sort([t[0] for t in times])
    assert first[0] < 0.3 and first[-1] > 0.7


def test_loss_of_a_network_that_knows_nothing(answer, base_config, make_batch, monkeypatch):
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    batch = make_batch(base_config)
    config = changed(base_config, "diffusion", loss_weight="x0")
    loss, report = loss_fn({}, batch, jax.random.key(0), config)
    assert float(loss) == pytest.approx(np.mean(np.asarray(batch["image"]) ** 2), rel=1e-5)
    assert float(report["x0_mse"]) == pytest.approx(float(loss), rel=1e-5)
    config = changed(changed(base_config, "data", batch_size=256), "diffusion",
                     prediction="eps", loss_weight="eps")  # fmt: skip
    loss, _ = loss_fn({}, make_batch(config), jax.random.key(0), config)
    assert float(loss) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(("prob", "share"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_text_is_dropped_as_often_as_said(
    answer, base_config, make_batch, monkeypatch, prob, share
):
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    config = changed(changed(base_config, "data", batch_size=1024), "diffusion",
                     cond_drop_prob=prob)  # fmt: skip
    loss_fn({}, make_batch(config), jax.random.key(1), config)
    without = ~np.asarray(answer.seen["text_emb"]).any(axis=(1, 2))
    assert without.mean() == pytest.approx(share, abs=0.05)
    assert (np.asarray(answer.seen["text_mask"])[without].sum(1) == 1).all()


def test_aug_level_is_drawn_and_told_to_the_network(answer, sr_config, make_batch, monkeypatch):
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    config = changed(changed(sr_config, "data", batch_size=64), "diffusion", aug_level_max=0.4)
    batch = make_batch(config)
    batch["lowres"] = jnp.ones_like(batch["lowres"])
    loss_fn({}, batch, jax.random.key(0), config)
    lowres, told = np.asarray(answer.seen["z"])[..., 3:], np.asarray(answer.seen["lowres_logsnr"])
    lowest = float(process.aug_logsnr(jnp.float32(0.4), config.diffusion))
    assert lowest <= told.min() < lowest + 0.3 and told.max() > 5
    # Each picture carries the very noise that the network is told of: its mean is alpha.
    alpha = 1 / np.sqrt(1 + np.exp(-told.astype(np.float64)))
    np.testing.assert_allclose(lowres.mean(axis=(1, 2, 3)), alpha, atol=0.15)
    np.testing.assert_allclose(lowres.std(axis=(1, 2, 3)), np.sqrt(1 - alpha**2), atol=0.1)


def test_lowres_noise_differs_from_the_pictures_own(answer, sr_config, make_batch, monkeypatch):
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    config = changed(changed(sr_config, "data", batch_size=32), "diffusion", cond_drop_prob=0.0)
    batch = make_batch(config)
    batch["lowres"], batch["image"] = (
        jnp.zeros_like(batch["lowres"]),
        jnp.zeros_like(batch["image"]),
    )
    loss_fn({}, batch, jax.random.key(0), config)
    z = np.asarray(answer.seen["z"])
    correlation = np.corrcoef(z[..., :3].ravel(), z[..., 3:].ravel())[0, 1]
    assert abs(correlation) < 0.05


def test_denoiser_guides_and_thresholds(answer, base_config, make_batch, monkeypatch):
    batch = make_batch(base_config)
    conditioning = Conditioning(Text(batch["text_emb"], batch["text_mask"]))
    z, logsnr = jnp.asarray(batch["image"]), jnp.zeros(len(batch["image"]))
    picture = jnp.where(jnp.arange(8)[:, None, None] < 4, 3.0, -0.5)  # of both texts

    for weight, calls in [(1.0, 4), (2.5, 8)]:
        monkeypatch.setattr(answer, "picture", picture)
        config = changed(base_config, "sampling", guidance_weight=weight, thresholding="static")
        x0 = make_denoiser(Stage(config, {}), conditioning)(z, logsnr)
        np.testing.assert_allclose(x0[0], jnp.broadcast_to(jnp.clip(picture, -1, 1), x0[0].shape))
        assert answer.seen["z"].shape[0] == calls
    # The second of every pair is without text.
    assert not np.asarray(answer.seen["text_emb"][1::2]).any()
    np.testing.assert_array_equal(answer.seen["text_emb"][::2], batch["text_emb"])
    np.testing.assert_array_equal(answer.seen["z"][::2], answer.seen["z"][1::2])


def test_guidance_weight_one_is_the_conditional_network(base_config, make_batch, random_params):
    batch, params = make_batch(base_config), random_params(base_config)
    conditioning = Conditioning(Text(batch["text_emb"], batch["text_mask"]))
    z, logsnr = jnp.asarray(batch["image"]), jnp.linspace(-2.0, 2.0, len(batch["image"]))

    @jax.jit
    def pair(params, z):
        estimates = []
        for weight in (1.0, 1.0 + 1e-6, 3.0):
            config = changed(base_config, "sampling", guidance_weight=weight, thresholding="none")
            estimates.append(make_denoiser(Stage(config, params), conditioning)(z, logsnr))
        return estimates

    off, nearly_off, on = pair(params, z)
    np.testing.assert_allclose(off, nearly_off, atol=1e-4)
    assert float(jnp.abs(on - off).max()) > 0.01


@pytest.fixture
def inputs(base_config, make_batch):
    """(z, logsnr, prompts' text, other prompts' text) of the tiny base stage."""
    batch = make_batch(base_config)
    logsnr = jnp.linspace(-2.0, 2.0, len(batch["image"]))
    text = Text(batch["text_emb"], batch["text_mask"])
    return batch["image"], logsnr, text, Text(text.emb[::-1], text.mask[::-1])


def x0_with(params, config, inputs, *, weight, text=2, **options):
    """x0 at a guidance weight, text 2 or 3 of `inputs` being the prompt."""
    z, logsnr = inputs[:2]
    config = changed(config, "sampling", guidance_weight=weight, thresholding="none")
    conditioning = Conditioning(inputs[text])
    return make_denoiser(Stage(config, params), conditioning, **options)(z, logsnr)


def test_what_guidance_leads_away_from(base_config, inputs, random_params):
    """No text, a negative prompt, a weaker network with the same text, or both of the latter."""
    small = changed(base_config, "model", num_groups=2)
    networks = (random_params(base_config), random_params(small, seed=1))

    @jax.jit
    def estimates(networks):
        params, guide = networks[0], Stage(small, networks[1])
        own = [x0_with(params, base_config, inputs, weight=1.0, text=text) for text in (2, 3)]
        guides = [
            x0_with(guide.params, guide.config, inputs, weight=1.0, text=text) for text in (2, 3)
        ]
        guided = [
            x0_with(params, base_config, inputs, weight=3.0, **options)
            for options in (
                {"negative": inputs[3]},
                {"guide": guide},
                {"guide": guide, "negative": inputs[3]},
                {},
            )
        ]
        return own, guides, guided

    (own, unwanted), guides, (negative, auto, both, without) = estimates(networks)
    np.testing.assert_allclose(negative, 3.0 * own - 2.0 * unwanted, atol=1e-4)
    np.testing.assert_allclose(auto, 3.0 * own - 2.0 * guides[0], atol=1e-4)
    np.testing.assert_allclose(both, 3.0 * own - 2.0 * guides[1], atol=1e-4)
    assert float(jnp.abs(negative - without).max()) > 0.01


def test_one_network_is_evaluated_once(answer, base_config, inputs, monkeypatch):
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    calls = []
    plain = answer.__call__
    monkeypatch.setattr(
        answer, "__call__", lambda self, z, *a, **k: calls.append(len(z)) or plain(self, z, *a, **k)
    )
    every = {"guidance_interval": (-1.0, 1.0), "guidance_rescale": 0.7, "guidance_parallel": 0.0}
    config = changed(base_config, "sampling", guidance_oscillate_after=2, **every)
    for options, expected in [
        ({"weight": 1.0}, [4]),
        ({"weight": 3.0}, [8]),
        ({"weight": 3.0, "negative": inputs[3]}, [8]),
        ({"weight": 3.0, "guide": Stage(base_config, {})}, [4, 4]),
    ]:
        calls.clear()
        x0_with({}, config, inputs, **options)
        assert calls == expected


def test_a_guide_that_draws_other_pictures_is_refused(base_config, sr_config, inputs):
    with pytest.raises(ConfigError, match="guide: config.data.image_size=16 must be 8") as error:
        x0_with({}, base_config, inputs, weight=2.0, guide=Stage(sr_config, {}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("model", {"text_dim": 0}, "config.model.text_dim=0"),
        ("data", {"image_size": 10}, "config.data.image_size=10 must be a multiple of 4"),
    ],
)
def test_a_stage_that_cannot_be_built(base_config, section, values, says):
    config = changed(changed(base_config, "model", patch_size=4), section, **values)
    with pytest.raises(ConfigError, match=says):
        init_params(config, jax.random.key(0))
