"""`Cascade.sample`: a picture is a function of prompt, seed and indices, whatever is around it."""

import dataclasses

import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.diffusion.editing import Edit
from imagen_jax.inference import batches, stage_sampler
from imagen_jax.inference.cascade import Cascade
from imagen_jax.inference.request import RequestError, with_settings
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.io import images
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.folder import StageError, write_stage
from imagen_jax.stages.stage import Stage
from tests.reference.fake_encoder import FakeEncoder

COUNT = 5


@pytest.fixture(scope="module")
def stages(base_config, sr_config, random_params):
    return [Stage(config, random_params(config)) for config in (base_config, sr_config)]


@pytest.fixture(scope="module")
def chain(stages):
    return Cascade(stages)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return {
        "text_emb": rng.normal(size=(COUNT, 4, 8)).astype(np.float32),
        "text_mask": np.arange(4) < rng.integers(1, 5, (COUNT, 1)),
    }


@pytest.fixture(scope="module")
def drawn(chain, texts):
    return chain.sample_stages(seed=3, **texts)


def levels_apart(pictures, others) -> int:
    return int(np.abs(np.asarray(pictures).astype(int) - np.asarray(others).astype(int)).max())


def some(texts, order):
    return {name: value[order] for name, value in texts.items()}


def test_other_order_and_other_batches(chain, texts, drawn):
    order = [4, 2, 0, 3, 1]
    for batch_size in (3, COUNT):
        again = chain.sample_stages(
            seed=3, prompt_indices=order, batch_size=batch_size, **some(texts, order)
        )
        for pictures, expected in zip(again, drawn, strict=True):
            # Sums of another batch may round otherwise, which shows at the edge of a level only.
            assert levels_apart(pictures, expected[order]) <= 1


@pytest.mark.slow
def test_one_call_is_what_whole_stages_draw(stages, texts, drawn):
    """The program that can be looked at on the way is the one that is compiled whole."""
    keys, low = image_keys(3, range(COUNT), [0] * COUNT), None
    for index, (stage, expected) in enumerate(zip(stages, drawn, strict=True)):
        stage_keys = stage_sampler.stage_keys(keys, index)
        low = sample_stage(stage.params, stage.config, Text(*texts.values()), stage_keys, low)
        assert levels_apart(images.to_uint8(np.asarray(low)), expected) <= 1


def test_requests_of_other_seeds_in_one_call(chain, texts, drawn):
    seeds = [3, 9, 3, 2**32 - 1, 3]
    mixed = chain.sample(seed=seeds, **texts)
    same = [row for row, seed in enumerate(seeds) if seed == 3]
    assert levels_apart(mixed[same], drawn[-1][same]) == 0
    assert levels_apart(mixed[1], drawn[-1][1]) > 1
    three = [1, 1, 1]
    alone = chain.sample(seed=9, prompt_indices=three, **some(texts, three))
    assert levels_apart(alone, mixed[three]) <= 1


def test_progress_and_its_estimates(chain, texts, drawn, stages):
    seen = []
    again = chain.sample(seed=3, batch_size=3, on_progress=seen.append, report_every=3, **texts)
    assert levels_apart(again, drawn[-1]) <= 1
    assert [(p.stage, p.rows.tolist(), p.step) for p in seen] == [
        (name, rows, step)
        for name in ("base", "sr")
        for rows in ([0, 1, 2], [3, 4])
        for step in (3, 4)
    ]
    assert all((p.steps, p.stages) == (4, 2) for p in seen)
    last = np.concatenate([np.asarray(p.x0)[: len(p.rows)] for p in seen[5::2]])
    assert levels_apart(images.to_uint8(np.clip(last, -1, 1)), again) == 0


def test_any_order_is_drawn_in_the_same_batches(chain, texts):
    seen = {name: [] for name in ("given", "mixed")}
    order = np.array([3, 0, 4, 2, 1])
    settings = {"seed": 3, "batch_size": 2}
    given = chain.sample(on_progress=seen["given"].append, **settings, **texts)
    mixed = chain.sample(
        prompt_indices=order.tolist(),
        on_progress=seen["mixed"].append,
        **settings,
        **some(texts, order),
    )
    np.testing.assert_array_equal(mixed, given[order])
    for one, other in zip(seen["given"], seen["mixed"], strict=True):
        np.testing.assert_array_equal(one.rows, order[other.rows])
        np.testing.assert_array_equal(one.x0, other.x0)


def test_one_program_serves_steps_weights_and_aug_levels(chain, texts, drawn):
    chain.sample(seed=3, **texts)
    _, run_steps = batches.programs()
    before = run_steps._cache_size()
    for steps, aug_level in ((1, 0.0), (3, 0.3), (7, 0.9)):
        base = {"steps": steps, "guidance_weight": 1.5 * steps}
        settings = {"base": base, "sr": {"steps": steps, "aug_level": aug_level}}
        other = chain.sample(seed=3, stage_settings=settings, **texts)
        assert levels_apart(other, drawn[-1]) > 1
    assert run_steps._cache_size() == before
    chain.sample(seed=3, stage_settings={"base": {"sampler": "ddpm"}}, **texts)
    assert run_steps._cache_size() == before + 1
    assert chain.configs[0].sampling.sampler == "ddim"


def test_negative_prompts_and_guides(stages, random_params):
    prompts, base = [f"prompt {i}" for i in range(COUNT)], stages[:1]
    plain = Cascade(base, FakeEncoder())
    weaker = base[0]._replace(params=random_params(base[0].config, seed=1))
    draws = {
        "plain": plain.sample(prompts),
        "other": plain.sample(prompts, negative_prompts=["a"] + ["b"] * (COUNT - 1)),
        "guided": Cascade(base, FakeEncoder(), [weaker]).sample(prompts),
        "own": Cascade(base, FakeEncoder(), base).sample(prompts),
        "off": plain.sample(prompts, stage_settings={"base": {"guidance_weight": 1.0}}),
    }
    different = {name: levels_apart(drawn, draws["plain"]) for name, drawn in draws.items()}
    assert all(apart > 1 for name, apart in different.items() if name != "plain")
    # A stage that is led away from itself is not led: w x + (1 - w) x = x.
    assert levels_apart(draws["own"], draws["off"]) <= 1
    with pytest.raises(StageError, match="guide 'sr' has image_size 16, which no stage has"):
        Cascade(base, FakeEncoder(), stages[1:])


def test_guidance_in_a_shared_program_is_that_of_a_whole_one(stages, texts):
    base, changed = stages[0], {"guidance_weight": 6.5}
    sampling = dataclasses.replace(base.config.sampling, **changed)
    config = dataclasses.replace(base.config, sampling=sampling)
    keys = stage_sampler.stage_keys(image_keys(3, range(COUNT), [0] * COUNT), 0)
    whole = sample_stage(base.params, config, Text(*texts.values()), keys)
    parts = Cascade([base]).sample(seed=3, stage_settings={"base": changed}, **texts)
    assert levels_apart(parts, images.to_uint8(np.asarray(whole))) <= 1


@pytest.fixture(scope="module")
def folders(stages, tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    for stage in stages:
        write_stage(root / stage.config.name, stage.params, stage.config, {})
    return [str(root / name) for name in ("base", "sr")]


def test_guidance_that_goes_by_the_step_knows_how_many_there_are(base_config):
    def key_of(**settings):
        sampling = dataclasses.replace(base_config.sampling, **settings)
        return stage_sampler.jit_cache_config(dataclasses.replace(base_config, sampling=sampling))

    assert key_of(steps=5) == key_of(steps=9)
    assert key_of(steps=5, guidance_oscillate_after=2).sampling.steps == 5


def test_stages_one_at_a_time(folders, texts, drawn):
    one = Cascade.load(folders, text_encoder=None, keep="one")
    assert levels_apart(one.sample(seed=3, batch_size=3, **texts), drawn[-1]) <= 1


def test_a_super_resolution_stage_alone_needs_a_picture(folders, texts):
    with pytest.raises(RequestError, match="stage 'sr' takes a 8 px image; give lowres"):
        Cascade.load(folders[1:], text_encoder=None).sample(**texts)
    with pytest.raises(StageError, match="stage 'base' gets an image of 16 px, expected no image"):
        Cascade.load(folders[::-1], text_encoder=None)


def test_more_noise_than_a_stage_learned_from_is_refused(sr_config):
    process = dataclasses.replace(sr_config.diffusion, aug_level_max=0.2)
    config = dataclasses.replace(sr_config, diffusion=process)
    with_settings([config], {"sr": {"aug_level": 0.2}})
    with pytest.raises(ConfigError, match="sr.aug_level=0.3 must be from 0 to 0.2, the stage's"):
        with_settings([config], {"sr": {"aug_level": 0.3}})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "prompts=\\[\\] must hold at least one text"),
        ({"prompts": ["a"]}, "prompts need a text encoder"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"seed": [1, 2]}, "seed has 2 values, not one for each of 5"),
        ({"prompt_indices": [0]}, "prompt_indices has 1 values"),
        ({"sample_indices": [0, 0, 0, 0, -3]}, "sample_indices=-3"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"report_every": 0}, "report_every=0"),
        ({"text_mask": None}, "must be \\[N, L, D\\]"),
        ({"text_emb": np.zeros((5, 4, 9), np.float32)}, "width 9 must have width 8"),
        ({"negative_prompts": ["a"]}, "negative_prompts=.* must be a list of 5 texts"),
        ({"prompts": ["a", "b"]}, "prompts are 2, text_emb has 5 rows"),
        ({"lowres": np.zeros((5, 8, 8, 3), np.uint8)}, "lowres: stage 'base' is a base stage"),
        (
            {"edit": Edit(np.zeros((5, 8, 8, 3), np.uint8))},
            "edit.images of shape",
        ),
        ({"stage_settings": {"bsae": {}}}, "did you mean 'base'"),
        ({"stage_settings": {"sr": {"step": 3}}}, "did you mean stage_settings: sr.steps"),
    ],
)
def test_what_is_refused(chain, texts, arguments, says):
    needs_no_text = arguments.get("prompts") == ["a"] or not arguments
    with pytest.raises((RequestError, ConfigError), match=says) as error:
        chain.sample(**({} if needs_no_text else texts) | arguments)
    assert "\n" not in str(error.value)
