"""Replays a training step whose loss or gradient was not finite.

Training resumes from the newest checkpoint before that step, up to the step, which is then
evaluated on its batch. The batch is read again and compared with the hashes of the run. A
reproduced fault is due to data or weights and is reported per example and per block; one that is
not reproduced points to the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import process
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.partitioning import place_batch
from imagen_jax.stages.loss import DROPOUT_STREAM, loss_given_randomness, sample_randomness
from imagen_jax.training import faults
from imagen_jax.training.batch_streams import Batches, Encode
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.initial_state import abstract_state, first_state
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.restore import CheckpointError
from imagen_jax.training.step import (
    block_norms,
    gradient_of_batch,
    jit_train_step,
    step_key,
    with_targets,
)


def replay(
    config: Config,
    workdir: str,
    step: int,
    batches: Batches,
    log: Callable[[str], None] = print,
    *,
    encode: Encode = lambda batch: batch,
) -> bool:
    """Evaluates step `step` again and logs loss per example and gradient norm per block.

    Args:
      config: configuration of the run.
      workdir: folder of the run.
      step: a fault saved in WORKDIR/faults.
      batches: the run's batches with all rows; read from the checkpoint's step to the fault.
      log: called with each line.
      encode: as in `train`.

    Returns:
      Whether the fault is reproduced.

    Raises:
      DivergedError: no fault is saved for this step.
      CheckpointError: the checkpoint cannot be read.
    """
    values = faults.read(workdir, step)
    mesh = partitioning.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        create, abstract = abstract_state(config, optimizer, mesh)
        checkpoints = Checkpoints(workdir, config.checkpoint)
        # Later checkpoints are of other data, if the fault made the run roll back.
        rollbacks = int(values.get("rollbacks", 0))
        later = faults.read_rollbacks(workdir)[rollbacks:]
        last = min([step, *(back.restored for back in later)])
        found = checkpoints.read(
            lambda steps: max((saved for saved in steps if saved <= last), default=None),
            lambda saved: (saved, checkpoints.restore(saved, abstract)),
        )
        start, state = found or (0, first_state(config, create, abstract, optimizer, log))
        log(f"training from step {start} to step {step}")
        train_step = jit_train_step(config, optimizer, abstract, mesh, rollbacks=rollbacks)
        stream = iter(batches(start + values.get("position", step) - step))
        for _ in range(start, step):
            batch = place_batch(_next(stream, step), mesh, config.data.batch_size)
            state, _ = train_step(state, encode(batch))
        batch = _next(stream, step)
        _compare(batch, values, log)
        batch = encode({name: jnp.asarray(array) for name, array in batch.items()})
        return _examine(config, state.params, batch, values, log)


def _next(stream: Iterator[Mapping[str, np.ndarray]], step: int) -> Mapping[str, np.ndarray]:
    for batch in stream:
        return batch
    raise CheckpointError(f"the batches end before step {step}")


def _compare(
    batch: Mapping[str, np.ndarray], values: Mapping[str, Any], log: Callable[[str], None]
) -> None:
    """Logs the rows whose data differ from those of the run: data that changed, or bad memory."""
    for name, saved in values["batch"].items():
        for row, expected, norm in zip(values["rows"], saved["sha256"], saved["norm"], strict=True):
            if faults.hash_row(batch[name][row]) != expected:
                log(f"row {row}: {name} differs from the run's, whose norm was {norm}")


def _examine(
    config: Config,
    params: Any,
    batch: Mapping[str, jax.Array],
    values: Mapping[str, Any],
    log: Callable[[str], None],
) -> bool:
    """Logs loss per example and gradient norm per block; True if any value is not finite."""
    step = int(values["step"])
    key = step_key(config, step, values.get("rollbacks", 0))
    randomness = sample_randomness(key, len(batch["image"]), config)
    examples = with_targets({**batch, **randomness}, config)
    dropout_key = jax.random.fold_in(key, DROPOUT_STREAM)
    single = jax.jit(lambda part: loss_given_randomness(params, part, dropout_key, config)[0])
    records = values.get("records", range(len(batch["image"])))
    logsnr = process.logsnr_at(examples["time"], config.diffusion)
    bad = False
    for index, record in enumerate(records):
        loss = float(single({name: value[index : index + 1] for name, value in examples.items()}))
        bad |= not np.isfinite(loss)
        inputs = {
            name: bool(np.isfinite(array[index]).all())
            for name, array in batch.items()
            if name != "teacher"
        }
        non_finite = [name for name, finite in inputs.items() if not finite]
        note = f"  not finite in the batch: {', '.join(non_finite)}" if non_finite else ""
        log(f"record {record}  logsnr {float(logsnr[index]):.2f}  loss {loss:.4g}{note}")
    gradient, report = gradient_of_batch(params, batch, key, config)
    for name, norm in block_norms(gradient).items():
        bad |= not np.isfinite(norm)
        log(f"{name}  gradient norm {float(norm):.4g}, in the run {values['block_norms'][name]}")
    bad |= not np.isfinite(float(report["loss"]))
    log(
        "reproduced: the cause is the data or the weights"
        if bad
        else "not reproduced: all values are finite, so suspect the hardware"
    )
    return bad
