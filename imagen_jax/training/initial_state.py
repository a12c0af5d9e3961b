"""The first state of a run: random, or with the parameters of a stage folder."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from imagen_jax.config.schema import Config
from imagen_jax.interop import weights
from imagen_jax.parallel import partitioning
from imagen_jax.stages import folder
from imagen_jax.stages.network import init_params
from imagen_jax.training import ema
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
    """The first state with the parameters of a stage folder, which also initialise its averages.

    Args:
      path: stage folder.
      abstract: shapes and shardings of the state.
      optimizer: of the run.

    Raises:
      StageError: it is no stage folder. WeightsError: it is of another network.
    """
    params = folder.load_stage(path).params
    found, expected = (
        {name: leaf.shape for name, leaf in weights.flatten(tree).items()}
        for tree in (params, abstract.params)
    )
    weights.check_parameters(f"config.train.init_from={path}", found, expected)
    place = lambda new, like: jax.device_put(new, like.sharding)  # noqa: E731
    create = jax.jit(
        lambda params: create_state(params, optimizer, tuple(abstract.ema)),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        donate_argnums=partitioning.donated(0),
        compiler_options=partitioning.FAST_COMPILE_OPTIONS,
    )
    # The placed parameters are the only other copy, and they are donated.
    return create(jax.tree.map(place, params, abstract.params))
