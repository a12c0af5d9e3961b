"""Bad steps: skip the update, record the step, roll back to other data and noise, then stop.

A step is bad if its loss or gradient is not finite, or if its loss is a spike: more than
`train.spike_factor` times the median loss of the last rows of metrics.jsonl. `train.nan_patience`
bad steps in a row make a roll-back. The run then goes on from the last regular checkpoint before
them with the data after the failed step, and the number of roll-backs is folded into the keys.

The jitted step skips a non-finite update itself. The host reads the report one step late, so
dispatch is not blocked, and saves what `imagen replay` needs: the step and the roll-backs (which
determine batch and noise), records, timesteps, gradient norms, and a hash and a norm of every row
of the batch. All that decides is on disk: a run that is killed decides as if it had not been.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from imagen_jax.config.schema import Config
from imagen_jax.io import atomic, jsonl
from imagen_jax.parallel import distributed
from imagen_jax.training.step import step_timesteps

# Further facts about a batch by its position in the data, saved with a fault: records, captions.
StepInfoFn = Callable[[int], Mapping[str, Any]]

FOLDER, ROLLBACKS = "faults", "rollbacks.json"
# Rows of metrics.jsonl whose median loss is the reference of a spike, and the fewest.
SPIKE_ROWS, SPIKE_LEAST = 50, 10


class DivergedError(ValueError):
    """Training diverged; the message gives the step and the folder of the faults."""


@dataclasses.dataclass(frozen=True)
class Rollback:
    """From step `failed` back to the state of step `restored`."""

    restored: int
    failed: int


class Faults:
    """Counts bad steps and decides when to roll back.

    Args:
      workdir: folder of the run; faults are saved to WORKDIR/faults, roll-backs to
        WORKDIR/rollbacks.json.
      config: of the run: `train.nan_patience`, `spike_factor` and `rollbacks`, `checkpoint.every`.
      step_info: further facts to save about a batch.
      log: called with one line per fault.

    Attributes:
      rollbacks: of this run up to the restored step.
      in_a_row: number of bad steps that ended the last check.
    """

    def __init__(
        self,
        workdir: str,
        config: Config,
        step_info: StepInfoFn = lambda position: {},
        log: Callable[[str], None] = print,
    ):
        self._workdir, self._folder = epath.Path(workdir), epath.Path(workdir) / FOLDER
        self._config, self._step_info, self._log = config, step_info, log
        self.rollbacks: list[Rollback] = []
        self.in_a_row = 0
        self._losses: list[float] = []

    def position(self, step: int) -> int:
        """Position in the data of the batch of `step`."""
        return step + sum(back.failed + 1 - back.restored for back in self.rollbacks)

    def resume(self, step: int) -> None:
        """Reads what the run up to `step` has met; every process must call it after a restore."""
        found = self._read(step) if distributed.is_first() else {}
        found = json.loads(distributed.share(json.dumps(found))[0])
        self.rollbacks = [Rollback(**back) for back in found["rollbacks"]]
        self.in_a_row, self._losses = found["in_a_row"], found["losses"]

    def _read(self, step: int) -> dict[str, Any]:
        # Later roll-backs are of a future that is computed, and decided, again.
        rollbacks = [back for back in read_rollbacks(str(self._workdir)) if back.restored <= step]
        in_a_row = 0
        saved = {path.name.split(".")[0]: path for path in self._folder.glob("*.json")}
        while path := saved.get(f"{step - 1 - in_a_row:08d}"):
            if json.loads(path.read_text()).get("rollbacks", 0) != len(rollbacks):
                break
            in_a_row += 1
        metrics, losses = self._workdir / "metrics.jsonl", []
        if metrics.exists():
            rows = [row for _, row in jsonl.read(metrics, default=None) if isinstance(row, dict)]
            of_steps = [row for row in rows if "loss" in row]  # Other rows are evaluations.
            losses = [row["loss"] for row in of_steps if row.get("step", step + 1) <= step]
        return {
            "rollbacks": [dataclasses.asdict(back) for back in rollbacks],
            "in_a_row": in_a_row,
            "losses": losses[-SPIKE_ROWS:],
        }

    def last_good(self, steps: Sequence[int], failed: int) -> int:
        """The checkpoint to which a run rolls back from step `failed`; 0: its start.

        Where SIGTERM saved the run must not matter, so a regular checkpoint (a multiple of
        `checkpoint.every`) comes first.
        """
        first, every = failed + 1 - self._config.train.nan_patience, self._config.checkpoint.every
        before = [step for step in steps if step <= first]
        regular = [step for step in before if step % every == 0]
        if regular or first < every or not steps:
            return max(regular, default=0)
        return max(before, default=min(steps))

    def roll_back(self, restored: int, failed: int) -> None:
        """Records a roll-back; call after the restore and `resume`."""
        self.rollbacks.append(Rollback(restored, failed))
        self.in_a_row = 0
        if distributed.is_first():
            rows = [dataclasses.asdict(back) for back in self.rollbacks]
            atomic.write_json(self._workdir / ROLLBACKS, rows)
        self._log(
            f"roll-back {len(self.rollbacks)} of {self._config.train.rollbacks}, from step "
            f"{failed} to {restored}, whose batch is now that of step {self.position(restored)}"
        )

    def remember(self, loss: float) -> None:
        """Adds the loss of a row of metrics.jsonl to the reference of a spike."""
        self._losses = [*self._losses, loss][-SPIKE_ROWS:]

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
        finite, loss = bool(report["finite"]), float(report["loss"])
        spike = self._spike(loss) if finite else ""
        if finite and not spike:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        path = self._write(step, report, batch)
        what = spike or f"loss {loss:.4g} or its gradient is not finite, update skipped"
        self._log(f"step {step}: {what} ({self.in_a_row} in a row); see {path}")
        if self.in_a_row < self._config.train.nan_patience:
            return False
        if len(self.rollbacks) >= self._config.train.rollbacks:
            kind = "loss spikes" if finite else "not finite"
            raise DivergedError(
                f"{self.in_a_row} steps in a row were {kind}, the last is step {step}, "
                f"after {len(self.rollbacks)} roll-backs; inspect {self._folder} with "
                "`imagen replay`, then lower config.optimizer.learning_rate or fix the data"
            )
        return True

    def _spike(self, loss: float) -> str:
        """What makes `loss` a spike; empty if it is none."""
        factor, known = self._config.train.spike_factor, [x for x in self._losses if np.isfinite(x)]
        if factor is None or len(known) < SPIKE_LEAST:
            return ""
        median = statistics.median(known)
        if loss <= factor * median:
            return ""
        return f"loss {loss:.4g} exceeds {factor:g} * {median:.4g}"

    def _write(
        self, step: int, report: Mapping[str, Any], batch: Mapping[str, np.ndarray]
    ) -> epath.Path:
        """Writes STEP.json; with several processes, STEP.PROCESS.json each."""
        part = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        path, rollbacks = self._folder / f"{step:08d}{part}.json", len(self.rollbacks)
        values = {"step": step, "loss": _number(report["loss"])}
        values |= {"rollbacks": rollbacks, "position": self.position(step)}
        values |= self._step_info(self.position(step))
        values["time"] = step_timesteps(self._config, step, rollbacks)
        values.setdefault("rows", list(range(len(next(iter(batch.values()))))))
        values["block_norms"] = {n: _number(norm) for n, norm in report["block_norms"].items()}
        values["batch"] = {name: _describe_rows(array) for name, array in batch.items()}
        atomic.write_json(path, values)
        return path


def read_rollbacks(workdir: str) -> list[Rollback]:
    """All roll-backs of a run, in their order."""
    path = epath.Path(workdir) / ROLLBACKS
    return [Rollback(**back) for back in json.loads(path.read_text())] if path.exists() else []


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
