"""Training of one stage. READ FIRST: the whole life of a run, top to bottom.

A run is a pure function of its configuration: the batch of a step, its noise and its dropped
captions are functions of (seed, step) and of the roll-backs so far (WORKDIR/rollbacks.json), so a
run that was killed continues exactly as if it had not been. The state is one pytree
(`state.TrainState`), sharded over a mesh of devices; the step is one jitted function
(`step.make_train_step`). Every process runs this loop, each with its part of every batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from etils import epath
from jaxtyping import Array

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
from imagen_jax.io import images
from imagen_jax.parallel import compiled, distributed, partitioning
from imagen_jax.parallel.checksums import Checksums
from imagen_jax.parallel.preemption import Preempted, Preemption
from imagen_jax.parallel.profiling import Profiler
from imagen_jax.stages.loss import check_trainable
from imagen_jax.stages.names import check_names
from imagen_jax.training import ema_snapshots, metrics
from imagen_jax.training.batch_streams import Batches, Encode, closing_stream
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.evaluations import Evaluations, Evaluator
from imagen_jax.training.faults import Faults, StepInfoFn
from imagen_jax.training.initial_state import abstract_state, first_state
from imagen_jax.training.optimizer import learning_rate, make_optimizer
from imagen_jax.training.ownership import owned
from imagen_jax.training.preview import preview
from imagen_jax.training.save_time import SaveTime
from imagen_jax.training.start_checks import check_changes, check_writable
from imagen_jax.training.state import TrainState, all_averages
from imagen_jax.training.step import (
    StepFn,
    jit_train_step,
    model_flops,
)
from imagen_jax.training.trainable import log_trained
from imagen_jax.training.watchdog import Watchdog, restartable

# A step whose report the host has not read: its number, report and batch.
Finished = tuple[int, Mapping[str, Any], Mapping[str, np.ndarray]]


def train(
    config: Config,
    workdir: str,
    batches: Batches,
    log: Callable[[str], None] = print,
    *,
    allow_changes: Collection[str] = (),
    step_info: StepInfoFn = lambda step: {},
    encode: Encode = lambda batch: batch,
    preemption: Preemption | None = None,
    compiled_step: str | None = None,
    evaluators: Mapping[str, Evaluator] = {},
) -> TrainState:
    """Trains one stage to `config.train.steps`, from the newest checkpoint if there is one.

    Args:
      config: the stage; `config.model.text_dim` must be set.
      workdir: folder of checkpoints, metrics.jsonl and TensorBoard files, shared by all processes.
      batches: the data; `batches(step)` starts at that step's and yields this process's part.
      log: called with the progress lines, in the first process.
      allow_changes: fields (or sections) in which `config` may differ from the checkpoint's.
      step_info: what a fault file says of a step besides its batch.
      encode: turns a batch on its devices into the inputs of the model.
      preemption: listens for SIGTERM; None: `train` starts to listen.
      compiled_step: file of `plan --save` with the compiled step; None: compile it here.
      evaluators: by name, called every `evaluate.every` steps.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: a setting, the mesh or the batch is invalid, the configuration differs from the
        checkpoint's, or the workdir cannot be written.
      CheckpointError: no checkpoint can be read, it is of another model, or saving fails.
      OwnershipError: another run owns the workdir, or has taken it over.
      CompiledError: the compiled step is of another run, or cannot be trusted.
      DivergedError: training is not finite, or its loss spikes, also after the roll-backs.
      CorruptionError: replicas of the state differ.
      Preempted: SIGTERM was received and the state is saved.

    Ends the process with status 75 if it hangs or another process of the run is lost (`watchdog`).
    """
    if not distributed.is_first():
        log = _ignore
    check_writable(workdir)
    check_names(config)
    evaluations = Evaluations(config, workdir, evaluators)
    check_trainable(config)
    metrics.find_writers(config.train.writers)
    mesh = partitioning.make_mesh(config.mesh)
    partitioning.check_batch_size(config.data.batch_size, mesh, config.train.accumulation)
    partitioning.check_tensor(config.model, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    with jax.set_mesh(mesh), restartable(), contextlib.ExitStack() as closing:
        check_owner = closing.enter_context(owned(workdir, log))
        create, abstract = abstract_state(config, optimizer, mesh)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        log(f"{config.name}: {count:,} parameters on {mesh.devices.size} {jax.default_backend()}")
        log_trained(config, abstract.params, log)
        timer = metrics.Timer()
        checkpoints = Checkpoints(workdir, config.checkpoint, access="write")
        run = Run(
            config=config,
            workdir=workdir,
            batches=batches,
            encode=encode,
            log=log,
            mesh=mesh,
            optimizer=optimizer,
            compiled_step=compiled_step,
            preemption=preemption or closing.enter_context(Preemption()),
            timer=timer,
            progress=metrics.Progress(config.train.steps, config.data.batch_size, timer, log),
            check_owner=check_owner,
            checkpoints=checkpoints,
            save_time=SaveTime(checkpoints, config.checkpoint.grace, log),
            faults=Faults(workdir, config, step_info, log),
            checksums=Checksums(mesh, abstract),
            watchdog=Watchdog(workdir, config.train.hang_timeout),
            profiler=Profiler(workdir, config.train.profile_at),
            evaluations=evaluations,
        )
        closing.callback(run.close)
        closing.enter_context(run.watchdog)

        with timer.measure("start"):
            step, state = run.restore(create, abstract, allow_changes)
        run.evaluate_missing(step, state)
        while step < config.train.steps:
            step, state, roll_back = run.advance(step, state)
            if roll_back:
                del state  # Not beside the state that is restored.
                step, state = run.restore(create, abstract, allow_changes, failed=step - 1)
        with timer.measure("save"):
            run.checkpoints.wait()
        if run.train_step is not None:
            log(metrics.goodput(timer.summary()))
    return state


@dataclasses.dataclass
class Run:
    """The parts of a run beside its state."""

    config: Config
    workdir: str
    batches: Batches
    encode: Encode
    log: Callable[[str], None]
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    compiled_step: str | None
    preemption: Preemption
    timer: metrics.Timer
    progress: metrics.Progress
    check_owner: Callable[[], None]
    checkpoints: Checkpoints
    save_time: SaveTime
    faults: Faults
    checksums: Checksums
    watchdog: Watchdog
    profiler: Profiler
    evaluations: Evaluations
    train_step: StepFn | None = None  # compiled at the first step after a restore

    def restore(
        self,
        create: Callable[[], TrainState],
        abstract: TrainState,
        allow_changes: Collection[str],
        failed: int | None = None,
    ) -> tuple[int, TrainState]:
        """State of the newest readable checkpoint; after step `failed`, of `Faults.last_good`."""
        self.checkpoints.wait()
        rolls_back = failed is not None
        if rolls_back:
            self.check_owner()  # Checkpoints of another owner must not be deleted.
        found = self.checkpoints.restore_newest(
            abstract,
            lambda saved: check_changes(saved, self.config, self.workdir, allow_changes),
            self.log,
            last=self.faults.last_good(self.checkpoints.steps(), failed) if rolls_back else None,
        )
        step = found[0] if found else 0
        self.faults.resume(step)
        if rolls_back:
            self.checkpoints.delete_after(step)
            self.faults.roll_back(step, failed)
            self.train_step = None  # The keys of its steps depend on the number of roll-backs.
        if found is None:
            return 0, first_state(self.config, create, abstract, self.optimizer, self.log)
        self.log(f"going on from step {found[0]}")
        return found

    def advance(self, step: int, state: TrainState) -> tuple[int, TrainState, bool]:
        """Trains from `step` to the end, or until the run must roll back.

        Returns:
          Step, state, and whether to roll back.
        """
        config = self.config.train
        unchecked: list[Finished] = []
        loss_by_noise_level: list[Array] = []
        with contextlib.ExitStack() as closing:
            writer = closing.enter_context(
                contextlib.closing(metrics.MetricWriter(self.workdir, step, config.writers))
            )
            first = self.faults.position(step)
            stream = closing.enter_context(closing_stream(iter(self.batches(first))))
            if config.overfit_batch:
                stream = itertools.repeat(next(stream))
            while step < config.steps:
                if self.preemption.reached():
                    self.stop(step, state, good=not unchecked or not self.failed(unchecked.pop()))
                self.profiler.before_step(step)
                with self.timer.measure("data"):
                    batch = next(stream)
                    placed = self.encode(
                        partitioning.place_batch(batch, self.mesh, self.config.data.batch_size)
                    )
                if self.train_step is None:
                    state, report = self.first_step(step, state, placed)
                else:
                    with jax.transfer_guard("disallow"):
                        state, report = self.train_step(state, placed)
                # Checks the step before while this one runs, so that dispatch never blocks.
                if unchecked and self.failed(unchecked.pop()):
                    return step, state, True
                unchecked.append((step, report, batch))
                loss_by_noise_level.append(report["loss_by_noise_level"])
                step += 1

                if step % config.log_every == 0 or step == config.steps:
                    values = self.report(step, report, loss_by_noise_level)
                    loss_by_noise_level.clear()
                    writer.write(step, values)
                if config.sample_every and step % config.sample_every == 0:
                    with self.timer.measure("draw"):
                        writer.write_image(step, "samples", preview(self.config, state, placed))
                if self.evaluations.due(step):
                    if unchecked and self.failed(unchecked.pop()):
                        return step, state, True
                    self.evaluate(step, state, writer)
                if config.checksum_every and step % config.checksum_every == 0:
                    self.checksums.compare(state, f"step {step}")
                self.keep(step, state, report)
            roll_back = bool(unchecked) and self.failed(unchecked.pop())
            if config.overfit_batch:
                path = epath.Path(self.workdir) / "overfit.png"
                images.save_png(path, preview(self.config, state, placed), {})
                self.log(f"one batch, {step} steps: the images are in {path}")
        return step, state, roll_back

    def failed(self, finished: Finished) -> bool:
        """Waits for a step and checks it: whether the run must roll back."""
        roll_back = self.faults.should_roll_back(*finished)
        self.watchdog.completed(finished[0])
        return roll_back

    def first_step(
        self, step: int, state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Compiles the step, runs it and starts the measurement of throughput."""
        devices = self.mesh.devices
        with self.timer.measure("start"):
            rollbacks = len(self.faults.rollbacks)
            step_fn = jit_train_step(
                self.config, self.optimizer, state, self.mesh, rollbacks=rollbacks
            )
            traced = step_fn.trace(state, batch)
            if self.compiled_step and not rollbacks:
                step_identity = compiled.identity(self.config, list(devices.flat))
                run_step = compiled.load(self.compiled_step, traced, step_identity)
                self.log(f"the compiled step is that of {self.compiled_step}")
            else:
                run_step = traced.lower().compile()
            state, report = jax.block_until_ready(run_step(state, batch))
            self.train_step = run_step
            flops = model_flops(traced, self.config, self.optimizer, state, batch, self.mesh)
            flops /= devices.size
        self.progress.start(step + 1, flops, devices.size, devices.flat[0].device_kind)
        return state, report

    def report(
        self, step: int, report: Mapping[str, Any], loss_by_noise_level: Iterable[Array]
    ) -> dict[str, float]:
        """Prints the progress line and returns the row of metrics."""
        scalars = ("loss", "x0_mse", "grad_norm", "skipped")
        values = {name: float(report[name]) for name in (*scalars, "vlb") if name in report}
        rate = learning_rate(self.config.optimizer, self.config.train.steps)
        values["learning_rate"] = float(np.asarray(rate(step - 1)))
        values |= metrics.mean_loss_by_noise_level(
            np.sum(jax.device_get(list(loss_by_noise_level)), axis=0)
        )
        self.faults.remember(values["loss"])
        return self.progress.report(step, values)

    def evaluate(self, step: int, state: TrainState, writer: metrics.MetricWriter) -> None:
        """Writes an evaluation; stops between its batches. Raises Preempted."""

        def proceed() -> None:
            self.watchdog.completed(step)
            if self.preemption.reached():
                self.stop(step, state, good=True)

        with self.timer.measure("evaluate"):
            found = self.evaluations.run(step, state, proceed)
            writer.write(step, found.scalars)
            for name, image in found.images.items():
                writer.write_image(step, name, image)
        self.log(self.evaluations.line())

    def evaluate_missing(self, step: int, state: TrainState) -> None:
        """Evaluates where a run begins, or was stopped before the evaluation was written."""
        if not self.evaluations.missing(step):
            return
        with contextlib.closing(
            metrics.MetricWriter(self.workdir, step, self.config.train.writers)
        ) as writer:
            self.evaluate(step, state, writer)
        if step and self.evaluations.ranks(step):
            self.check_owner()
            self.checkpoints.delete_after(step - 1)  # It was saved without its score.
            self.keep(step, state, {})

    def keep(self, step: int, state: TrainState, report: Mapping[str, Any]) -> None:
        """Saves what is due after `step` updates."""
        ends = step == self.config.train.steps
        every = self.config.ema.snapshot_every
        snapshot = bool(every) and (step % every == 0 or ends)
        checkpoint = step % self.config.checkpoint.every == 0 or ends
        self.save_time.poll()
        if not (snapshot or checkpoint):
            return
        with self.timer.measure("save"):
            self.check_owner()
            if snapshot:
                ema_snapshots.save(self.workdir, step, all_averages(state), self.config)
            if checkpoint:
                self.save_time.begin(step, state)
                scores = self.evaluations.score(step, report)
                self.checkpoints.save(step, state, self.config, scores)

    def stop(self, step: int, state: TrainState, *, good: bool) -> NoReturn:
        """Saves, unless the run was about to roll back, and ends the run. Raises Preempted."""
        with self.timer.measure("save"):
            self.check_owner()
            self.checkpoints.wait()
            self.save_time.poll()
            if good and self.checkpoints.latest_step() != step:
                self.save_time.begin(step, state)
                self.checkpoints.save(step, state, self.config)
            self.checkpoints.wait()
            self.save_time.poll()
        at = self.checkpoints.latest_step()
        raise Preempted(f"stop requested; saved at step {at}, the same command goes on from there")

    def close(self) -> None:
        """Stops profiling and closes the checkpoint manager."""
        self.profiler.close()
        self.checkpoints.close()


def with_data(
    config: Config, dim: int, encoder: Mapping[str, Any], stream: Mapping[str, Any]
) -> Config:
    """`config` with the text width and the fingerprints that its data determine.

    Args:
      config: as given by the user.
      dim: width of the text embeddings.
      encoder: fingerprint of the encoder that made them.
      stream: fingerprint of the records and their order.
    """
    text = dataclasses.replace(config.text, fingerprint=overrides.fingerprint(dict(encoder)))
    data = dataclasses.replace(config.data, fingerprint=overrides.fingerprint(dict(stream)))
    model = dataclasses.replace(config.model, text_dim=dim)
    return dataclasses.replace(config, model=model, text=text, data=data)


def _ignore(line: str) -> None:
    """The log of all processes but the first."""
