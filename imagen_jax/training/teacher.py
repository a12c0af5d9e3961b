"""The teacher of a distillation (`config.distill`): its settings and its parameters.

Its parameters travel with the batch, as "teacher", to the train step, which computes the targets
(`stages/distillation.py`). They are no part of the state: checkpoints do not hold them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config
from imagen_jax.interop import weights
from imagen_jax.interop.weights import flatten, unflatten
from imagen_jax.io import copies
from imagen_jax.stages.folder import config_hash, load_stage, weights_hash
from imagen_jax.stages.network import abstract_params
from imagen_jax.training.batch_streams import Encode
from imagen_jax.training.initial_state import place

# Fields in which the student may differ: they are of training alone.
_OF_TRAINING = ("cond_drop_prob", "loss_weight", "text_noise", "vlb_weight", "aug_level_max")


def with_teacher(config: Config) -> Config:
    """`config` with what `config.distill.teacher` determines; without a teacher as it is.

    The student starts from the teacher (`initial_state.first_state`), drops no captions, samples
    without guidance, and with `distill.steps` by as many steps of DDIM.

    Raises:
      StageError: it is no stage folder. ConfigError: its network or process is another one.
    """
    path = config.distill.teacher
    if not path:
        return config
    with copies.reading(path) as folder:
        teacher = load_stage(folder).config
        fingerprint = weights_hash(folder) + config_hash(teacher)
    _check(config, teacher)
    unguided = {
        field.name: field.default
        for field in dataclasses.fields(SamplingConfig)
        if field.name.startswith("guidance_")
    }
    sampling = dataclasses.replace(config.sampling, **{**unguided, "guidance_weight": 1.0})
    if config.distill.steps is not None:
        steps = config.distill.steps
        sampling = dataclasses.replace(
            sampling, sampler="ddim", steps=steps, spacing="time", timesteps=()
        )
    return dataclasses.replace(
        config,
        sampling=sampling,
        diffusion=dataclasses.replace(config.diffusion, cond_drop_prob=0.0),
        distill=dataclasses.replace(
            config.distill, sampling=teacher.sampling, fingerprint=fingerprint
        ),
    )


def _check(config: Config, teacher: Config) -> None:
    if config.diffusion.prediction == "eps" and config.distill.steps is not None:
        raise ConfigError(
            "config.diffusion.prediction='eps' with config.distill.steps: the noise says nothing "
            "of x0 where a step starts from pure noise; distil a stage with 'x0' or 'v'"
        )
    if teacher.text.null != "zeros" and teacher.sampling.guided:
        raise ConfigError(
            f"config.text.null={teacher.text.null!r} of the teacher {config.distill.teacher} with "
            "guidance: training has no embedding of the empty caption; distil a stage with 'zeros'"
        )
    for section in ("model", "diffusion", "lora"):
        ours, theirs = getattr(config, section), getattr(teacher, section)
        for field in dataclasses.fields(ours):
            got, expected = getattr(ours, field.name), getattr(theirs, field.name)
            if got != expected and field.name not in (*_OF_TRAINING, "dtype", "remat", "dropout"):
                raise ConfigError(
                    f"config.{section}.{field.name}={got} must be {expected}, as in the teacher "
                    f"{config.distill.teacher}; give the teacher's configuration"
                )


def add_teacher(config: Config, encode: Encode) -> Encode:
    """`encode` for `train` and `replay`: with the parameters of the teacher, if there is one."""
    return Teacher(config, encode) if config.distill.teacher else encode


class Teacher:
    """`Encode` that adds the teacher's parameters to every batch, sharded as the student's.

    Args:
      config: from `with_teacher`.
      encode: what the inputs of the model are made by.
    """

    def __init__(self, config: Config, encode: Encode) -> None:
        self._config, self._encode = config, encode
        self._params: Any = None

    def __call__(self, batch: Mapping[str, Array]) -> Mapping[str, Any]:
        """The encoded batch with the teacher. Called within the run's mesh."""
        if self._params is None:
            self._params = self._read()
        return {**self._encode(batch), "teacher": self._params}

    def _read(self) -> Any:
        path = self._config.distill.teacher
        expected = flatten(abstract_params(self._config, jax.sharding.get_mesh()))
        with copies.reading(path) as folder:
            stored = flatten(load_stage(folder).params)
        found, shapes = (
            {name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (stored, expected)
        )
        weights.check_parameters(f"config.distill.teacher={path}", found, shapes)
        return unflatten({name: place(stored[name], expected[name]) for name in expected})
