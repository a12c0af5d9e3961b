"""One stage: what reaches its network, and what its loss and its denoiser make of the answer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import diffusion, stage
from imagen_jax.config import Config, ConfigError


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
    monkeypatch.setitem(stage.MODELS, "efficient_unet", Answer)
    return Answer


def test_null_text_depends_on_neither_the_caption_nor_its_length():
    rng = np.random.default_rng(0)
    text = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32)
    mask = jnp.arange(4) < jnp.array([1, 2, 4])[:, None]
    emb, dropped = stage.drop_text(text, mask, jnp.array([True, True, False]))
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
    loss, report = stage.loss_fn({}, batch, jax.random.key(0), config)
    assert float(loss) == 0.0 and float(report["x0_mse"]) == 0.0


def test_times_cover_the_process_evenly(answer, base_config, make_batch, monkeypatch):
    config = changed(base_config, "data", batch_size=64)
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    times = []
    for step in range(20):
        stage.loss_fn({}, make_batch(config), jax.random.key(step), config)
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
    loss, report = stage.loss_fn({}, batch, jax.random.key(0), config)
    assert float(loss) == pytest.approx(np.mean(np.asarray(batch["image"]) ** 2), rel=1e-5)
    assert float(report["x0_mse"]) == pytest.approx(float(loss), rel=1e-5)
    config = changed(changed(base_config, "data", batch_size=256), "diffusion",
                     prediction="eps", loss_weight="eps")  # fmt: skip
    loss, _ = stage.loss_fn({}, make_batch(config), jax.random.key(0), config)
    assert float(loss) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(("prob", "share"), [(0.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_text_is_dropped_as_often_as_said(
    answer, base_config, make_batch, monkeypatch, prob, share
):
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    config = changed(changed(base_config, "data", batch_size=1024), "diffusion",
                     cond_drop_prob=prob)  # fmt: skip
    stage.loss_fn({}, make_batch(config), jax.random.key(1), config)
    without = ~np.asarray(answer.seen["text_emb"]).any(axis=(1, 2))
    assert without.mean() == pytest.approx(share, abs=0.05)
    assert (np.asarray(answer.seen["text_mask"])[without].sum(1) == 1).all()


def test_aug_level_is_drawn_and_told_to_the_network(answer, sr_config, make_batch, monkeypatch):
    monkeypatch.setattr(answer, "picture", jnp.zeros(3))
    config = changed(changed(sr_config, "data", batch_size=64), "diffusion", aug_level_max=0.4)
    batch = make_batch(config)
    batch["lowres"] = jnp.ones_like(batch["lowres"])
    stage.loss_fn({}, batch, jax.random.key(0), config)
    lowres, told = np.asarray(answer.seen["z"])[..., 3:], np.asarray(answer.seen["lowres_logsnr"])
    lowest = float(diffusion.aug_logsnr(jnp.float32(0.4), config.diffusion))
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
    stage.loss_fn({}, batch, jax.random.key(0), config)
    z = np.asarray(answer.seen["z"])
    correlation = np.corrcoef(z[..., :3].ravel(), z[..., 3:].ravel())[0, 1]
    assert abs(correlation) < 0.05


def test_denoiser_guides_and_thresholds(answer, base_config, make_batch, monkeypatch):
    batch = make_batch(base_config)
    texts = {"text_emb": batch["text_emb"], "text_mask": batch["text_mask"]}
    z, logsnr = jnp.asarray(batch["image"]), jnp.zeros(len(batch["image"]))
    picture = jnp.where(jnp.arange(8)[:, None, None] < 4, 3.0, -0.5)  # both halves of the pair

    for weight, calls in [(1.0, 4), (2.5, 8)]:
        monkeypatch.setattr(answer, "picture", picture)
        config = changed(base_config, "sampling", guidance_weight=weight, thresholding="static")
        x0 = stage.denoiser({}, config, **texts)(z, logsnr)
        np.testing.assert_allclose(x0[0], jnp.broadcast_to(jnp.clip(picture, -1, 1), x0[0].shape))
        assert answer.seen["z"].shape[0] == calls
    # The second half of the pair is without text.
    assert not np.asarray(answer.seen["text_emb"][4:]).any()
    np.testing.assert_array_equal(answer.seen["text_emb"][:4], batch["text_emb"])
    np.testing.assert_array_equal(answer.seen["z"][:4], answer.seen["z"][4:])


def test_guidance_weight_one_is_the_conditional_network(base_config, make_batch, random_params):
    batch, params = make_batch(base_config), random_params(base_config)
    texts = {"text_emb": batch["text_emb"], "text_mask": batch["text_mask"]}
    z, logsnr = jnp.asarray(batch["image"]), jnp.linspace(-2.0, 2.0, len(batch["image"]))

    @jax.jit
    def pair(params, z):
        drawn = []
        for weight in (1.0, 1.0 + 1e-6, 3.0):
            config = changed(base_config, "sampling", guidance_weight=weight, thresholding="none")
            drawn.append(stage.denoiser(params, config, **texts)(z, logsnr))
        return drawn

    off, nearly_off, on = pair(params, z)
    np.testing.assert_allclose(off, nearly_off, atol=1e-4)
    assert float(jnp.abs(on - off).max()) > 0.01


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
        stage.init_params(config, jax.random.key(0))
