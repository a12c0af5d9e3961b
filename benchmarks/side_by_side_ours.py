"""JAX side of `side_by_side`: forward pass and train step of the imported U-Net."""

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
from imagen_jax.diffusion.process import cosine_steps
from imagen_jax.models.unet import UNet
from imagen_jax.parallel import flops, partitioning

Model = tuple[ModelConfig, Any]


def _arrays(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of our network: logsnr instead of steps, and a text mask."""
    return {
        "z": inputs["z"],
        "logsnr": cosine_steps().astype(np.float32)[inputs["step"]],
        "text_emb": inputs["text"],
        "text_mask": np.ones(inputs["text"].shape[:2], bool),
        "target": inputs["target"],
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
    model: Model, inputs: Mapping[str, np.ndarray], dtype: str
) -> tuple[np.ndarray, float]:
    """Output [B, H, W, C] and loss of the network."""
    forward, batch = _network(model[0], dtype), _arrays(inputs)
    out = jax.jit(forward)(model[1], batch)
    return np.asarray(out, np.float32), float(jax.jit(_loss(forward))(model[1], batch))


class Runner:
    """A program to time; `call()` returns a function that runs it once and waits for its end.

    Attributes:
      cost: FLOPs of a call counted from the trace, and the compiler's FLOPs and peak bytes.
      program: HLO of the program.
    """

    def __init__(self, what: str, model: Model, inputs: Mapping[str, np.ndarray], dtype: str):
        self._what, self._model = what, model
        self._forward = _network(model[0], dtype)
        self._dtype, self._batch = dtype, _arrays(inputs)
        self.cost: dict[str, float] = {}
        self.program = ""

    def call(self) -> Callable[[], Any]:
        """Compiles the program for the first device."""
        mesh = partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
        replicated = partitioning.replicated(mesh)
        with jax.set_mesh(mesh):
            batch = jax.device_put(self._batch, partitioning.batch_sharding(mesh))
            if self._what == "forward":
                params = jax.tree.map(lambda p: jnp.asarray(p, self._dtype), self._model[1])
                params = jax.device_put(params, replicated)
                traced = jax.jit(self._forward).trace(params, batch)
                compiled = traced.lower().compile(partitioning.forward_options())
                call = lambda: jax.block_until_ready(compiled(params, batch))  # noqa: E731
            else:
                call, traced, compiled = self._train(batch, replicated)
        self.cost = {"flops": flops.count(traced.jaxpr), **reporting.compiler_says(compiled)}
        self.program = compiled.as_text()
        return call

    def _train(self, batch: Any, replicated: Any) -> tuple[Callable[[], Any], Any, Any]:
        optimizer = optax.adam(1e-4)
        loss = _loss(self._forward)

        def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, slots = state
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, slots = optimizer.update(gradient, slots, params)
            return (optax.apply_updates(params, updates), slots), value

        # A copy, because the state is donated.
        params = jax.device_put(jax.tree.map(jnp.array, self._model[1]), replicated)
        state = (params, jax.device_put(optimizer.init(params), replicated))
        shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated)
        donated = partitioning.donated(0)
        jitted = jax.jit(step, donate_argnums=donated, out_shardings=shardings)
        traced = jitted.trace(state, batch)
        compiled = traced.lower().compile(partitioning.train_step_options())

        def call() -> Any:
            nonlocal state
            state, value = compiled(state, batch)
            return jax.block_until_ready((state, value))

        return call, traced, compiled
