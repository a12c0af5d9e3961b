"""Training of one stage. READ FIRST: the whole life of a run, top to bottom.

A run is a pure function of its configuration: the batch of a step, its noise and its dropped
captions are functions of (seed, step) alone, so a run that was killed continues exactly as if it
had not been. The state is one pytree (`state.TrainState`), sharded over a mesh of devices; the step
is one jitted function (`step.make_train_step`). Every process runs this loop, each with its part of
every batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from etils import epath
from jaxtyping import Array

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.io import images
from imagen_jax.parallel import compiled, distributed, partitioning
from imagen_jax.parallel.preemption import Preempted, Preemption
from imagen_jax.parallel.profiling import Profiler
from imagen_jax.stages.loss import LOGSNR_EDGES, check_trainable
from imagen_jax.stages.names import check_names
from imagen_jax.training import ema_snapshots, metrics
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.faults import Faults, StepInfoFn
from imagen_jax.training.initial_state import abstract_state, start_from
from imagen_jax.training.optimizer import learning_rate, make_optimizer, with_defaults
from imagen_jax.training.ownership import owned
from imagen_jax.training.preview import preview
from imagen_jax.training.state import TrainState
from imagen_jax.training.step import (
    StepFn,
    jit_train_step,
    model_flops,
    step_timesteps,
)

# A source of batches: the first step -> that step's batch and all that follow. A batch has the rows
# of `partitioning.batch_rows`, or all rows.
Batches = Callable[[int], Iterable[Mapping[str, np.ndarray]]]
# Input processing on the devices: encodes the captions where embeddings are not stored.
Encode = Callable[[Mapping[str, Array]], Mapping[str, Array]]


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
) -> TrainState:
    """Trains one stage to `config.train.steps`, from the newest checkpoint if there is one.

    Args:
      config: the stage; `config.model.text_dim` must be set.
      workdir: folder of checkpoints, metrics.jsonl and TensorBoard files, shared by all processes.
      batches: the data; `batches(step)` starts at that step and yields this process's part.
      log: called with the progress lines, in the first process.
      allow_changes: fields (or sections) in which `config` may differ from the checkpoint's.
      step_info: what a fault file says of a step besides its batch.
      encode: turns a batch on its devices into the inputs of the model.
      preemption: listens for SIGTERM; None: `train` starts to listen.
      compiled_step: file of `plan --save` with the compiled step; None: compile it here.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: a setting, the mesh or the batch is invalid, the configuration differs from the
        checkpoint's, or the workdir cannot be written.
      CheckpointError: no checkpoint can be read, it is of another model, or saving fails.
      OwnershipError: another run owns the workdir, or has taken it over.
      CompiledError: the compiled step is of another run, or cannot be trusted.
      DivergedError: training is not finite, also after the roll-backs.
      Preempted: SIGTERM was received and the state is saved.
    """
    if not distributed.is_first():
        log = _ignore
    _check_writable(workdir)
    check_names(config)
    metrics.check_rankable(config.checkpoint.best_metric)
    check_trainable(config)
    mesh = partitioning.make_mesh(config.mesh)
    partitioning.check_batch_size(config.data.batch_size, mesh, config.train.accumulation)
    partitioning.check_tensor(config.model, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        check_owner = closing.enter_context(owned(workdir, log))
        create, abstract = abstract_state(config, optimizer, mesh)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        log(f"{config.name}: {count:,} parameters on {mesh.devices.size} {jax.default_backend()}")
        timer = metrics.Timer()
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
            checkpoints=Checkpoints(workdir, config.checkpoint, access="write"),
            faults=Faults(workdir, config.train, _with_timesteps(step_info, config), log),
            profiler=Profiler(workdir, config.train.profile_at),
        )
        closing.callback(run.close)

        with timer.measure("start"):
            step, state = run.restore(create, abstract, allow_changes)
        while step < config.train.steps:
            step, state, roll_back = run.advance(step, state)
            if roll_back:
                del state  # Not beside the state that is restored.
                step, state = run.restore(create, abstract, allow_changes)
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
    faults: Faults
    profiler: Profiler
    train_step: StepFn | None = None  # compiled at the first step

    def restore(
        self,
        create: Callable[[], TrainState],
        abstract: TrainState,
        allow_changes: Collection[str],
    ) -> tuple[int, TrainState]:
        """Step and state of the newest readable checkpoint, or of the start of the run."""
        self.checkpoints.wait()
        found = self.checkpoints.restore_newest(
            abstract,
            lambda saved: _check_changes(saved, self.config, self.workdir, allow_changes),
            self.log,
        )
        if found is None:
            start = self.config.train.init_from
            return 0, start_from(start, abstract, self.optimizer) if start else create()
        self.log(f"going on from step {found[0]}")
        return found

    def advance(self, step: int, state: TrainState) -> tuple[int, TrainState, bool]:
        """Trains from `step` to the end, or until the run must roll back.

        Returns:
          Step, state, and whether to roll back.
        """
        config = self.config.train
        unchecked: list[tuple[int, Mapping[str, Any], Mapping[str, np.ndarray]]] = []
        loss_by_noise_level: list[Array] = []
        with contextlib.ExitStack() as closing:
            writer = closing.enter_context(
                contextlib.closing(metrics.MetricWriter(self.workdir, step))
            )
            stream = closing.enter_context(_closing(iter(self.batches(step))))
            if config.overfit_batch:
                stream = itertools.repeat(next(stream))
            while step < config.steps:
                if self.preemption.reached():
                    self.stop(step, state)
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
                if unchecked and self.faults.should_roll_back(*unchecked.pop()):
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
                self.keep(step, state, report)
            roll_back = bool(unchecked) and self.faults.should_roll_back(*unchecked.pop())
            if config.overfit_batch:
                path = pathlib.Path(self.workdir) / "overfit.png"
                images.save_png(path, preview(self.config, state, placed), {})
                self.log(f"one batch, {step} steps: the images are in {path}")
        return step, state, roll_back

    def first_step(
        self, step: int, state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Compiles the step, runs it and starts the measurement of throughput."""
        devices = self.mesh.devices
        with self.timer.measure("start"):
            step_fn = jit_train_step(self.config, self.optimizer, state, self.mesh)
            traced = step_fn.trace(state, batch)
            if self.compiled_step:
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
        values |= _mean_loss_by_noise_level(
            np.sum(jax.device_get(list(loss_by_noise_level)), axis=0)
        )
        return self.progress.report(step, values)

    def keep(self, step: int, state: TrainState, report: Mapping[str, Any]) -> None:
        """Saves what is due after `step` updates."""
        ends = step == self.config.train.steps
        every = self.config.ema.snapshot_every
        snapshot = bool(every) and (step % every == 0 or ends)
        checkpoint = step % self.config.checkpoint.every == 0 or ends
        if not (snapshot or checkpoint):
            return
        with self.timer.measure("save"):
            self.check_owner()
            if snapshot:
                ema_snapshots.save(self.workdir, step, state.ema, self.config)
            if checkpoint:
                best = self.config.checkpoint.best_metric
                scores = {best: float(report[best])} if self.config.checkpoint.keep_best else {}
                self.checkpoints.save(step, state, self.config, scores)

    def stop(self, step: int, state: TrainState) -> NoReturn:
        """Saves and ends the run. Raises Preempted."""
        with self.timer.measure("save"):
            self.check_owner()
            self.checkpoints.wait()
            if self.checkpoints.latest_step() != step:
                self.checkpoints.save(step, state, self.config)
            self.checkpoints.wait()
        raise Preempted(f"asked to stop; saved at step {step}, the same command goes on from there")

    def close(self) -> None:
        """Stops profiling and closes the checkpoint manager."""
        self.profiler.close()
        self.checkpoints.close()


def _check_writable(workdir: str) -> None:
    """Raises ConfigError where `workdir` cannot be written; before anything is compiled."""
    probe = epath.Path(workdir) / f".writable.{jax.process_index()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written ({error.strerror or error}); name a writable "
            "folder"
        ) from error


def _check_changes(saved: Config, given: Config, workdir: str, allowed: Collection[str]) -> None:
    """Raises ConfigError where `given` differs from `saved` in a field that affects learning."""
    changes = overrides.changes(with_defaults(saved), with_defaults(given))
    for path, (old, new) in changes.items():
        if not overrides.matches_any_field(path, allowed):
            raise ConfigError(
                f"config.{path}={new!r}, but {workdir} was trained with {old!r}; set it back, "
                f"start a new --workdir, or allow it: --allow_changes={path}"
            )


def _mean_loss_by_noise_level(bins: np.ndarray) -> dict[str, float]:
    """Mean loss by noise level, from summed loss and count [2, bins]; empty bins left out."""
    bounds = ["-inf", *(f"{edge:g}" for edge in LOGSNR_EDGES), "inf"]
    names = [f"loss/logsnr_{low}_{high}" for low, high in itertools.pairwise(bounds)]
    return {n: float(s / c) for n, s, c in zip(names, *bins, strict=True) if c > 0}


def _with_timesteps(step_info: StepInfoFn, config: Config) -> StepInfoFn:
    return lambda step: {**step_info(step), "time": step_timesteps(config, step)}


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


@contextlib.contextmanager
def _closing(stream: Iterator) -> Iterator[Iterator]:
    """Closes a stream that has a `close` method."""
    try:
        yield stream
    finally:
        close = getattr(stream, "close", None)
        if close:
            close()


def _ignore(line: str) -> None:
    """The log of all processes but the first."""
