"""From two trained stages to pictures: export, load, chain, sample."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import overrides
from imagen_jax.config.schema import CheckpointConfig, TrainConfig
from imagen_jax.diffusion import samplers
from imagen_jax.export.export import export
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.folder import StageError, check_chain, load_stage
from imagen_jax.training.restore import CheckpointError
from imagen_jax.training.train import train


@pytest.fixture(scope="module")
def exported(base_config, sr_config, make_batch, tmp_path_factory):
    """{name: (stage folder, final TrainState)} of a base and an SR stage trained for two steps."""
    root = tmp_path_factory.mktemp("cascade")
    results = {}
    for config in (base_config, sr_config):
        config = dataclasses.replace(
            config, train=TrainConfig(steps=2), checkpoint=CheckpointConfig(every=2)
        )
        batch = make_batch(config)
        work, out = str(root / f"run_{config.name}"), root / config.name
        state = train(config, work, lambda start, batch=batch: [batch] * 2, log=lambda line: None)
        export(work, str(out), log=lambda line: None)
        results[config.name] = out, state
    return results


@pytest.fixture(scope="module")
def stages(exported):
    return [load_stage(str(exported[name][0])) for name in ("base", "sr")]


@pytest.fixture(scope="module")
def texts():
    """Embeddings and mask of three prompts."""
    emb = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    return {"text_emb": emb, "text_mask": np.arange(4) < np.array([1, 3, 4])[:, None]}


@pytest.fixture(scope="module")
def chain(stages):
    return Cascade(stages)


@pytest.fixture(scope="module")
def drawn(chain, texts):
    return chain.sample_stages(seed=7, **texts)


def test_a_stage_folder_holds_the_averaged_parameters(exported, stages):
    folder, state = exported["base"]
    assert {p.name for p in folder.iterdir()} == {"config.json", "params.safetensors", "card.md"}
    expected = jax.tree_util.tree_leaves_with_path(jax.device_get(state.ema["ema"]))
    got = dict(jax.tree_util.tree_leaves_with_path(stages[0].params))
    assert len(got) == len(expected)
    for path, leaf in expected:
        np.testing.assert_array_equal(got[path], leaf)
    card = (folder / "card.md").read_text()
    assert "8x8 pixels" in card and "2 steps of 4 images" in card
    assert "from 8x8" in (exported["sr"][0] / "card.md").read_text()


def test_pictures(drawn):
    base, sr = drawn
    assert base.shape == (3, 8, 8, 3) and sr.shape == (3, 16, 16, 3)
    assert base.dtype == sr.dtype == np.uint8
    assert base.std() > 1 and sr.std() > 1
    assert (base[0] != base[1]).any() and (sr[1] != sr[2]).any()


def test_keys_differ_in_seed_prompt_and_sample():
    noise = {
        np.asarray(samplers.normal(image_keys(seed, [p], [k]), (2,))).tobytes()
        for seed in range(2)
        for p in range(3)
        for k in range(3)
    }
    assert len(noise) == 18


def test_the_second_stage_follows_the_first(stages, texts):
    keys = image_keys(0, [0, 1, 2], [0, 0, 0])
    sr = stages[1]
    black, white = (jnp.full((3, 8, 8, 3), value) for value in (-1.0, 1.0))
    drawn = [
        np.asarray(sample_stage(sr.params, sr.config, Text(*texts.values()), keys, low))
        for low in (black, white)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01


def test_the_order_of_stages(stages):
    base, sr = (stage.config for stage in stages)
    check_chain([base])
    check_chain([base, sr])
    for chain, says in [
        ([sr, base], "stage 'sr' gets no image, expected an image of 8 px"),
        ([sr], "stage 'sr' gets no image"),
        ([base, base], "stage 'base' gets an image of 8 px, expected no image"),
        ([base, sr, sr], "stage 'sr' gets an image of 16 px, expected an image of 8 px"),
    ]:
        with pytest.raises(StageError, match=says):
            check_chain(chain)


def test_a_folder_that_is_no_stage(exported, tmp_path):
    with pytest.raises(StageError, match="has no config.json.*imagen export"):
        load_stage(str(tmp_path))
    folder, _ = exported["base"]
    for name, content, says in [
        ("config.json", b"{", "config.json"),
        ("config.json", b'{"nmae": "x"}', "did you mean config.name"),
        ("params.safetensors", b"\x00" * 20, "params.safetensors"),
        ("params.safetensors", b"", "params.safetensors"),
    ]:
        broken = tmp_path / "broken"
        broken.mkdir(exist_ok=True)
        for file in folder.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / name).write_bytes(content)
        with pytest.raises(ValueError, match=says) as error:
            load_stage(str(broken))
        assert type(error.value).__module__.startswith("imagen_jax")


def test_exporting_again_replaces_a_stage_and_nothing_else(exported, tmp_path):
    work = str(exported["base"][0].parent / "run_base")
    out = tmp_path / "stage"
    export(work, str(out), log=lambda line: None)
    (out / "card.md").write_text("old")
    export(work, str(out), log=lambda line: None)
    assert (out / "card.md").read_text() != "old"
    config = overrides.from_json((out / "config.json").read_text())
    assert config.train.steps == 2 and json.loads((out / "config.json").read_text())

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"precious")
    with pytest.raises(ValueError, match="photos"):
        export(work, str(tmp_path / "photos"), log=lambda line: None)
    assert (tmp_path / "photos" / "me.jpg").read_bytes() == b"precious"


def test_nothing_to_export(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoints; train first"):
        export(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint; train first"):
        export(str(tmp_path), str(tmp_path / "out"))
