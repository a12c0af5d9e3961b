"""A second look at a training step whose loss or gradient was not finite.

The state before that step follows from the newest checkpoint before it and the stream of batches;
the step itself is run on the batch that was written down. A fault that comes again lies in data or
weights and is shown example by example and block by block; one that does not was the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import process
from imagen_jax.parallel import partitioning
from imagen_jax.stages import stage
from imagen_jax.training import faults
from imagen_jax.training.checkpoint import CheckpointError, Checkpoints
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.step import block_norms, gradient_of_batch, jit_train_step, step_key
from imagen_jax.training.train import Batches, Encode, abstract_state


def replay(
    config: Config,
    workdir: str,
    step: int,
    batches: Batches,
    log: Callable[[str], None] = print,
    *,
    encode: Encode = lambda batch: batch,
) -> bool:
    """Runs step `step` again and prints what it finds.

    Args:
      config: of the run.
      workdir: of the run.
      step: a fault listed in WORKDIR/faults.
      batches: the stream; asked for the steps between the checkpoint and the fault.
      log: receives the lines.
      encode: as `train` has it.

    Returns:
      Whether the fault came again.

    Raises:
      DivergedError: there is no such fault.
      CheckpointError: a checkpoint cannot be read.
    """
    values, batch = faults.read(workdir, step)
    mesh = partitioning.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        create, abstract = abstract_state(config, optimizer, mesh)
        checkpoints = Checkpoints(workdir, config.checkpoint)
        known = [saved for saved in checkpoints.steps() if saved <= step]
        start = max(known, default=0)
        state = checkpoints.restore(start, abstract) if known else create()
        checkpoints.close()
        log(f"from step {start} on to step {step}")
        train_step = jit_train_step(config, optimizer, abstract, mesh)
        for between, other in zip(range(start, step), batches(start), strict=False):
            del between
            state, _ = train_step(state, encode(partitioning.place_batch(other, mesh)))
        if int(state.step) != step:
            raise CheckpointError(f"the stream of batches ended before step {step}")
        batch = encode({name: jnp.asarray(array) for name, array in batch.items()})
        return _examine(config, state.params, batch, values, log)


def _examine(
    config: Config,
    params: Any,
    batch: Mapping[str, jax.Array],
    values: Mapping[str, Any],
    log: Callable[[str], None],
) -> bool:
    """Prints loss by example and gradient norm by block; True if something is not finite."""
    step = int(values["step"])
    key = step_key(config, step)
    drawn = {**batch, **stage.draw(key, len(batch["image"]), config)}
    dropout_key = jax.random.fold_in(key, stage.DROPOUT_STREAM)
    single = jax.jit(lambda part: stage.loss_given_randomness(params, part, dropout_key, config)[0])
    records = values.get("records", range(len(batch["image"])))
    logsnr = process.logsnr_at(drawn["time"], config.diffusion)
    bad = False
    for index, record in enumerate(records):
        loss = float(single({name: value[index : index + 1] for name, value in drawn.items()}))
        bad |= not np.isfinite(loss)
        inputs = {name: bool(np.isfinite(array[index]).all()) for name, array in batch.items()}
        wrong = [name for name, finite in inputs.items() if not finite]
        note = f"  not finite in the batch: {', '.join(wrong)}" if wrong else ""
        log(f"record {record}  logsnr {float(logsnr[index]):.2f}  loss {loss:.4g}{note}")
    gradient, report = gradient_of_batch(params, batch, key, config)
    for name, norm in block_norms(gradient).items():
        bad |= not np.isfinite(norm)
        log(f"{name}  gradient norm {float(norm):.4g}, then {values['block_norms'][name]}")
    bad |= not np.isfinite(float(report["loss"]))
    log("the fault came again" if bad else "all is finite now: it was not the data or the weights")
    return bad
