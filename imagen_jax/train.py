"""Training of one stage. READ FIRST: the whole life of a run, top to bottom.

A run is a pure function of its configuration: the batch of a step, its noise and its dropped
captions follow from (seed, step) alone, so that a run that was killed goes on exactly as if it had
not been. State lives in one pytree (`train_state.TrainState`), laid over a mesh of devices; the
step is one jitted function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, UInt8

from imagen_jax import cascade, config_io, ema, images, metrics, partitioning, stage, train_state
from imagen_jax.checkpoint import Checkpoints
from imagen_jax.config import Config
from imagen_jax.optimizer import learning_rate, make_optimizer
from imagen_jax.train_state import TrainState

# Streams of randomness; a key is fold_in(fold_in(key(seed), STREAM), step).
INIT_STREAM, STEP_STREAM = 0, 1

StepFn = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]
# A source of batches: first step wanted -> that step's batch and all that follow.
Batches = Callable[[int], Iterable[Mapping[str, np.ndarray]]]


def make_train_step(config: Config, optimizer: optax.GradientTransformation) -> StepFn:
    """The update of one step: (state, batch) -> (state, metrics). Pure; jit it with donation.

    An update whose loss or gradient is not finite is skipped and counted in `state.skipped`.
    """

    def train_step(
        state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        stream = jax.random.fold_in(jax.random.key(config.seed), STEP_STREAM)
        key = jax.random.fold_in(stream, state.step)
        gradient_fn = jax.value_and_grad(stage.loss_fn, has_aux=True)
        (_, report), gradient = gradient_fn(state.params, batch, key, config)

        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema.decay_at(state.step, config.ema)
        averages = {name: ema.update(a, params, decay) for name, a in state.ema.items()}

        grad_norm = optax.tree.norm(gradient)
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
        return state, {**report, "grad_norm": grad_norm, "skipped": state.skipped}

    return train_step


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[Callable[[], TrainState], TrainState]:
    """How to make the first state, and its shapes with their shardings; nothing is allocated."""
    key = jax.random.fold_in(jax.random.key(config.seed), INIT_STREAM)
    boxed = jax.eval_shape(lambda: stage.init_params(config, key))

    def create() -> TrainState:
        return train_state.create(partitioning.unbox(stage.init_params(config, key)), optimizer)

    shapes = jax.eval_shape(create)
    shardings = train_state.shardings(shapes, boxed, optimizer, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    options = partitioning.RUN_ONCE
    return jax.jit(create, out_shardings=shardings, compiler_options=options), abstract


def train(
    config: Config,
    workdir: str,
    batches: Batches,
    log: Callable[[str], None] = print,
) -> TrainState:
    """Trains one stage to `config.train.steps`; goes on from the newest checkpoint if there is one.

    Args:
      config: the stage; `config.model.text_dim` must be set.
      workdir: folder of checkpoints, metrics.jsonl and TensorBoard files.
      batches: the stream; `batches(step)` starts at that step.
      log: receives the progress lines.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: mesh or batch do not fit the devices.
      CheckpointError: the newest checkpoint cannot be read or is of another model.
    """
    mesh = partitioning.make_mesh(config.mesh)
    partitioning.check_batch_size(config.data.batch_size, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    rate = learning_rate(config.optimizer, config.train.steps)

    with jax.set_mesh(mesh):
        create, abstract = abstract_state(config, optimizer, mesh)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        log(f"{config.name}: {count:,} parameters on {mesh.devices.size} {jax.default_backend()}")

        checkpoints = Checkpoints(workdir, config.checkpoint)
        start = checkpoints.latest_step()
        state = create() if start is None else checkpoints.restore(start, abstract)
        start = start or 0
        if start:
            log(f"going on from step {start}")

        train_step = jax.jit(
            make_train_step(config, optimizer),
            donate_argnums=0,
            compiler_options=partitioning.train_step_options(),
        )
        writer = metrics.MetricWriter(workdir, start)
        progress = metrics.Progress(config.train.steps, config.data.batch_size, log)
        stream = iter(batches(start)) if start < config.train.steps else iter(())
        try:
            for step, batch in zip(range(start, config.train.steps), stream, strict=False):
                placed = partitioning.place_batch(batch, mesh)
                with jax.transfer_guard("disallow"):
                    state, report = train_step(state, placed)
                done = step + 1
                if step == start:
                    jax.block_until_ready(report)
                    progress.start(done)
                if done % config.train.log_every == 0 or done == config.train.steps:
                    values = {k: float(v) for k, v in jax.device_get(report).items()}
                    values["learning_rate"] = float(rate(step))
                    writer.write(done, progress.report(done, values))
                if config.train.sample_every and done % config.train.sample_every == 0:
                    writer.write_picture(done, "samples", preview(config, state, batch))
                if done % config.checkpoint.every == 0 or done == config.train.steps:
                    checkpoints.save(done, state, config)
        finally:
            _close(stream)
            writer.close()
            checkpoints.close()
    return state


def preview(
    config: Config, state: TrainState, batch: Mapping[str, np.ndarray]
) -> UInt8[np.ndarray, "h w 3"]:
    """A grid to look at: rows of real pictures, drawn by the EMA, drawn by the raw parameters.

    The captions are the batch's; an SR stage is given the true low-resolution pictures.
    """
    count = min(8, len(batch["image"]))
    part = {name: value[:count] for name, value in batch.items()}
    keys = cascade.picture_keys(config.seed, range(count), [0] * count)
    rows = [images.to_uint8(part["image"])]
    for params in (state.ema["ema"], state.params):
        drawn = cascade.sample_stage(
            params, config, part["text_emb"], part["text_mask"], keys, part.get("lowres")
        )
        rows.append(images.to_uint8(np.asarray(drawn)))
    return images.grid(np.concatenate(rows), columns=count)


def with_text(config: Config, dim: int, fingerprint: Mapping[str, Any]) -> Config:
    """`config` with what its embeddings say of themselves: their width and their encoder."""
    text = dataclasses.replace(config.text, fingerprint=config_io.fingerprint(dict(fingerprint)))
    model = dataclasses.replace(config.model, text_dim=dim)
    return dataclasses.replace(config, model=model, text=text)


def _close(stream: Iterator) -> None:
    if hasattr(stream, "close"):
        stream.close()
