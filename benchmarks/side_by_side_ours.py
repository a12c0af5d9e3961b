"""This side of `side_by_side`: the imported U-Net's forward pass and train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting

from imagen_jax.config.schema import MeshConfig, ModelConfig
from imagen_jax.models.conditioning import cosine_steps
from imagen_jax.models.unet import UNet
from imagen_jax.parallel import flops, partitioning

Model = tuple[ModelConfig, Any]


def _arrays(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What our network takes: logsnr instead of steps, and a mask."""
    return {
        "z": given["z"],
        "logsnr": cosine_steps().astype(np.float32)[given["step"]],
        "text_emb": given["text"],
        "text_mask": np.ones(given["text"].shape[:2], bool),
        "target": given["target"],
    }


def _network(config: ModelConfig, dtype: str) -> Callable[..., jax.Array]:
    net = UNet(dataclasses.replace(config, dtype=dtype, remat="none"))

    def forward(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        words = (batch["text_emb"], batch["text_mask"])
        return net.apply({"params": params}, batch["z"], batch["logsnr"], *words)

    return forward


def _loss(forward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def loss(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        out = forward(params, batch)[..., :3].astype(jnp.float32)
        return jnp.mean((out - batch["target"]) ** 2)

    return loss


def output_and_loss(
    model: Model, given: Mapping[str, np.ndarray], dtype: str
) -> tuple[np.ndarray, float]:
    """The network's output [B, H, W, C] and its loss."""
    forward, batch = _network(model[0], dtype), _arrays(given)
    out = jax.jit(forward)(model[1], batch)
    return np.asarray(out, np.float32), float(jax.jit(_loss(forward))(model[1], batch))


class Runner:
    """One thing to time: `call()` gives what does it once and waits for the end.

    Attributes:
      cost: FLOPs of a call counted from the trace, and what the compiler says of it.
      program: HLO of the call.
    """

    def __init__(self, what: str, model: Model, given: Mapping[str, np.ndarray], dtype: str):
        self._what, self._model = what, model
        self._forward = _network(model[0], dtype)
        self._dtype, self._batch = dtype, _arrays(given)
        self.cost: dict[str, float] = {}
        self.program = ""

    def call(self) -> Callable[[], Any]:
        """The call on the first device."""
        mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
        everywhere = partitioning.everywhere(mesh)
        with jax.set_mesh(mesh):
            batch = jax.device_put(self._batch, partitioning.batch_sharding(mesh))
            if self._what == "forward":
                kept = jax.tree.map(lambda p: jnp.asarray(p, self._dtype), self._model[1])
                kept = jax.device_put(kept, everywhere)
                traced = jax.jit(self._forward).trace(kept, batch)
                compiled = traced.lower().compile(partitioning.forward_options())
                call = lambda: jax.block_until_ready(compiled(kept, batch))  # noqa: E731
            else:
                call, traced, compiled = self._train(batch, everywhere)
        self.cost = {"flops": flops.count(traced.jaxpr), **reporting.compiler_says(compiled)}
        self.program = compiled.as_text()
        return call

    def _train(self, batch: Any, everywhere: Any) -> tuple[Callable[[], Any], Any, Any]:
        optimizer = optax.adam(1e-4)
        loss = _loss(self._forward)

        def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, slots = state
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, slots = optimizer.update(gradient, slots, params)
            return (optax.apply_updates(params, updates), slots), value

        # A copy: the old state's memory may be given away.
        params = jax.device_put(jax.tree.map(jnp.array, self._model[1]), everywhere)
        state = (params, jax.device_put(optimizer.init(params), everywhere))
        lies = (jax.tree.map(lambda leaf: leaf.sharding, state), everywhere)
        donated = partitioning.donated(0)
        traced = jax.jit(step, donate_argnums=donated, out_shardings=lies).trace(state, batch)
        compiled = traced.lower().compile(partitioning.train_step_options())

        def call() -> Any:
            nonlocal state
            state, value = compiled(state, batch)
            return jax.block_until_ready((state, value))

        return call, traced, compiled
