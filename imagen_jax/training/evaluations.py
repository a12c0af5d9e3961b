"""Evaluations in training: callables given to `train`, run on a schedule, on several parameters.

An evaluation reads fixed data with fixed randomness, so its numbers depend on the parameters alone:
one that SIGTERM interrupts is repeated when the run resumes, with the same result. Its numbers are
a row of metrics.jsonl without `loss`, after that of the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.io import jsonl
from imagen_jax.parallel import distributed
from imagen_jax.training import ema
from imagen_jax.training.metrics import RANKABLE, check_rankable
from imagen_jax.training.state import TrainState, evaluated_params

Scalars = Mapping[str, float]
# Called between two parts of an evaluation; raises where the run must stop.
Proceed = Callable[[], None]
RAW = "params"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluator.

    Attributes:
      scalars: numbers by name; all of `Evaluator.metrics` and any others.
      images: uint8 images by name.
    """

    scalars: Scalars
    images: Mapping[str, UInt8[np.ndarray, "h w 3"]] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Evaluator(Protocol):
    """Evaluates parameters; every process calls it, and gets the same numbers.

    Attributes:
      metrics: numbers that every result has, by which checkpoints can be ranked: name -> which
        values are better.
    """

    @property
    def metrics(self) -> Mapping[str, Literal["lower", "higher"]]: ...

    def __call__(self, params: Any, step: int, name: str, proceed: Proceed) -> Evaluation:
        """Evaluates.

        Args:
          params: of the whole network, sharded over the active mesh.
          step: number of updates.
          name: of the parameters, an entry of `evaluate.averages`.
          proceed: to call between batches.
        """
        ...


class Evaluations:
    """The evaluators of a run and their schedule.

    Attributes:
      latest: metrics of the last evaluation of this process, by name.
      at: its step; None: none yet.
    """

    def __init__(self, config: Config, workdir: str, evaluators: Mapping[str, Evaluator]):
        """Checks the schedule.

        Args:
          config: `evaluate`, `checkpoint` and `train.steps` of the run.
          workdir: folder of the run.
          evaluators: by name.

        Raises:
          ConfigError: `evaluate.averages` names no average of the run, or `checkpoint.best_metric`
            is unknown, or not evaluated at every checkpoint.
        """
        self._config, self._workdir, self._evaluators = config, workdir, dict(evaluators)
        self.latest: dict[str, float] = {}
        self.at: int | None = None
        averages, known = config.evaluate.averages, (*ema.names(config.ema), RAW)
        for name in averages:
            if name not in known:
                raise ConfigError(unknown_name("config.evaluate.averages", name, known))
        self._better = {
            f"{name}/{metric}": better
            for name in averages
            for evaluator in self._evaluators.values()
            for metric, better in evaluator.metrics.items()
        }
        best, every = config.checkpoint.best_metric, config.evaluate.every
        check_rankable(best, tuple(self._better) if every else ())
        if self.ranks(config.train.steps) and config.checkpoint.every % every:
            raise ConfigError(
                f"config.checkpoint.every={config.checkpoint.every} must be a multiple of "
                f"config.evaluate.every={every}, so that every checkpoint has "
                f"config.checkpoint.best_metric={best!r}"
            )

    def ranks(self, step: int) -> bool:
        """Whether the checkpoint of `step` is due and ranked by an evaluation."""
        checkpoint = self._config.checkpoint
        due = step % checkpoint.every == 0 or step == self._config.train.steps
        return bool(checkpoint.keep_best) and checkpoint.best_metric not in RANKABLE and due

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after `step` updates."""
        every = self._config.evaluate.every
        ends = step == self._config.train.steps
        return bool(every and self._evaluators) and (step % every == 0 or ends)

    def missing(self, step: int) -> bool:
        """Whether the evaluation after `step` is due and not written; every process calls it."""
        if not self.due(step):
            return False
        written = distributed.is_first() and self._is_written(step)
        return not any(text == "written" for text in distributed.share("written" * written))

    def _is_written(self, step: int) -> bool:
        path = epath.Path(self._workdir) / "metrics.jsonl"
        rows = jsonl.read(path, default=None) if path.exists() else ()
        names = tuple(f"{name}/" for name in self._config.evaluate.averages)
        return any(
            isinstance(row, dict)
            and row.get("step") == step
            and any(k.startswith(names) for k in row)
            for _, row in rows
        )

    def run(self, step: int, state: TrainState, proceed: Proceed) -> Evaluation:
        """All evaluators on all of `evaluate.averages`: `AVERAGE/METRIC`, `IMAGE_AVERAGE`."""
        scalars: dict[str, float] = {}
        images: dict[str, np.ndarray] = {}
        for name in self._config.evaluate.averages:
            params = evaluated_params(state, None if name == RAW else name)
            for evaluator in self._evaluators.values():
                found = evaluator(params, step, name, proceed)
                scalars |= {f"{name}/{k}": float(v) for k, v in found.scalars.items()}
                images |= {f"{k}_{name}": image for k, image in found.images.items()}
        self.latest, self.at = scalars, step
        return Evaluation(scalars, images)

    def score(self, step: int, report: Mapping[str, Any]) -> dict[str, float]:
        """The score of a checkpoint for `checkpoint.keep_best`, lower is better; {}: it has none.

        Args:
          step: of the checkpoint.
          report: of the last train step.
        """
        best = self._config.checkpoint.best_metric
        if not self._config.checkpoint.keep_best:
            return {}
        if best in RANKABLE:
            return {best: float(jax.device_get(report[best]))}
        if self.at != step:
            return {}
        return {best: self.latest[best] * (-1.0 if self._better[best] == "higher" else 1.0)}

    def line(self) -> str:
        """The latest metrics without those by noise level, for the log."""
        shown = (f"{k} {v:.4g}" for k, v in self.latest.items() if "logsnr" not in k)
        return f"evaluation at step {self.at}  " + "  ".join(shown)
