"""Checkpoints of a run in a bucket: `checkpoints/STEP/`, each a tree of `bucket_arrays`.

A checkpoint is complete when `commit.json` is there, which also holds the configuration and the
scores. It is deleted by deleting that object first. So at any moment of a kill, what is listed is
whole, and what is not is removed by the next run.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import threading
from collections.abc import Mapping
from typing import Any

from imagen_jax.config.schema import Config
from imagen_jax.config.train import CheckpointConfig
from imagen_jax.io import buckets
from imagen_jax.parallel import distributed
from imagen_jax.training import bucket_arrays, workdirs
from imagen_jax.training.bucket_arrays import COMMIT

_SAVED = "saved.json"  # Token of the last save; written when it is complete and old ones are gone.
_COMMITTED = re.compile(rf"(\d+)/{re.escape(COMMIT)}")


class BucketCheckpoints:
    """Saves, lists and deletes checkpoints below an address; named as Orbax's manager."""

    def __init__(self, address: str, config: CheckpointConfig, workdir: str) -> None:
        """Opens the folder; reads and changes nothing.

        Args:
          address: of the checkpoints.
          config: which are kept.
          workdir: the local mirror of the workdir, whose files are copied before a commit.
        """
        self.address, self._config, self._workdir = address, config, workdir
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._scores: dict[int, dict[str, float]] = {}

    def state(self, step: int) -> str:
        """Address of the state of a step."""
        return buckets.join(self.address, str(step))

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        found = map(_COMMITTED.fullmatch, buckets.names(self.address))
        return sorted(int(name[1]) for name in found if name)

    def clean_up(self) -> None:
        """Removes incomplete saves, and reads the scores of the others; the first process alone."""
        if not distributed.is_first():
            return
        complete = self.steps()
        self._delete([step for step in self._all() if step not in complete])
        for step in complete if self._config.keep_best else ():
            self._scores[step] = bucket_arrays.read_commit(self.state(step))["scores"]

    def save(self, step: int, state: Any, config: Config, scores: Mapping[str, float]) -> None:
        """Starts a save of a tree; every process must call it. Raises the previous one's error."""
        self.wait_until_finished()
        token = distributed.share(secrets.token_hex(8))[0]
        shards = bucket_arrays.own_shards(state)
        content = {
            "tree": bucket_arrays.describe(state),
            "config": dataclasses.asdict(config),
            "scores": dict(scores),
        }
        first, index, count = distributed.is_first(), distributed.index(), distributed.count()

        def work() -> None:
            try:
                bucket_arrays.write_shards(self.state(step), index, shards, token)
                workdirs.publish(self._workdir)
                if first:
                    bucket_arrays.commit(self.state(step), count, content, token)
                    self._scores[step] = dict(scores)
                    self._delete(self._superseded())
                    saved = json.dumps({"token": token, "step": step}).encode()
                    buckets.write(buckets.join(self.address, _SAVED), saved)
                else:  # The processes must see the same list.
                    bucket_arrays.wait_for(buckets.join(self.address, _SAVED), token)
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def is_saving_in_progress(self) -> bool:
        """Whether a save goes on in the background of this process."""
        return self._thread is not None and self._thread.is_alive()

    def wait_until_finished(self) -> None:
        """Waits for the save under way. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the save under way; `wait_until_finished` shows failures."""
        if self._thread is not None:
            self._thread.join()

    def delete(self, step: int) -> None:
        """Deletes a checkpoint; every process may call it, the first one acts."""
        if distributed.is_first():
            self._delete([step])

    def set_aside(self, step: int) -> None:
        """Takes a damaged checkpoint out of the list; its objects become incomplete ones."""
        commit = buckets.join(self.state(step), COMMIT)
        buckets.write(f"{self.state(step)}.broken/{COMMIT}", buckets.read(commit).data)
        buckets.delete([commit])

    def config(self, step: int) -> str:
        """The configuration that was saved with a step, as JSON."""
        return json.dumps(bucket_arrays.read_commit(self.state(step))["config"])

    def _all(self) -> set[int]:
        """Steps of which anything is there."""
        names = (name.partition("/")[0] for name in buckets.names(self.address))
        return {int(name) for name in names if name.isdecimal()}

    def _superseded(self) -> list[int]:
        """The steps that the configuration does not keep."""
        steps, config = self.steps(), self._config
        kept = set(steps[-config.keep :])
        if config.keep_every:
            kept |= {step for step in steps if step % config.keep_every == 0}
        if config.keep_best:
            scored = [step for step in steps if config.best_metric in self._scores.get(step, {})]
            scored.sort(key=lambda step: self._scores[step][config.best_metric])
            kept |= set(scored[: config.keep_best])
        return [step for step in steps if step not in kept]

    def _delete(self, steps: list[int]) -> None:
        buckets.delete(buckets.join(self.state(step), COMMIT) for step in steps)
        for step in steps:
            address = self.state(step)
            buckets.delete(buckets.join(address, name) for name in buckets.names(address))


def save_tree(address: str, name: str, tree: Mapping[str, Any], config: Config) -> None:
    """Writes a tree and a configuration and waits; every process must call it."""
    token = distributed.share(secrets.token_hex(8))[0]
    root = buckets.join(address, name)
    bucket_arrays.write_shards(root, distributed.index(), bucket_arrays.own_shards(tree), token)
    done = buckets.join(address, _SAVED)
    if distributed.is_first():
        content = {"tree": bucket_arrays.describe(tree), "config": dataclasses.asdict(config)}
        bucket_arrays.commit(root, distributed.count(), content, token)
        buckets.write(done, json.dumps({"token": token}).encode())
    else:
        bucket_arrays.wait_for(done, token)
