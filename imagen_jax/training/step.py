"""One training step: a pure function (state, batch) -> (state, report)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.models import gradients
from imagen_jax.parallel import flops, partitioning
from imagen_jax.stages import distillation
from imagen_jax.stages.loss import (
    DROPOUT_STREAM,
    loss_given_randomness,
    sample_randomness,
    sample_timesteps,
)
from imagen_jax.stages.parameters import merge, select
from imagen_jax.training import ema
from imagen_jax.training.state import TrainState
from imagen_jax.training.trainable import patterns

# PRNG streams; the key of a step is fold_in(fold_in(key(seed), STREAM), step), and after roll-backs
# their number is folded into it.
INIT_STREAM, STEP_STREAM = 0, 1

StepFn = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Any]]]


def step_key(config: Config, step: Array | int, rollbacks: int = 0) -> Key[Array, ""]:
    """The PRNG key of a step; all its random values derive from it."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), STEP_STREAM), step)
    return jax.random.fold_in(key, rollbacks) if rollbacks else key


def step_timesteps(config: Config, step: int, rollbacks: int = 0) -> list[float]:
    """The timesteps t in [0, 1] of all examples of a step."""
    times = sample_timesteps(step_key(config, step, rollbacks), config.data.batch_size)
    if config.distill.steps is not None:
        times = distillation.start_times(times, config.distill.steps)
    return [float(time) for time in times]


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, rollbacks: int = 0
) -> StepFn:
    """The training step (state, batch) -> (state, report). Pure; see `jit_train_step`.

    An update with non-finite loss or gradient is skipped and counted in `state.skipped`.
    """

    def train_step(
        state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Any]]:
        key = step_key(config, state.step, rollbacks)
        gradient, report = gradient_of_batch(state.params, batch, key, config)

        before = select(state.params, patterns(config))
        updates, opt_state = optimizer.update(gradient, state.opt_state, before)
        trained = optax.apply_updates(before, updates)
        decays = ema.decays(state.step, config.ema)
        averages = {name: ema.update(a, trained, decays[name]) for name, a in state.ema.items()}

        norms = block_norms(gradient)
        grad_norm = optax.tree.norm(norms)
        finite = jnp.isfinite(report["loss"]) & jnp.isfinite(grad_norm)
        previous = (before, state.ema, state.opt_state)
        trained, averages, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trained, averages, opt_state), previous
        )
        state = TrainState(
            step=state.step + 1,
            params=merge(state.params, trained),
            ema=averages,
            opt_state=opt_state,
            skipped=state.skipped + (1 - finite.astype(jnp.int32)),
        )
        report |= {"grad_norm": grad_norm, "skipped": state.skipped}
        return state, {**report, "finite": finite, "block_norms": norms}

    return train_step


def jit_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    *,
    rollbacks: int = 0,
) -> Any:
    """The training step, jitted for the mesh with the state donated (except on CPU).

    Args:
      config: configuration of the stage.
      optimizer: from `make_optimizer`.
      state: arrays or shapes with shardings. The new state has the same shardings; left free, the
        compiler would change some of them.
      mesh: from `partitioning.make_mesh`; must be the active mesh.
      rollbacks: of the run so far.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        make_train_step(config, optimizer, rollbacks),
        donate_argnums=partitioning.donated(0),
        out_shardings=(shardings, partitioning.replicated(mesh)),
        compiler_options=partitioning.train_step_options(),
    )


def model_flops(
    traced: jax.stages.Traced,
    config: Config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Mapping[str, Any],
    mesh: Mesh,
) -> float:
    """Model FLOPs of a step over all devices, as MFU needs them: without recomputation.

    Args:
      traced: the traced step.
      config: as for `jit_train_step`; if `model.remat` is on, the step is traced without it.
      optimizer: as for `jit_train_step`.
      state: as for `jit_train_step`.
      batch: arrays or shapes with shardings.
      mesh: as for `jit_train_step`.
    """
    if config.model.remat != "none":
        model = dataclasses.replace(config.model, remat="none")
        without_remat = dataclasses.replace(config, model=model)
        traced = jit_train_step(without_remat, optimizer, state, mesh).trace(state, batch)
    return flops.count(traced.jaxpr)


def block_norms(gradient: Mapping[str, Any]) -> dict[str, Array]:
    """L2 norm of the gradient of each block of the network."""
    return {name: optax.tree.norm(block) for name, block in gradient.items()}


def with_targets(examples: Mapping[str, Any], config: Config) -> Mapping[str, Any]:
    """Examples with the values of `sample_randomness`; by `config.distill` with targets.

    Raises:
      ConfigError: the examples lack the teacher's parameters.
    """
    if not config.distill.teacher:
        return examples
    if "teacher" not in examples:
        raise ConfigError(
            f"config.distill.teacher={config.distill.teacher!r}: the batch has no parameters of "
            "it; give train(encode=Teacher(...)), see training/teacher.py"
        )
    return distillation.add_targets(examples, config)


def gradient_of_batch(
    params: Any, batch: Mapping[str, Array], key: Key[Array, ""], config: Config
) -> tuple[Any, dict[str, Array]]:
    """Gradient and report of a batch, accumulated over `train.accumulation` parts.

    Timesteps and noise are sampled for the whole batch, so the accumulated gradient equals the
    unaccumulated one up to rounding and dropout. Of the trained parameters alone.
    """
    trained = select(params, patterns(config))
    parts = config.train.accumulation
    examples = {**batch, **sample_randomness(key, len(batch["image"]), config)}
    teacher = {"teacher": examples.pop("teacher")} if "teacher" in examples else {}
    dropout_key = jax.random.fold_in(key, DROPOUT_STREAM)

    def loss(trained: Any, examples: Mapping[str, Array], key: Key[Array, ""]) -> Any:
        return loss_given_randomness(merge(params, trained), examples, key, config)

    def gradient_fn(trained: Any, examples: Mapping[str, Array], key: Key[Array, ""]) -> Any:
        examples = with_targets({**examples, **teacher}, config)
        with gradients.reduce_dtype(config.train.reduce_dtype):
            return jax.value_and_grad(loss, has_aux=True)(trained, examples, key)

    if parts == 1:
        (_, report), gradient = gradient_fn(trained, examples, dropout_key)
        return gradient, report

    # Part i holds examples i, i + k, ...: every example stays on its device.
    def split(x: Array) -> Array:
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, indexed: tuple[Mapping[str, Array], Array]) -> tuple[Any, None]:
        part, index = indexed
        part_key = jax.random.fold_in(dropout_key, index)
        (_, report), gradient = gradient_fn(trained, part, part_key)
        return jax.tree.map(jnp.add, total, (gradient, report)), None

    split_examples = jax.tree.map(split, examples)
    first = jax.tree.map(lambda x: x[0], split_examples)
    (_, report), gradient = jax.eval_shape(lambda: gradient_fn(trained, first, dropout_key))
    # Starting at zero and not at the first part lets the compiler compile one part, not two.
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (gradient, report))
    # XLA's gradients of convolutions inside a loop are about 100 times slower on CPUs.
    unroll = parts if partitioning.platform() == "cpu" else 1
    indexed_parts = (split_examples, jnp.arange(parts))
    (gradient, report), _ = jax.lax.scan(add, zero, indexed_parts, unroll=unroll)
    mean = {name: report[name] / parts for name in report if name != "loss_by_noise_level"}
    return jax.tree.map(lambda g: g / parts, gradient), {**report, **mean}
