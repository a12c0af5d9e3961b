"""The first state of a run: random, or with the parameters of a stage folder or another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from imagen_jax.config.schema import Config
from imagen_jax.config.train import CheckpointConfig
from imagen_jax.interop import weights
from imagen_jax.parallel import partitioning
from imagen_jax.stages import folder
from imagen_jax.stages.network import init_params
from imagen_jax.training import ema, restore
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.state import TrainState, create_state, state_shardings
from imagen_jax.training.step import INIT_STREAM


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[Callable[[], TrainState], TrainState]:
    """A function that creates the first state, and its shapes with shardings; allocates nothing."""
    key = jax.random.fold_in(jax.random.key(config.seed), INIT_STREAM)
    boxed = jax.eval_shape(lambda: init_params(config, key))

    def create() -> TrainState:
        params = partitioning.unbox(init_params(config, key))
        return create_state(params, optimizer, ema.names(config.ema))

    shapes = jax.eval_shape(create)
    shardings = state_shardings(shapes, boxed, optimizer, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    options = partitioning.FAST_COMPILE_OPTIONS
    return jax.jit(create, out_shardings=shardings, compiler_options=options), abstract


def start_from(
    path: str, abstract: TrainState, optimizer: optax.GradientTransformation
) -> TrainState:
    """The first state with parameters of elsewhere, which also initialise its averages.

    Every process reads the shards of its own devices.

    Args:
      path: stage folder, or workdir of a run, whose newest moving average is read.
      abstract: shapes and shardings of the state.
      optimizer: of the run.

    Raises:
      StageError: it is neither. WeightsError: it is of another network. CheckpointError: the run
        has no checkpoint that can be read.
    """
    params = _read_average(path, abstract) or _read_stage(path, abstract)
    create = jax.jit(
        lambda params: create_state(params, optimizer, tuple(abstract.ema)),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        donate_argnums=partitioning.donated(0),
        compiler_options=partitioning.FAST_COMPILE_OPTIONS,
    )
    # The parameters are the only other copy, and they are donated.
    return create(params)


def _read_stage(path: str, abstract: TrainState) -> Any:
    """Parameters of a stage folder; its file is mapped, and a process reads its shards of it."""
    params = folder.load_stage(path).params
    _check_names(path, params, abstract)

    def place(array: Any, like: Any) -> jax.Array:
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: np.asarray(array[index], like.dtype)
        )

    return jax.tree.map(place, params, abstract.params)


def _read_average(path: str, abstract: TrainState) -> Any:
    """The newest moving average of a run; None if `path` is no workdir."""
    checkpoints = Checkpoints(path, CheckpointConfig())
    step = json.loads(restore.from_first(lambda: json.dumps(checkpoints.latest_step())))
    if step is None:
        return None
    _check_names(path, checkpoints.shapes(step)["ema"]["ema"], abstract)
    return checkpoints.restore_ema(step, abstract.params)


def _check_names(path: str, params: Any, abstract: TrainState) -> None:
    """Raises WeightsError unless names and shapes of the parameters are those of the network."""
    found, expected = (
        {name: tuple(leaf.shape) for name, leaf in weights.flatten(tree).items()}
        for tree in (params, abstract.params)
    )
    weights.check_parameters(f"config.train.init_from={path}", found, expected)
