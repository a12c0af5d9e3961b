"""The first state of a run: random, or with the parameters of a stage folder or another run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.config.train import CheckpointConfig
from imagen_jax.interop import weights
from imagen_jax.interop.weights import flatten, unflatten
from imagen_jax.parallel import partitioning
from imagen_jax.stages import folder, lora
from imagen_jax.stages.network import boxed_shapes, init_params
from imagen_jax.training import ema, restore, workdirs
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.state import TrainState, create_state, state_shardings
from imagen_jax.training.step import INIT_STREAM
from imagen_jax.training.trainable import patterns


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[Callable[[], TrainState], TrainState]:
    """A function that creates the first state, and its shapes with shardings; allocates nothing."""
    key = jax.random.fold_in(jax.random.key(config.seed), INIT_STREAM)
    boxed = boxed_shapes(config)

    def create() -> TrainState:
        params = partitioning.unbox(init_params(config, key))
        return create_state(params, optimizer, ema.names(config.ema), patterns(config))

    shapes = jax.eval_shape(create)
    shardings = state_shardings(shapes, boxed, optimizer, mesh, patterns(config))
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    options = partitioning.FAST_COMPILE_OPTIONS
    return jax.jit(create, out_shardings=shardings, compiler_options=options), abstract


def first_state(
    config: Config,
    create: Callable[[], TrainState],
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    log: Callable[[str], None] = lambda line: None,
) -> TrainState:
    """The state before the first step: random, or with the parameters of `train.init_from`.

    A student starts from its teacher.

    Args:
      config: of the run.
      create: from `abstract_state`.
      abstract: from `abstract_state`.
      optimizer: of the run.
      log: as in `start_from`, whose errors it raises.
    """
    start = config.train.init_from or config.distill.teacher
    if not start:
        return create()
    with workdirs.local(start) as path:

        def say(line: str) -> None:
            log(line.replace(path, start))

        return start_from(path, abstract, optimizer, config, say)


def start_from(
    path: str,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    config: Config | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> TrainState:
    """The first state with parameters of elsewhere, which also initialise its averages.

    Every process reads the shards of its own devices.

    Args:
      path: stage folder, or workdir of a run, whose newest moving average is read.
      abstract: shapes and shardings of the state.
      optimizer: of the run.
      config: of the run; None: all parameters are trained and must be there.
      log: called with one line for every parameter that is not read.

    Raises:
      StageError: it is neither. WeightsError: it is of another network. CheckpointError: the run
        has no checkpoint that can be read. ConfigError: there is no optimizer state to keep.
    """
    checkpoints = Checkpoints(path, CheckpointConfig())
    step = json.loads(restore.from_first(lambda: json.dumps(checkpoints.latest_step())))
    expected, read = flatten(abstract.params), {}
    if step is None:
        stored = flatten(folder.load_stage(path).params)
    else:
        stored = flatten(checkpoints.shapes(step)["params"])
    wanted = _common(path, stored, expected, config, log)
    if step is None:
        read = {name: place(stored[name], expected[name]) for name in wanted}
    elif wanted:
        read = flatten(checkpoints.restore_ema(step, unflatten({k: expected[k] for k in wanted})))
    if len(read) < len(expected) and config is not None:
        read |= _random(config, {name: expected[name] for name in expected.keys() - read.keys()})
    trainable = patterns(config) if config else ()
    create = jax.jit(
        lambda params: create_state(params, optimizer, tuple(abstract.ema), trainable),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        donate_argnums=partitioning.donated(0),
        compiler_options=partitioning.FAST_COMPILE_OPTIONS,
    )
    # The parameters are the only other copy, and they are donated.
    state = create(unflatten({name: read[name] for name in expected}))
    if config is None or config.train.init_optimizer == "reset":
        return state
    return dataclasses.replace(state, opt_state=_optimizer_of(checkpoints, path, step, abstract))


def _common(
    path: str,
    stored: Mapping[str, Any],
    expected: Mapping[str, Any],
    config: Config | None,
    log: Callable[[str], None],
) -> list[str]:
    """Names of the parameters to read; logs the others. Raises WeightsError if all must fit."""
    found, shapes = (
        {name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (stored, expected)
    )
    if not any(name.startswith(f"{lora.GROUP}/") for name in found):
        shapes = {k: v for k, v in shapes.items() if not k.startswith(f"{lora.GROUP}/")}
    if config is None or not config.train.init_partial:
        weights.check_parameters(
            f"config.train.init_from={path} (config.train.init_partial=false)", found, shapes
        )
    common = [name for name in shapes if found.get(name) == shapes[name]]
    for name in sorted(shapes.keys() - set(common)):
        reason = f"is {found[name]} in {path}" if name in found else f"is not in {path}"
        log(f"init_from: {name} {shapes[name]} starts at random: it {reason}")
    for name in sorted(found.keys() - shapes.keys()):
        log(f"init_from: {name} {found[name]} of {path} is not used: the network has none")
    return common


def _random(config: Config, expected: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Some of the random first parameters, by path; the others are not computed."""
    key = jax.random.fold_in(jax.random.key(config.seed), INIT_STREAM)

    def create() -> dict[str, jax.Array]:
        flat = flatten(partitioning.unbox(init_params(config, key)))
        return {name: flat[name] for name in expected}

    shardings = {name: leaf.sharding for name, leaf in expected.items()}
    options = partitioning.FAST_COMPILE_OPTIONS
    return jax.jit(create, out_shardings=shardings, compiler_options=options)()


def place(array: Any, like: Any) -> jax.Array:
    """An array of a stage folder; its file is mapped, and a process reads its shards of it."""
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: np.asarray(array[index], like.dtype)
    )


def _optimizer_of(
    checkpoints: Checkpoints, path: str, step: int | None, abstract: TrainState
) -> Any:
    """The optimizer state of a run, with its schedule at the start. Raises ConfigError."""
    what = f"config.train.init_optimizer='kept' with config.train.init_from={path}"
    if step is None:
        raise ConfigError(f"{what}: a stage folder has no optimizer state; give a workdir")
    saved = jax.tree.leaves(checkpoints.shapes(step)["opt_state"])
    if [tuple(leaf.shape) for leaf in saved] != [
        tuple(leaf.shape) for leaf in jax.tree.leaves(abstract.opt_state)
    ]:
        raise ConfigError(
            f"{what}: it needs the same optimizer, trained parameters and shapes as that run"
        )
    kept = checkpoints.restore_optimizer(step, abstract.opt_state)
    is_schedule = lambda part: isinstance(part, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(
        lambda part: jax.tree.map(jnp.zeros_like, part) if is_schedule(part) else part,
        kept,
        is_leaf=is_schedule,
    )
