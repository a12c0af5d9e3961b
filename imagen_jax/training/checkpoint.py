"""Checkpoints of a training run: the only place that knows Orbax.

`WORKDIR/checkpoints/STEP/{state, config}`: the whole TrainState, sharded and written in the
background, and the configuration as JSON. Orbax writes to a temporary name and renames, so that
what is listed is complete. The position in the data is the step itself.
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

# Bytes that the files of a checkpoint take beside its numbers, and 5% of those.
METADATA_BYTES = 2_000_000


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names its folder and what to do."""


class ModelMismatchError(CheckpointError):
    """A checkpoint's parameters are not those of the configured model."""


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
        """Opens the folder; to write it makes it and clears what broken saves left there.

        Args:
          workdir: folder of the run.
          config: which checkpoints stay.
          access: "read" changes nothing, not even in a folder in which a run is saving.
        """
        # Orbax wants an absolute path; a bucket's name (gs://...) is one.
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
        """Starts saving; returns when `state` may be changed.

        Args:
          step: number of updates tried, the checkpoint's name.
          state: what is saved.
          config: saved beside it.
          scores: by which `checkpoint.keep_best` chooses.

        Raises:
          CheckpointError: this save or the one before it failed, or the disk has no room for it.
        """
        self._check_disk_space(state)
        # On CPU Orbax writes from the very buffers, which a step may be given to overwrite.
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
        """Waits for the saves under way. Raises CheckpointError if one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def _check_disk_space(self, state: TrainState) -> None:
        """Raises CheckpointError rather than filling the disk: nothing half-written is left."""
        if "://" in str(self.path):
            return
        numbers = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        needed = numbers + numbers // 20 + METADATA_BYTES
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise CheckpointError(
                f"cannot save in {self.path}: {free / 1e6:,.1f} MB are free, "
                f"{needed / 1e6:,.1f} MB are needed; {self._left()}: make room, then start again"
            )

    def _left(self) -> str:
        newest = self.latest_step()
        left = "there is none" if newest is None else f"the newest is of step {newest}"
        return f"complete checkpoints are untouched, {left}"

    def _not_saved(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"cannot save in {self.path} ({type(error).__name__}: {_in_short(error)}); "
            f"{self._left()}: make room or rights, then start again"
        )

    def restore_newest(
        self,
        abstract: TrainState,
        check: Callable[[Config], None],
        log: Callable[[str], None],
    ) -> tuple[int, TrainState] | None:
        """Step and state of the newest checkpoint that can be read; None where there is none.

        Newer ones that cannot be read are named and set aside as STEP.broken.

        Args:
          abstract: shapes and shardings of the state.
          check: is given the saved configuration and raises if it is not to go on.
          log: receives a line for each checkpoint that cannot be read.

        Raises:
          CheckpointError: there are checkpoints but none can be read, or they are of another model.
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
        """Renames what cannot be read to STEP.broken: those steps will be saved anew."""
        if steps and distributed.is_first():
            for step in steps:
                (self.path / str(step)).rename(self.path / f"{step}.broken")
        if steps and jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints set aside")
        if steps:
            self._manager.reload()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state of `step` onto the shardings that `abstract` carries.

        Raises:
          CheckpointError: unreadable, or its parameters are not those of `abstract`.
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
                f"({type(error).__name__}: {_in_short(error)}); the one before it is used if "
                "there is one"
            ) from error

    def restore_config(self, step: int) -> Config:
        """The configuration that the run of checkpoint `step` had. Raises CheckpointError."""
        path = self.path / str(step) / "config" / "metadata"
        try:
            return overrides.from_json(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"configuration of {path} cannot be read: {error}") from error

    def restore_ema(self, step: int, abstract_params: Any, name: str = "ema") -> Any:
        """Reads one average of the parameters alone. Raises CheckpointError."""
        item = {"ema": {name: abstract_params}}
        args = ocp.args.Composite(state=_restore_args(item, partial=True))
        try:
            return self._manager.restore(step, args=args)["state"]["ema"][name]
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} cannot be read ({type(error).__name__})"
            ) from error

    def close(self) -> None:
        """Ends the saving in the background; `wait` first where a failure matters."""
        self._manager.close()

    def _check_tree(self, step: int, abstract: TrainState) -> None:
        """Raises CheckpointError that names every parameter that differs."""
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} has no readable state; the one before it is "
                "used if there is one"
            )
        found = {jax.tree_util.keystr(k): tuple(v.shape) for k, v in _leaves(saved.tree["params"])}
        wanted = {jax.tree_util.keystr(k): tuple(v.shape) for k, v in _leaves(abstract.params)}
        new_averages = abstract.ema.keys() - saved.tree["ema"].keys()
        if new_averages:
            raise ModelMismatchError(
                f"checkpoint {self.path / str(step)} has no average {sorted(new_averages)[0]!r}; "
                "config.ema.profiles must be set when a run begins"
            )
        problems = [f"missing {k}" for k in wanted.keys() - found.keys()]
        problems += [f"unexpected {k}" for k in found.keys() - wanted.keys()]
        problems += [
            f"{k} is {found[k]}, the model wants {wanted[k]}"
            for k in wanted.keys() & found.keys()
            if found[k] != wanted[k]
        ]
        if problems:
            raise ModelMismatchError(
                f"checkpoint {self.path / str(step)} is of another model: "
                + "; ".join(sorted(problems))
            )


def _preservation(config: CheckpointConfig) -> policies.AnyPreservationPolicy:
    """Which checkpoints stay: the newest, every M-th step and the best ones, each if wanted."""
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every:
        kept.append(policies.EveryNSteps(config.keep_every))
    if config.keep_best:
        best = policies.BestN(
            get_metric_fn=lambda scores: scores[config.best_metric],
            # Ranked downwards; keep_checkpoints_without_metrics would keep all older ones.
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
    """One line of an error: tensorstore's begin with the file and end with the reason."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"


def _restore_args(item: Any, partial: bool = False) -> ocp.args.PyTreeRestore:
    """How to read `item`, abstract arrays with shardings; partial: leave all else unread."""
    return ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=partial,
    )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)
