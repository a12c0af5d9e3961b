"""Checkpoints of a training run. The only module that imports Orbax.

`WORKDIR/checkpoints/STEP/state` holds the TrainState (step, params, ema, opt_state, skipped),
sharded and written in the background; `STEP/config` holds the configuration as JSON. Orbax writes
to a temporary name and renames, so a listed checkpoint is complete. The position in the data is the
step; no data state is saved.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from imagen_jax.config import overrides
from imagen_jax.config.schema import CheckpointConfig, Config
from imagen_jax.parallel import distributed
from imagen_jax.training.state import TrainState

# Size of a checkpoint's metadata files, bytes; 5% of the arrays' size comes on top.
METADATA_BYTES = 2_000_000


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names its folder and the fix."""


class ModelMismatchError(CheckpointError):
    """The parameters of a checkpoint do not match the configured model."""


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
        access: Literal["write", "read"] = "write",
    ):
        """Opens the folder. With access="write", creates it and removes incomplete saves.

        Args:
          workdir: folder of the run.
          config: which checkpoints are kept.
          access: "read" changes nothing, so it is safe while a run is saving to the folder.
        """
        # Orbax requires an absolute path; a bucket's name (gs://...) is one.
        workdir = workdir if "://" in workdir else os.path.abspath(workdir)
        self.path = epath.Path(workdir) / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_preservation(config),
            create=access == "write",
            cleanup_tmp_directories=access == "write",
            read_only=access == "read",
        )
        self._manager = ocp.CheckpointManager(
            self.path,
            options=options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def newest_config(self) -> Config:
        """The configuration of the newest checkpoint. Raises CheckpointError if there is none."""
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.path}; is it the --workdir of a run?")
        return self.restore_config(step)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

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
        self._check_disk_space(state)
        # On CPU Orbax serialises from the live buffers, and a later step may donate them.
        if jax.default_backend() == "cpu":
            state = _copy(state)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    config=ocp.args.JsonSave(dataclasses.asdict(config)),
                ),
                metrics=dict(scores) or None,
            )
        except Exception as error:
            raise self._not_saved(error) from error

    def wait(self) -> None:
        """Waits for pending saves. Raises CheckpointError if one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def _check_disk_space(self, state: TrainState) -> None:
        """Raises CheckpointError if the disk has too little space for `state`."""
        if "://" in str(self.path):
            return
        array_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        needed = array_bytes + array_bytes // 20 + METADATA_BYTES
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise CheckpointError(
                f"cannot save in {self.path}: {free / 1e6:,.1f} MB are free, "
                f"{needed / 1e6:,.1f} MB are needed; {self._kept()}; free disk space, then restart"
            )

    def _kept(self) -> str:
        newest = self.latest_step()
        kept = "there is none" if newest is None else f"the newest is of step {newest}"
        return f"complete checkpoints are kept ({kept})"

    def _not_saved(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"cannot save in {self.path} ({type(error).__name__}: {_in_short(error)}); "
            f"{self._kept()}; free disk space or fix permissions, then restart"
        )

    def restore_newest(
        self,
        abstract: TrainState,
        check: Callable[[Config], None],
        log: Callable[[str], None],
    ) -> tuple[int, TrainState] | None:
        """Step and state of the newest readable checkpoint; None without checkpoints.

        Unreadable newer checkpoints are logged and renamed to STEP.broken.

        Args:
          abstract: shapes and shardings of the state.
          check: called with the saved configuration; raises if training must not resume from it.
          log: called with one line per unreadable checkpoint.

        Raises:
          CheckpointError: no checkpoint is readable, or the parameters do not match the model.
        """
        broken: CheckpointError | None = None
        steps = self.steps()[::-1]
        for index, step in enumerate(steps):
            try:
                check(self.restore_config(step))
                state = self.restore(step, abstract)
            except ModelMismatchError:
                raise
            except CheckpointError as error:
                log(str(error))
                broken = broken or error
                continue
            self._rename_unreadable(steps[:index])
            return step, state
        if broken:
            raise broken
        return None

    def _rename_unreadable(self, steps: Sequence[int]) -> None:
        """Renames unreadable checkpoints to STEP.broken, so their steps can be saved again."""
        if steps and distributed.is_first():
            for step in steps:
                (self.path / str(step)).rename(self.path / f"{step}.broken")
        if steps and jax.process_count() > 1:
            multihost_utils.sync_global_devices("unreadable checkpoints renamed")
        if steps:
            self._manager.reload()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state of `step` with the shardings of `abstract`.

        Raises:
          CheckpointError: unreadable, or its parameters do not match `abstract`.
        """
        args = ocp.args.Composite(state=_restore_args(abstract))
        try:
            self._check_tree(step, abstract)
            return self._manager.restore(step, args=args)["state"]
        except CheckpointError:
            raise
        except Exception as error:  # Orbax, tensorstore and zarr each raise their own.
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} cannot be read "
                f"({type(error).__name__}: {_in_short(error)}); falling back to the previous "
                "checkpoint"
            ) from error

    def restore_config(self, step: int) -> Config:
        """The configuration saved with checkpoint `step`. Raises CheckpointError."""
        path = self.path / str(step) / "config" / "metadata"
        try:
            return overrides.from_json(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"configuration of {path} cannot be read: {error}") from error

    def restore_ema(self, step: int, abstract_params: Any, name: str = "ema") -> Any:
        """Reads one average of the parameters and nothing else. Raises CheckpointError."""
        item = {"ema": {name: abstract_params}}
        args = ocp.args.Composite(state=_restore_args(item, partial=True))
        try:
            return self._manager.restore(step, args=args)["state"]["ema"][name]
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} cannot be read ({type(error).__name__})"
            ) from error

    def close(self) -> None:
        """Stops background saving; call `wait` first to see failures."""
        self._manager.close()

    def _check_tree(self, step: int, abstract: TrainState) -> None:
        """Raises CheckpointError naming every parameter that differs from `abstract`."""
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} has no readable state; falling back to the "
                "previous checkpoint"
            )
        found = {jax.tree_util.keystr(k): tuple(v.shape) for k, v in _leaves(saved.tree["params"])}
        expected = {jax.tree_util.keystr(k): tuple(v.shape) for k, v in _leaves(abstract.params)}
        new_averages = abstract.ema.keys() - saved.tree["ema"].keys()
        if new_averages:
            raise ModelMismatchError(
                f"checkpoint {self.path / str(step)} has no average {sorted(new_averages)[0]!r}; "
                "config.ema.profiles must be set when a run begins"
            )
        problems = [f"missing {k}" for k in expected.keys() - found.keys()]
        problems += [f"unexpected {k}" for k in found.keys() - expected.keys()]
        problems += [
            f"{k} has shape {found[k]}, the model expects {expected[k]}"
            for k in expected.keys() & found.keys()
            if found[k] != expected[k]
        ]
        if problems:
            raise ModelMismatchError(
                f"checkpoint {self.path / str(step)} is of another model: "
                + "; ".join(sorted(problems))
            )


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


def _in_short(error: Exception) -> str:
    """An error as one line; tensorstore's start with the file and end with the reason."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"


def _restore_args(item: Any, partial: bool = False) -> ocp.args.PyTreeRestore:
    """Restore arguments for abstract arrays with shardings; partial: read only these."""
    return ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=partial,
    )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)
