"""LoRA: low-rank updates of a network's kernels, W + scale A B (Hu et al. 2022, Eq. 3).

While it is trained, A and B are parameters of the stage beside its own, under `lora/`, and
`network.apply` adds the updates to the kernels: a convolution's update is one of the same size to
`rank` channels, then one of 1x1. An `Adapter` holds A and B of a trained one apart from its stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.lora import LoraConfig
from imagen_jax.interop.weights import WeightsError, flatten, unflatten
from imagen_jax.parallel import partitioning
from imagen_jax.stages.parameters import matches
from imagen_jax.stages.stage import Stage

GROUP = "lora"


class Factors(NamedTuple):
    """One update, a b.

    Attributes:
      a: [in, r], or [h, w, in, r] of a convolution.
      b: [r, out].
    """

    a: Any
    b: Any


# Path of a kernel -> its update, the scale included.
Adapter = Mapping[str, Factors]


def init(config: LoraConfig, boxed: Any, key: Key[Array, ""]) -> dict[str, Any]:
    """First A, uniform in +-fan_in**-0.5 as in peft, and B, zero; boxed like their kernels.

    Args:
      config: rank and targets.
      boxed: parameters of the network with their logical axis names.
      key: for A.

    Raises:
      ConfigError: a target matches no kernel.
    """
    kernels = {
        path.removesuffix("/kernel"): leaf
        for path, leaf in flatten(boxed).items()
        if path.endswith("/kernel")
    }
    for pattern in config.targets:
        if not any(matches(path, pattern) for path in kernels):
            groups = ", ".join(sorted({path.split("/")[0] for path in kernels}))
            raise ConfigError(f"config.lora.targets: {pattern!r} matches no kernel of {groups}")
    tree: dict[str, Any] = {}
    for index, (path, leaf) in enumerate(sorted(kernels.items())):
        if not any(matches(path, pattern) for pattern in config.targets):
            continue
        *inputs, outputs = partitioning.unbox(leaf).shape
        limit = math.prod(inputs) ** -0.5
        shape, own_key = (*inputs, config.rank), jax.random.fold_in(key, index)
        a = jax.random.uniform(own_key, shape, minval=-limit, maxval=limit)
        b = jnp.zeros((config.rank, outputs))
        names_a, names_b = partitioning.factor_names(leaf)
        tree[f"{path}/a"] = partitioning.box(a, names_a)
        tree[f"{path}/b"] = partitioning.box(b, names_b)
    return unflatten(tree)


def merged(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The network's own parameters with the updates under `lora/` added."""
    base = {name: value for name, value in params.items() if name != GROUP}
    return _added(base, [(_factors(params[GROUP]), scale)])


def merged_stage(stage: Stage) -> Stage:
    """A stage without LoRA that samples the same; a stage without one as it is."""
    if GROUP not in stage.params:
        return stage
    config = dataclasses.replace(stage.config, lora=LoraConfig())
    return Stage(config, merged(stage.params, stage.config.lora.scale))


def adapter_of(stage: Stage) -> dict[str, Factors]:
    """The LoRA of a stage as NumPy arrays, its scale in b. Raises WeightsError: it has none."""
    if GROUP not in stage.params:
        raise WeightsError("the stage has no LoRA; train it with --config.lora.rank=8")
    scale = stage.config.lora.scale
    return {
        path: Factors(np.asarray(a, np.float32), np.asarray(b, np.float32) * np.float32(scale))
        for path, (a, b) in _factors(params=stage.params[GROUP]).items()
    }


def with_adapters(params: Any, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, Any]:
    """Parameters with a weighted sum of adapters added to the kernels.

    Args:
      params: of the network, without LoRA.
      adapters: each with its weight.

    Raises:
      WeightsError: an adapter is of another network.
    """
    return _added(params, adapters)


def check_fits(params: Any, adapter: Adapter) -> None:
    """Raises WeightsError where an adapter updates what the parameters do not have."""
    flat = flatten(params)
    for path, (a, b) in adapter.items():
        kernel, shape = flat.get(f"{path}/kernel"), (*a.shape[:-1], b.shape[-1])
        if kernel is None or tuple(kernel.shape) != shape or a.shape[-1] != b.shape[0]:
            found = "none" if kernel is None else tuple(kernel.shape)
            raise WeightsError(
                f"the LoRA is of another network: it updates {path}/kernel of shape {shape}, the "
                f"network has {found}"
            )


def _factors(params: Mapping[str, Any]) -> dict[str, Factors]:
    flat = flatten(params)
    paths = [path.removesuffix("/a") for path in flat if path.endswith("/a")]
    return {path: Factors(flat[f"{path}/a"], flat[f"{path}/b"]) for path in paths}


def _added(params: Any, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, Any]:
    flat = flatten(params)
    for adapter, weight in adapters:
        check_fits(params, adapter)
        for path, (a, b) in adapter.items():
            product = np.tensordot if isinstance(a, np.ndarray) else jnp.tensordot
            flat[f"{path}/kernel"] = flat[f"{path}/kernel"] + weight * product(a, b, 1)
    return unflatten(flat)
