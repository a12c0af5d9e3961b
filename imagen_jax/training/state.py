"""State of a training run between two steps: a plain pytree without functions or PRNG keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from imagen_jax.parallel import partitioning
from imagen_jax.stages.parameters import merge, select


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """State of a run; leaves are arrays, or their shapes or shardings.

    Attributes:
      step: int32 scalar, number of attempted updates; determines the batch and all random values.
      params: float32 parameters, frozen ones included.
      ema: float32 averages of the trained parameters by name (`ema.names`).
      opt_state: state of the optimizer, for the trained parameters.
      skipped: int32 scalar, number of updates skipped because of non-finite loss or gradient.
    """

    step: Any
    params: Any
    ema: dict[str, Any]
    opt_state: Any
    skipped: Any


def evaluated_params(state: TrainState, average: str | None) -> Any:
    """The parameters of the whole network: an average by name, or the raw ones (None)."""
    return state.params if average is None else merge(state.params, state.ema[average])


def all_averages(state: TrainState) -> dict[str, Any]:
    """The averages with the frozen parameters, by name."""
    return {name: evaluated_params(state, name) for name in state.ema}


def create_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    averages: Sequence[str] = ("ema",),
    trainable: Sequence[str] = (),
) -> TrainState:
    """The state at step 0.

    Args:
      params: all parameters.
      optimizer: of the run.
      averages: names; there is one copy of the trained parameters for each.
      trainable: patterns of `train.trainable`.
    """
    trained = select(params, trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={name: jax.tree.map(jnp.copy, trained) for name in averages},
        opt_state=optimizer.init(trained),
        skipped=jnp.zeros((), jnp.int32),
    )


def state_shardings(
    abstract: TrainState,
    boxed: Any,
    optimizer: optax.GradientTransformation,
    mesh: partitioning.AnyMesh,
    trainable: Sequence[str] = (),
) -> TrainState:
    """Shardings of a TrainState: averages and optimizer slots are sharded like their parameters.

    Adafactor's factored slots keep the sharding of the axes that remain.

    Args:
      abstract: shapes of the state.
      boxed: abstract parameters with their logical axis names.
      optimizer: the optimizer of `abstract.opt_state`.
      mesh: from `partitioning.make_mesh`, or an abstract one for planning.
      trainable: patterns of `train.trainable`.
    """
    params = partitioning.param_shardings(boxed, mesh)
    trained = select(params, trainable)
    replicated = NamedSharding(mesh, PartitionSpec())

    def slot(leaf: Any, sharding: NamedSharding, param: Any) -> NamedSharding:
        return partitioning.slot_sharding(leaf.shape, param.shape, sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        slot,
        abstract.opt_state,
        trained,
        select(abstract.params, trainable),
        transform_non_params=lambda _: replicated,
    )
    return TrainState(
        step=replicated,
        params=params,
        ema=dict.fromkeys(abstract.ema, trained),
        opt_state=opt_state,
        skipped=replicated,
    )
