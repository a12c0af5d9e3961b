"""Non-finite loss or gradient: skip the update, save the batch, roll back, then stop.

The jitted step skips the update itself. The host reads the `finite` flag one step late, so
dispatch is not blocked, and saves the data for `imagen replay`: the batch, its records and
timesteps, and the gradient norm of each block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from imagen_jax.config.schema import TrainConfig
from imagen_jax.io import atomic

# Further facts about the batch of a step, saved with a fault: records, captions.
StepInfoFn = Callable[[int], Mapping[str, Any]]

FOLDER = "faults"


class DivergedError(ValueError):
    """Training diverged; the message gives the step and the folder of saved batches."""


class Faults:
    """Counts skipped updates and decides when to roll back.

    Args:
      workdir: folder of the run; faults are saved to WORKDIR/faults.
      config: `nan_patience` and `rollbacks`.
      step_info: further facts to save about a step, such as records and timesteps.
      log: called with one line per fault.
    """

    def __init__(
        self,
        workdir: str,
        config: TrainConfig,
        step_info: StepInfoFn = lambda step: {},
        log: Callable[[str], None] = print,
    ):
        self._folder = epath.Path(workdir) / FOLDER
        self._config, self._step_info, self._log = config, step_info, log
        self._consecutive = 0
        self._rollbacks = 0

    def should_roll_back(
        self, step: int, report: Mapping[str, Any], batch: Mapping[str, np.ndarray]
    ) -> bool:
        """Checks a finished step; True if the newest checkpoint should be restored.

        Args:
          step: the step that returned `report`.
          report: metrics of the step; `finite` is False if the update was skipped.
          batch: this host's part of the batch of the step.

        Raises:
          DivergedError: `nan_patience` is exceeded after all `rollbacks`.
        """
        if bool(report["finite"]):
            self._consecutive = 0
            return False
        self._consecutive += 1
        path = self._write(step, report, batch)
        self._log(
            f"step {step}: loss {float(report['loss']):.4g} or its gradient is not finite, update "
            f"skipped ({self._consecutive} in a row); see {path}"
        )
        if self._consecutive < self._config.nan_patience:
            return False
        if self._rollbacks >= self._config.rollbacks:
            raise DivergedError(
                f"{self._consecutive} steps in a row were not finite, the last is step {step}, "
                f"after {self._rollbacks} roll-backs; inspect {self._folder} with "
                "`imagen replay`, then lower config.optimizer.learning_rate or fix the data"
            )
        self._consecutive = 0
        self._rollbacks += 1
        return True

    def _write(
        self, step: int, report: Mapping[str, Any], batch: Mapping[str, np.ndarray]
    ) -> epath.Path:
        """Writes STEP.json and STEP.npz; with several processes, one pair per process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._folder / f"{step:08d}{part}.json"
        norms = {name: _number(norm) for name, norm in report["block_norms"].items()}
        values = {"step": step, "loss": _number(report["loss"]), **self._step_info(step)}
        values["block_norms"] = norms
        arrays: dict[str, Any] = dict(batch)
        with atomic.file(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        atomic.write_json(path, values)
        return path


def _number(value: Any) -> float | str:
    """A float, or the string "nan", "inf" or "-inf", which JSON numbers cannot express."""
    return float(value) if np.isfinite(value) else str(float(value))


def read(workdir: str, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The saved values and batch of a step. Raises DivergedError if none are saved."""
    folder = epath.Path(workdir) / FOLDER
    known = sorted({int(path.name.split(".")[0]) for path in folder.glob("*.json")})
    if step not in known:
        listed = ", ".join(map(str, known)) or "none"
        raise DivergedError(f"--step={step}: no such fault in {folder}; saved faults: {listed}")
    paths = sorted(folder.glob(f"{step:08d}*.json"))
    parts, values = [], [json.loads(path.read_text()) for path in paths]
    for path in paths:
        with path.with_suffix(".npz").open("rb") as file, np.load(file) as arrays:
            parts.append(dict(arrays))
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "records" in values[0]:
        values[0]["records"] = [record for part in values for record in part["records"]]
    return values[0], batch
