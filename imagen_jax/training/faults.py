"""What happens when loss or gradient is not finite: skip, write down, roll back once, stop.

The update itself is skipped inside the jitted step. Here the host looks at each step's verdict one
step late, so that nobody waits, and writes what is needed to look into it: the batch, its records
and times, and the gradient's norm by block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from imagen_jax.config.schema import TrainConfig

# What else is known of a step's batch, for the record: its records, its captions.
StepInfoFn = Callable[[int], Mapping[str, Any]]

FOLDER = "faults"


class DivergedError(ValueError):
    """The run cannot go on; the message says since when and where the evidence lies."""


class Faults:
    """Counts steps whose update was skipped.

    Args:
      workdir: folder of the run; evidence goes to WORKDIR/faults.
      config: patience and number of roll-backs.
      step_info: what else to write down of a step: records, times.
      log: receives one line per fault.
    """

    def __init__(
        self,
        workdir: str,
        config: TrainConfig,
        step_info: StepInfoFn = lambda step: {},
        log: Callable[[str], None] = print,
    ):
        self._folder = epath.Path(workdir) / FOLDER
        self._config, self._about_step, self._log = config, step_info, log
        self._in_a_row = 0
        self._rolled_back = 0

    def should_roll_back(
        self, step: int, report: Mapping[str, Any], batch: Mapping[str, np.ndarray]
    ) -> bool:
        """Looks at a finished step; True when the last good checkpoint should be restored.

        Args:
          step: the step that made `report`.
          report: its metrics; `finite` tells whether the update was made.
          batch: what it saw, this host's part.

        Raises:
          DivergedError: the patience is used up and the roll-backs are, too.
        """
        if bool(report["finite"]):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        path = self._write(step, report, batch)
        self._log(
            f"step {step}: loss {float(report['loss']):.4g} or its gradient is not finite, update "
            f"skipped ({self._in_a_row} in a row); see {path}"
        )
        if self._in_a_row < self._config.nan_patience:
            return False
        if self._rolled_back >= self._config.rollbacks:
            raise DivergedError(
                f"{self._in_a_row} steps in a row were not finite, the last is step {step}, after "
                f"{self._rolled_back} roll-backs; look at {self._folder} with `imagen replay`, "
                "then lower config.optimizer.learning_rate or mend the data"
            )
        self._in_a_row = 0
        self._rolled_back += 1
        return True

    def _write(
        self, step: int, report: Mapping[str, Any], batch: Mapping[str, np.ndarray]
    ) -> epath.Path:
        """Writes STEP.json and, where several processes share a batch, each its part of it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._folder / f"{step:08d}{part}.json"
        norms = {name: _number(norm) for name, norm in report["block_norms"].items()}
        values = {"step": step, "loss": _number(report["loss"]), **self._about_step(step)}
        values["block_norms"] = norms
        arrays: dict[str, Any] = dict(batch)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path.with_suffix(".npz"))
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        temporary.replace(path)
        return path


def _number(value: Any) -> float | str:
    """A float; what JSON has no number for becomes a word."""
    return float(value) if np.isfinite(value) else str(float(value))


def read(workdir: str, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The evidence of a step: its values, and the batch. Raises DivergedError if there is none."""
    folder = epath.Path(workdir) / FOLDER
    known = sorted({int(path.name.split(".")[0]) for path in folder.glob("*.json")})
    if step not in known:
        listed = ", ".join(map(str, known)) or "none"
        raise DivergedError(f"--step={step}: no such fault in {folder}; there are: {listed}")
    paths = sorted(folder.glob(f"{step:08d}*.json"))
    parts, values = [], [json.loads(path.read_text()) for path in paths]
    for path in paths:
        with path.with_suffix(".npz").open("rb") as file, np.load(file) as arrays:
            parts.append(dict(arrays))
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "records" in values[0]:
        values[0]["records"] = [record for part in values for record in part["records"]]
    return values[0], batch
