"""What a training run is made of between two steps: a plain pytree, no functions, no randomness."""

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
    """State of a run; the same tree also carries its shapes or shardings in place of arrays.

    Attributes:
      step: int32 scalar, updates tried so far; also the position in the data stream and in every
        random stream.
      params: float32 parameters.
      ema: float32 averages of the parameters by name (`ema.names`).
      opt_state: state of the optimizer.
      skipped: int32 scalar, updates that were skipped because loss or gradient was not finite.
    """

    step: Any
    params: Any
    ema: dict[str, Any]
    opt_state: Any
    skipped: Any


def create_state(
    params: Any, optimizer: optax.GradientTransformation, averages: Sequence[str] = ("ema",)
) -> TrainState:
    """The state at step 0; `averages` names the averages of the parameters that are kept."""
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
    """Shardings of a whole TrainState: averages and optimizer slots lie as their parameters do.

    Adafactor's factored slots lie along the axes they have left.

    Args:
      abstract: shapes of the state.
      boxed: abstract parameters with their logical axis names.
      optimizer: the one that made `abstract.opt_state`.
      mesh: from `partitioning.make_mesh`, or one that is only planned.
    """
    params = partitioning.param_shardings(boxed, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def slot(leaf: Any, sharding: NamedSharding, param: Any) -> NamedSharding:
        return partitioning.slot_sharding(leaf.shape, param.shape, sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        slot,
        abstract.opt_state,
        params,
        abstract.params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(
        step=whole,
        params=params,
        ema=dict.fromkeys(abstract.ema, params),
        opt_state=opt_state,
        skipped=whole,
    )
