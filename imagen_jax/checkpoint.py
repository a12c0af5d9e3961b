"""Checkpoints of a training run: the only place that knows Orbax.

`WORKDIR/checkpoints/STEP/{state, config}`: the whole TrainState, sharded and written in the
background, and the configuration as JSON. Orbax writes to a temporary name and renames, so that
what is listed is complete. The position in the data is the step itself.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from imagen_jax import config_io
from imagen_jax.config import CheckpointConfig, Config
from imagen_jax.train_state import TrainState


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names its folder and what to do."""


class Checkpoints:
    """The checkpoints of one workdir.

    Attributes:
      path: folder of the checkpoints.
    """

    def __init__(self, workdir: str, config: CheckpointConfig):
        self.path = pathlib.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True)
        self._manager = ocp.CheckpointManager(
            self.path,
            options=options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: Config) -> None:
        """Starts saving; returns when `state` may be changed."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            ),
        )
        # On CPU Orbax writes from the very buffers that the next step donates.
        if jax.default_backend() == "cpu":
            self._manager.wait_until_finished()

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
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} cannot be read "
                f"({type(error).__name__}: {reason}); delete that folder to go on from the one "
                "before it"
            ) from error

    def restore_config(self, step: int) -> Config:
        """The configuration that the run of checkpoint `step` had. Raises CheckpointError."""
        path = self.path / str(step) / "config" / "metadata"
        try:
            return config_io.from_dict(Config, json.loads(path.read_text()))
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
        """Waits for the saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check_tree(self, step: int, abstract: TrainState) -> None:
        """Raises CheckpointError that names every parameter that differs."""
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} has no readable state; delete that folder to "
                "go on from the one before it"
            )
        found = {jax.tree_util.keystr(k): tuple(v.shape) for k, v in _leaves(saved.tree["params"])}
        wanted = {jax.tree_util.keystr(k): tuple(v.shape) for k, v in _leaves(abstract.params)}
        problems = [f"missing {k}" for k in wanted.keys() - found.keys()]
        problems += [f"unexpected {k}" for k in found.keys() - wanted.keys()]
        problems += [
            f"{k} is {found[k]}, the model wants {wanted[k]}"
            for k in wanted.keys() & found.keys()
            if found[k] != wanted[k]
        ]
        if problems:
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} is of another model: "
                + "; ".join(sorted(problems))
            )


def _restore_args(item: Any, partial: bool = False) -> ocp.args.PyTreeRestore:
    """How to read `item`, abstract arrays with shardings; partial: leave all else unread."""
    return ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=partial,
    )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)
