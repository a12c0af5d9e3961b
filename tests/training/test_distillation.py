"""Distillation is training like any other: killed and resumed, exported, sampled."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import overrides
from imagen_jax.config.distill import DistillConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config
from imagen_jax.parallel import topology
from imagen_jax.planning.plan import train_program
from imagen_jax.stages import distillation, folder
from imagen_jax.training import preview
from imagen_jax.training.step import gradient_of_batch, step_key, step_timesteps
from imagen_jax.training.teacher import Teacher, add_teacher, with_teacher
from imagen_jax.training.train import train


@pytest.fixture(scope="module")
def teacher(base_config, random_params, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "stage"
    folder.write_stage(path, random_params(base_config, 1), base_config, {})
    return path


def student(config, teacher, steps):
    return with_teacher(dataclasses.replace(config, distill=DistillConfig(str(teacher), steps)))


def identity(batch):
    return batch


@pytest.mark.parametrize("steps", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_resumed_in_the_middle_it_ends_the_same(base_config, teacher, stream, tmp_path, steps):
    config = student(base_config, teacher, steps)
    whole = train(config, str(tmp_path / "whole"), stream(config), encode=Teacher(config, identity))

    class Killed(Exception):
        pass

    def kill(position):
        if position == 5:
            raise Killed

    parts = str(tmp_path / "parts")
    with pytest.raises(Killed):
        train(config, parts, stream(config, event=kill), encode=Teacher(config, identity))
    resumed = train(config, parts, stream(config), encode=Teacher(config, identity))
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    jax.tree.map(np.testing.assert_array_equal, whole.ema, resumed.ema)
    start = folder.load_stage(str(teacher)).params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, whole.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_parts_of_a_batch_give_the_same_gradient(base_config, teacher, make_batch):
    config = student(base_config, teacher, 2)
    in_parts = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=2))
    start = jax.tree.map(jnp.asarray, folder.load_stage(str(teacher)).params)
    batch = {name: jnp.asarray(value) for name, value in make_batch(config).items()}
    batch["teacher"] = start
    whole, parts = (
        jax.jit(gradient_of_batch, static_argnums=3)(start, batch, step_key(c, 3), c)[0]
        for c in (config, in_parts)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole)) > 1e-2


def test_the_teacher_is_evaluated_on_one_part_at_a_time(
    base_config, teacher, make_batch, monkeypatch
):
    """Accumulation is for memory: the teacher has no more images at a time than the student."""
    config = student(base_config, teacher, 2)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=2))
    start = jax.tree.map(jnp.asarray, folder.load_stage(str(teacher)).params)
    batch = {name: jnp.asarray(value) for name, value in make_batch(config).items()}
    rows, add_targets = set(), distillation.add_targets

    def recording(examples, config):
        rows.add(len(examples["image"]))
        return add_targets(examples, config)

    monkeypatch.setattr(distillation, "add_targets", recording)
    jax.eval_shape(
        lambda: gradient_of_batch(start, {**batch, "teacher": start}, step_key(config, 3), config)
    )
    assert rows == {2}


def test_reported_timesteps_are_those_that_the_student_learns(base_config, teacher):
    """Fault files name them."""
    assert set(step_timesteps(student(base_config, teacher, 2), 3)) == {0.5, 1.0}
    assert len(set(step_timesteps(student(base_config, teacher, None), 3))) == 4


def test_the_students_settings_follow_from_the_teacher(base_config, teacher):
    config = student(base_config, teacher, 2)
    assert (config.sampling.sampler, config.sampling.steps) == ("ddim", 2)
    assert config.sampling.guidance_weight == 1.0 and config.diffusion.cond_drop_prob == 0.0
    assert config.distill.sampling.guidance_weight == base_config.sampling.guidance_weight
    guided = student(base_config, teacher, None)
    assert guided.sampling.steps == base_config.sampling.steps
    assert overrides.from_dict(Config, dataclasses.asdict(config), "config") == config


def test_a_run_is_bound_to_its_teacher_and_not_to_its_folder(
    base_config, teacher, random_params, tmp_path
):
    first = student(base_config, teacher, 2)
    moved = shutil.copytree(teacher, tmp_path / "moved")
    assert overrides.changes(first, student(base_config, moved, 2)) == {}
    folder.write_stage(moved, random_params(base_config, 2), base_config, {})
    assert list(overrides.changes(first, student(base_config, moved, 2))) == ["distill.fingerprint"]


def test_another_network_is_refused(base_config, teacher):
    model = dataclasses.replace(base_config.model, channels=(16,))
    with pytest.raises(ConfigError, match=r"config\.model\.channels=\(16,\) must be \(8,\)"):
        student(dataclasses.replace(base_config, model=model), teacher, None)


def test_eps_has_no_student_of_few_steps(base_config, teacher):
    diffusion = dataclasses.replace(base_config.diffusion, prediction="eps", loss_weight="eps")
    with pytest.raises(ConfigError, match=r"config\.diffusion\.prediction='eps'"):
        student(dataclasses.replace(base_config, diffusion=diffusion), teacher, 4)


def test_a_run_without_the_teachers_parameters_is_refused(base_config, teacher, stream, tmp_path):
    config = student(base_config, teacher, 2)
    with pytest.raises(ConfigError, match=r"config\.distill\.teacher=.*training/teacher\.py"):
        train(config, str(tmp_path), stream(config))


def test_a_plan_has_room_for_the_teacher(base_config, teacher):
    where = topology.this_machine()
    without = train_program(base_config, where)
    config = student(base_config, teacher, 2)
    bytes_of_params = 4 * without.params
    found = train_program(config, where)
    assert found.arguments == without.arguments + bytes_of_params
    # Two evaluations of the teacher, each guided: a batch of twice the size.
    assert found.flops > without.flops + 3.5 * (without.flops / 3)


def test_a_preview_has_no_rows_of_the_teacher(base_config, teacher, stream, tmp_path, monkeypatch):
    """Its parameters have no examples: on several devices their axes cannot be split."""
    config = student(base_config, teacher, 2)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=2, sample_every=1, overfit_batch=True)
    )
    shown = []

    def first_rows(batch, parts, each):
        shown.append(set(batch))
        return {name: value[:each] for name, value in batch.items()}

    monkeypatch.setattr(preview, "_first_rows", first_rows)
    train(config, str(tmp_path), stream(config), encode=Teacher(config, identity))
    assert shown == [{"image", "text_emb", "text_mask"}] * 3
    assert (tmp_path / "overfit.png").is_file()


def test_a_guided_teacher_with_an_encoded_empty_caption_is_refused(base_config, teacher, tmp_path):
    text = dataclasses.replace(base_config.text, null="empty")
    config = dataclasses.replace(base_config, text=text)
    stage = folder.load_stage(str(teacher))
    folder.write_stage(tmp_path / "stage", stage.params, config, {})
    with pytest.raises(ConfigError, match=r"config\.text\.null='empty'.* guidance"):
        student(config, tmp_path / "stage", None)
    unguided = dataclasses.replace(config.sampling, guidance_weight=1.0)
    config = dataclasses.replace(config, sampling=unguided)
    folder.write_stage(tmp_path / "stage", stage.params, config, {})
    assert student(config, tmp_path / "stage", 2).diffusion.cond_drop_prob == 0.0


def test_guidance_of_a_student_is_off_in_every_field(base_config, random_params, tmp_path):
    sampling = dataclasses.replace(
        base_config.sampling,
        guidance_rescale=0.7,
        guidance_parallel=0.0,
        guidance_norm=5.0,
        guidance_oscillate_after=2,
        guidance_interval=(-2.0, 2.0),
    )
    config = dataclasses.replace(base_config, sampling=sampling)
    folder.write_stage(tmp_path / "stage", random_params(config, 1), config, {})
    found = student(config, tmp_path / "stage", None)
    assert found.distill.sampling == sampling
    off = SamplingConfig(guidance_weight=1.0)
    for field in dataclasses.fields(off):
        if field.name.startswith("guidance_"):
            assert getattr(found.sampling, field.name) == getattr(off, field.name), field.name


def test_without_a_teacher_nothing_is_added(base_config):
    assert with_teacher(base_config) is base_config
    assert add_teacher(base_config, identity) is identity
