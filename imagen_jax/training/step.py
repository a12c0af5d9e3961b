"""The update of one step: one pure function of the state and the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from imagen_jax.config.schema import Config
from imagen_jax.parallel import flops, partitioning
from imagen_jax.stages import stage
from imagen_jax.training import ema
from imagen_jax.training.state import TrainState

# Streams of randomness; a key is fold_in(fold_in(key(seed), STREAM), step).
INIT_STREAM, STEP_STREAM = 0, 1

StepFn = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Any]]]


def step_key(config: Config, step: Array | int) -> Key[Array, ""]:
    """The key from which all randomness of a step follows."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), STEP_STREAM), step)


def step_timesteps(config: Config, step: int) -> list[float]:
    """The diffusion times, 0..1, of all examples of a step."""
    draws = stage.draw(step_key(config, step), config.data.batch_size, config)
    return [float(time) for time in draws["time"]]


def make_train_step(config: Config, optimizer: optax.GradientTransformation) -> StepFn:
    """The update of one step: (state, batch) -> (state, report). Pure; jit it with donation.

    An update whose loss or gradient is not finite is skipped and counted in `state.skipped`.
    """

    def train_step(
        state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Any]]:
        key = step_key(config, state.step)
        gradient, report = gradient_of_batch(state.params, batch, key, config)

        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decays = ema.decays(state.step, config.ema)
        averages = {name: ema.update(a, params, decays[name]) for name, a in state.ema.items()}

        norms = block_norms(gradient)
        grad_norm = optax.tree.norm(norms)
        finite = jnp.isfinite(report["loss"]) & jnp.isfinite(grad_norm)
        old = (state.params, state.ema, state.opt_state)
        params, averages, opt_state = jax.tree.map(
            lambda new, kept: jnp.where(finite, new, kept), (params, averages, opt_state), old
        )
        state = TrainState(
            step=state.step + 1,
            params=params,
            ema=averages,
            opt_state=opt_state,
            skipped=state.skipped + (1 - finite.astype(jnp.int32)),
        )
        report |= {"grad_norm": grad_norm, "skipped": state.skipped}
        return state, {**report, "finite": finite, "block_norms": norms}

    return train_step


def jit_train_step(
    config: Config, optimizer: optax.GradientTransformation, state: TrainState, mesh: Mesh
) -> Any:
    """The update as it runs: compiled for the mesh; the new state may take the old one's memory.

    Args:
      config: the stage.
      optimizer: of `make_optimizer`.
      state: arrays or shapes with their shardings. The new state lies as it does; the compiler
        would move some of it.
      mesh: of `partitioning.make_mesh`, in force.
    """
    lies = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        make_train_step(config, optimizer),
        donate_argnums=partitioning.donated(0),
        out_shardings=(lies, partitioning.everywhere(mesh)),
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
    """FLOPs of an update over all devices, without what `model.remat` computes again: MFU's.

    Args:
      traced: the step of `config`; the others as for `jit_train_step`.
      batch: arrays or shapes with their shardings.
    """
    if config.model.remat != "none":
        model = dataclasses.replace(config.model, remat="none")
        kept = dataclasses.replace(config, model=model)
        traced = jit_train_step(kept, optimizer, state, mesh).trace(state, batch)
    return flops.count(traced.jaxpr)


def block_norms(gradient: Mapping[str, Any]) -> dict[str, Array]:
    """L2 norm of the gradient of each of the network's blocks."""
    return {name: optax.tree.norm(block) for name, block in gradient.items()}


def gradient_of_batch(
    params: Any, batch: Mapping[str, Array], key: Key[Array, ""], config: Config
) -> tuple[Any, dict[str, Array]]:
    """Gradient and report of a batch, in `train.accumulation` parts one after the other.

    The parts' noise is drawn for the whole batch, so that only rounding (and dropout) tells
    k parts from one.
    """
    parts = config.train.accumulation
    drawn = {**batch, **stage.draw(key, len(batch["image"]), config)}
    dropout_key = jax.random.fold_in(key, stage.DROPOUT_STREAM)
    gradient_fn = jax.value_and_grad(stage.loss_given_randomness, has_aux=True)
    if parts == 1:
        (_, report), gradient = gradient_fn(params, drawn, dropout_key, config)
        return gradient, report

    # Every k-th example makes a part: the examples stay on their devices.
    def split(x: Array) -> Array:
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, part: tuple[Mapping[str, Array], Array]) -> tuple[Any, None]:
        examples, index = part
        part_key = jax.random.fold_in(dropout_key, index)
        (_, report), gradient = gradient_fn(params, examples, part_key, config)
        return jax.tree.map(jnp.add, total, (gradient, report)), None

    examples = (jax.tree.map(split, drawn), jnp.arange(parts))
    first = jax.tree.map(lambda x: x[0], examples[0])
    (_, report), gradient = jax.eval_shape(lambda: gradient_fn(params, first, dropout_key, config))
    # From zero, rather than from the first part: the compiler then sees one part, not two.
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (gradient, report))
    # Gradients of convolutions inside a loop are a hundred times slower on CPUs.
    unroll = parts if partitioning.platform() == "cpu" else 1
    (gradient, report), _ = jax.lax.scan(add, nothing, examples, unroll=unroll)
    mean = {name: report[name] / parts for name in ("loss", "x0_mse")}
    return jax.tree.map(lambda g: g / parts, gradient), {**report, **mean}
