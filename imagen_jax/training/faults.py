"""Non-finite loss or gradient: skip the update, record the step, roll back, then stop.

The jitted step skips the update itself. The host reads the `finite` flag one step late, so
dispatch is not blocked, and saves what `imagen replay` needs: the step (which determines batch and
noise), records, timesteps, gradient norms, and a hash and a norm of every row of the batch.
"""

from __future__ import annotations

import hashlib
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
    """Training diverged; the message gives the step and the folder of the faults."""


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
        """Writes STEP.json; with several processes, STEP.PROCESS.json each."""
        part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._folder / f"{step:08d}{part}.json"
        values = {"step": step, "loss": _number(report["loss"]), **self._step_info(step)}
        values.setdefault("rows", list(range(len(next(iter(batch.values()))))))
        values["block_norms"] = {n: _number(norm) for n, norm in report["block_norms"].items()}
        values["batch"] = {name: _describe_rows(array) for name, array in batch.items()}
        atomic.write_json(path, values)
        return path


def _number(value: Any) -> float | str:
    """A float, or the string "nan", "inf" or "-inf", which JSON numbers cannot express."""
    return float(value) if np.isfinite(value) else str(float(value))


def hash_row(row: np.ndarray) -> str:
    """Hash of one example's array, 16 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(row).data).hexdigest()[:16]


def _describe_rows(array: np.ndarray) -> dict[str, list[Any]]:
    """Hash and L2 norm of every row of a batch array: what tells them apart, not the values."""
    norms = [_number(np.linalg.norm(np.asarray(row, np.float64))) for row in array]
    return {"sha256": [hash_row(row) for row in array], "norm": norms}


def read(workdir: str, step: int) -> dict[str, Any]:
    """What the run saved of a step, over all processes.

    Returns:
      step, loss, block_norms, time (of all rows); rows, ascending, and aligned with them records
      (if the run knew them) and batch: name -> {"sha256", "norm"}.

    Raises:
      DivergedError: nothing is saved for this step.
    """
    folder = epath.Path(workdir) / FOLDER
    known = sorted({int(path.name.split(".")[0]) for path in folder.glob("*.json")})
    if step not in known:
        listed = ", ".join(map(str, known)) or "none"
        raise DivergedError(f"--step={step}: no such fault in {folder}; saved faults: {listed}")
    parts = [json.loads(path.read_text()) for path in folder.glob(f"{step:08d}*.json")]
    # Processes that hold the same rows wrote the same; the order of the files does not matter.
    where = {row: (part, i) for part in parts for i, row in enumerate(part["rows"])}
    rows = sorted(where)

    def aligned(values: Callable[[dict[str, Any]], list[Any]]) -> list[Any]:
        return [values(where[row][0])[where[row][1]] for row in rows]

    merged = {**parts[0], "rows": rows}
    if "records" in merged:
        merged["records"] = aligned(lambda part: part["records"])
    merged["batch"] = {
        name: {
            key: aligned(lambda part, name=name, key=key: part["batch"][name][key])
            for key in ("sha256", "norm")
        }
        for name in merged["batch"]
    }
    return merged
