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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """State of a run; leaves are arrays, or their shapes or shardings.

    Attributes:
      step: int32 scalar, number of attempted updates; determines the batch and all random values.
      params: float32 parameters.
      ema: float32 averages of the parameters by name (`ema.names`).
      opt_state: state of the optimizer.
      skipped: int32 scalar, number of updates skipped because of non-finite loss or gradient.
    """

    step: Any
    params: Any
    ema: dict[str, Any]
    opt_state: Any
    skipped: Any


def create_state(
    params: Any, optimizer: optax.GradientTransformation, averages: Sequence[str] = ("ema",)
) -> TrainState:
    """The state at step 0 with one copy of `params` for every name in `averages`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={name: jax.tree.map(jnp.copy, params) for name in averages},
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
    )


def state_shardings(
    abstract: TrainState,
    boxed: Any,
    optimizer: optax.GradientTransformation,
    mesh: partitioning.AnyMesh,
) -> TrainState:
    """Shardings of a TrainState: averages and optimizer slots are sharded like their parameters.

    Adafactor's factored slots keep the sharding of the axes that remain.

    Args:
      abstract: shapes of the state.
      boxed: abstract parameters with their logical axis names.
      optimizer: the optimizer of `abstract.opt_state`.
      mesh: from `partitioning.make_mesh`, or an abstract one for planning.
    """
    params = partitioning.param_shardings(boxed, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def slot(leaf: Any, sharding: NamedSharding, param: Any) -> NamedSharding:
        return partitioning.slot_sharding(leaf.shape, param.shape, sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        slot,
        abstract.opt_state,
        params,
        abstract.params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(
        step=replicated,
        params=params,
        ema=dict.fromkeys(abstract.ema, params),
        opt_state=opt_state,
        skipped=replicated,
    )
