"""Checkpoints of a training run: save, list, restore the newest that can be read.

This module, `restore` and `saved_trees` are the only ones that import Orbax.

`WORKDIR/checkpoints/STEP/state` holds the TrainState (step, params, ema, opt_state, skipped),
sharded and written in the background; `STEP/config` holds the configuration as JSON. Orbax writes
to a temporary name and renames, so a listed checkpoint is complete; in a bucket,
`bucket_checkpoints` takes its place. The position in the data is the
step; no data state is saved.

Commands beside the run open checkpoints with access="read", which has no means to write. The run
itself may delete a checkpoint while they read it; `Checkpoints.read` then takes another one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.config.train import CheckpointConfig
from imagen_jax.interop.weights import flatten, unflatten
from imagen_jax.io import mirrors
from imagen_jax.io.buckets import BucketError
from imagen_jax.parallel import distributed
from imagen_jax.stages.parameters import merge
from imagen_jax.training import restore
from imagen_jax.training.bucket_checkpoints import BucketCheckpoints
from imagen_jax.training.restore import (
    CheckpointError,
    DamagedError,
    ModelMismatchError,
    UnreachableError,
)
from imagen_jax.training.state import TrainState

T = TypeVar("T")

# Size of a checkpoint's metadata files, bytes; 5% of the arrays' size comes on top.
METADATA_BYTES = 2_000_000
# Reads of checkpoints that a run deletes meanwhile, before giving up.
_READS = 30


class Checkpoints:
    """The checkpoints of one workdir.

    Attributes:
      path: folder of the checkpoints.
    """

    def __init__(
        self,
        workdir: str,
        config: CheckpointConfig,
        *,
        access: Literal["read", "write"] = "read",
    ):
        """Opens the folder. With access="write", creates it and removes incomplete saves.

        Args:
          workdir: folder of the run.
          config: which checkpoints are kept.
          access: "read" changes nothing, so it is safe while a run is saving to the folder;
            "write" is for the run that owns the workdir.
        """
        self.path = absolute(workdir) / "checkpoints"
        self._writer: ocp.CheckpointManager | BucketCheckpoints | None = None
        address = mirrors.origin(self.path)
        self._bucket = BucketCheckpoints(address, config, workdir) if address else None
        if access == "write" and self._bucket:
            self._bucket.clean_up()
            self._writer = self._bucket
        elif access == "write":
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_preservation(config),
                create=True,
                cleanup_tmp_directories=True,
            )
            handlers = {
                "state": ocp.PyTreeCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            }
            self._writer = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        if self._bucket:
            return self._bucket.steps()
        names = ocp.path.step.standard_name_format()
        return sorted(found.step for found in names.find_all(self.path))

    def read(self, choose: Callable[[list[int]], int | None], read: Callable[[int], T]) -> T | None:
        """Reads a checkpoint of a run that may delete it meanwhile; then chooses and reads again.

        Args:
          choose: of all steps, the one to read; None: none.
          read: reads a step.

        Raises:
          CheckpointError: it cannot be read, and the run has neither deleted it nor saved others.
        """
        for remaining in reversed(range(_READS)):
            steps = self.steps()
            step = choose(steps)
            if step is None:
                return None
            try:
                return read(step)
            except ModelMismatchError:
                raise
            except CheckpointError:
                if not remaining or not self._changes(steps):
                    raise
        return None

    def _changes(self, steps: list[int]) -> bool:
        """Whether the list of checkpoints changes within a second; a folder is deleted slowly."""
        for _ in range(10):
            if self.steps() != steps:
                return True
            time.sleep(0.1)
        return False

    def newest_config(self) -> Config:
        """The configuration of the newest checkpoint. Raises CheckpointError if there is none."""
        config = self.read(newest, self.restore_config)
        if config is None:
            raise CheckpointError(f"no checkpoint in {self.path}; is it the --workdir of a run?")
        return config

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return newest(self.steps())

    def save(
        self, step: int, state: TrainState, config: Config, scores: Mapping[str, float] = {}
    ) -> None:
        """Starts a save in the background; returns once `state` may be donated.

        Args:
          step: number of attempted updates; names the checkpoint.
          state: the state to save.
          config: configuration to save with it.
          scores: metrics by which `checkpoint.keep_best` ranks checkpoints.

        Raises:
          CheckpointError: this save or the previous one failed, or the disk has too little space.
        """
        manager = self._manager()
        if not isinstance(manager, BucketCheckpoints):
            self._check_disk_space(state)
            # On CPU Orbax serialises from the live buffers, and a later step may donate them.
            state = _copy(state) if jax.default_backend() == "cpu" else state
        try:
            if isinstance(manager, BucketCheckpoints):
                return manager.save(step, state, config, scores)
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    config=ocp.args.JsonSave(dataclasses.asdict(config)),
                ),
                metrics=dict(scores) or None,
            )
        except Exception as error:
            raise self._not_saved(error) from error

    def _manager(self) -> ocp.CheckpointManager | BucketCheckpoints:
        if self._writer is None:
            raise CheckpointError(f'{self.path} is open with access="read"; nothing can be saved')
        return self._writer

    def is_saving(self) -> bool:
        """Whether a save goes on in the background of this process."""
        return self._manager().is_saving_in_progress()

    def wait(self) -> None:
        """Waits for pending saves. Raises CheckpointError if one failed."""
        manager = self._manager()
        try:
            manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def _check_disk_space(self, state: TrainState) -> None:
        """Raises CheckpointError if the disk has too little space for `state`."""
        array_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        needed = array_bytes + array_bytes // 20 + METADATA_BYTES
        free = shutil.disk_usage(self.path).free
        if free < needed:
            self.wait()  # A save under way may be the newest that is kept.
            raise CheckpointError(
                f"cannot save in {self.path}: {free / 1e6:,.1f} MB are free, "
                f"{needed / 1e6:,.1f} MB are needed; {self._kept()}; free disk space, then restart"
            )

    def _kept(self) -> str:
        try:
            newest = self.latest_step()
        except BucketError:
            return "complete checkpoints are kept"
        kept = "there is none" if newest is None else f"the newest is of step {newest}"
        return f"complete checkpoints are kept ({kept})"

    def _not_saved(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"cannot save in {self.path} ({type(error).__name__}: {restore.in_short(error)}); "
            f"{self._kept()}; free disk space or fix permissions, then restart"
        )

    def restore_newest(
        self,
        abstract: TrainState,
        check: Callable[[Config], None],
        log: Callable[[str], None],
        *,
        last: int | None = None,
    ) -> tuple[int, TrainState] | None:
        """Step and state of the newest readable checkpoint; None without checkpoints.

        Every process must call it; all get the same step, or the same error. Checkpoints whose
        content is damaged are logged and renamed to STEP.broken, by the first process. No other
        failure renames anything.

        Args:
          abstract: shapes and shardings of the state.
          check: called with the saved configuration; raises if training must not resume from it.
          log: called with one line per damaged checkpoint.
          last: no later step is restored; None: any.

        Raises:
          CheckpointError: all checkpoints are damaged, the newest cannot be read for another
            reason, or the parameters do not match the model.
        """
        broken: DamagedError | None = None
        # The processes may see different lists: the first one's counts.
        what = f"list of {self.path}"
        steps = json.loads(
            restore.from_first(
                lambda: restore.attempt(what, lambda: json.dumps(self.steps()[::-1]))
            )
        )
        steps = [step for step in steps if last is None or step <= last]
        for index, step in enumerate(steps):
            try:
                check(self._shared_config(step))
                state = self.restore(step, abstract)
            except DamagedError as error:
                self._prove(step, error)
                log(f"{error}; falling back to the previous checkpoint")
                broken = broken or error
                continue
            self._rename_damaged(steps[:index])
            return step, state
        if broken:
            raise broken
        return None

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps; every process must call it."""
        later = json.dumps([saved for saved in self.steps() if saved > step])
        for saved in json.loads(distributed.share(later)[0]):
            self._manager().delete(saved)

    def _prove(self, step: int, error: DamagedError) -> None:
        """Raises UnreachableError unless the first process, too, finds the checkpoint damaged."""

        def read() -> None:
            self.restore_config(step)
            restore.read_on_host(self.path / str(step) / "state")

        try:
            restore.together(read if distributed.is_first() else None)
        except DamagedError:
            return
        except CheckpointError as other:
            raise UnreachableError(f"{error}; the first process: {other}") from error
        raise UnreachableError(
            f"{error}; the first process can read it, so nothing was changed: check that machine"
        ) from error

    def _rename_damaged(self, steps: Sequence[int]) -> None:
        """Renames damaged checkpoints to STEP.broken, so their steps can be saved again."""
        if not steps or not self._writer:
            return
        for step in steps if distributed.is_first() else ():
            if self._bucket:
                self._bucket.set_aside(step)
            else:
                (self.path / str(step)).rename(self.path / f"{step}.broken")
        distributed.share("damaged checkpoints are renamed")
        if not isinstance(self._writer, BucketCheckpoints):
            self._writer.reload()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state of `step` with the shardings of `abstract`; every process must call it.

        Raises:
          CheckpointError: the same in all processes: unreadable, or its parameters do not match
            `abstract`.
        """
        folder = self.path / str(step) / "state"

        def fits() -> None:
            restore.check_model(restore.tree_of(folder), abstract, folder)

        check = lambda: restore.attempt(f"checkpoint {folder.parent}", fits)  # noqa: E731
        restore.together(check if distributed.is_first() else None)
        return restore.read_arrays(folder, abstract)

    def shapes(self, step: int) -> Any:
        """Shapes of the saved state, as nested dicts. Raises CheckpointError."""
        folder = self.path / str(step)
        return restore.attempt(f"checkpoint {folder}", lambda: restore.tree_of(folder / "state"))

    def restore_config(self, step: int) -> Config:
        """The configuration saved with checkpoint `step`. Raises CheckpointError."""
        path = self.path / str(step) / "config" / "metadata"
        what = f"configuration of checkpoint {path.parent.parent}"

        def read() -> Config:
            text = self._bucket.config(step) if self._bucket else path.read_text()
            try:
                return overrides.from_json(text)
            except ConfigError as error:  # Whole, but not of this version.
                raise CheckpointError(f"{what} does not fit this version: {error}") from error

        return restore.attempt(what, read)

    def _shared_config(self, step: int) -> Config:
        """The configuration as the first process reads it. Raises CheckpointError in all."""
        text = restore.from_first(lambda: overrides.to_json(self.restore_config(step)))
        return overrides.from_json(text)

    def restore_ema(self, step: int, abstract_params: Any, name: str = "ema") -> Any:
        """Reads one average of the parameters, frozen ones as they are. Raises CheckpointError."""
        averaged, flat = flatten(self.shapes(step)["ema"][name]), flatten(abstract_params)
        frozen = unflatten({path: leaf for path, leaf in flat.items() if path not in averaged})
        trained = unflatten({path: leaf for path, leaf in flat.items() if path in averaged})
        item = {"ema": {name: trained}} if trained else {}
        item |= {"params": frozen} if frozen else {}
        found = restore.read_arrays(self.path / str(step) / "state", item, partial=True)
        return merge(found.get("params", {}), found["ema"][name] if trained else {})

    def restore_optimizer(self, step: int, abstract: Any) -> Any:
        """Reads the state of the optimizer and nothing else. Raises CheckpointError."""
        item = {"opt_state": abstract}
        folder = self.path / str(step) / "state"
        return restore.read_arrays(folder, item, partial=True)["opt_state"]

    def close(self) -> None:
        """Stops background saving; call `wait` first to see failures."""
        if self._writer:
            self._writer.close()


def absolute(workdir: str) -> epath.Path:
    """The workdir as an absolute path, which Orbax requires."""
    return epath.Path(os.path.abspath(workdir))


def newest(steps: list[int]) -> int | None:
    """The last of the steps, or None."""
    return steps[-1] if steps else None


def _preservation(config: CheckpointConfig) -> policies.AnyPreservationPolicy:
    """Keeps the newest checkpoints and, if configured, every M-th step and the best scores."""
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every:
        kept.append(policies.EveryNSteps(config.keep_every))
    if config.keep_best:
        best = policies.BestN(
            get_metric_fn=lambda scores: scores[config.best_metric],
            # Lower scores are better. Checkpoints without scores would otherwise all be kept.
            reverse=True,
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        kept.append(best)
    return policies.AnyPreservationPolicy(kept)


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)
