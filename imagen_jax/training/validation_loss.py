"""The loss on held-out examples at fixed times, noise and data, and its gap to training examples.

Times, noise, dropped captions and aug_level of a batch are those of a training step with a key of
their own, the same at every evaluation and for both parts of the data. So a difference between two
evaluations is one of the parameters, and a difference between the parts one of the examples. There
is no dropout.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.config.schema import Config
from imagen_jax.parallel import partitioning
from imagen_jax.stages.loss import loss_given_randomness, sample_randomness
from imagen_jax.training.batch_streams import Batches, Encode, closing_stream
from imagen_jax.training.evaluations import Evaluation, Proceed
from imagen_jax.training.metrics import mean_loss_by_noise_level

# Beside the streams of step.py and inference/stage_sampler.py.
EVALUATE_STREAM = 3


class ValidationLoss:
    """`validation_loss`, `training_loss` and `loss_gap`, their difference; also by noise level."""

    metrics: Mapping[str, Literal["lower", "higher"]] = {
        "validation_loss": "lower",
        "loss_gap": "lower",
    }

    def __init__(
        self,
        config: Config,
        *,
        held_out: Batches,
        training: Batches,
        encode: Encode = lambda batch: batch,
    ):
        """Reads nothing yet.

        Args:
          config: the stage; `evaluate.examples` of each part are read.
          held_out: batches that training does not read, from a position on.
          training: those that it reads.
          encode: as in `train`.
        """
        self._config, self._encode = config, encode
        self._parts = {"validation": held_out, "training": training}
        self._batches = -(-config.evaluate.examples // config.data.batch_size)
        self._key = jax.random.fold_in(jax.random.key(config.seed), EVALUATE_STREAM)
        self._loss = jax.jit(self._by_noise_level, compiler_options=partitioning.forward_options())

    def __call__(self, params: Any, step: int, name: str, proceed: Proceed) -> Evaluation:
        """See `evaluations.Evaluator`."""
        del step, name
        scalars: dict[str, float] = {}
        sums = {part: self._sum(part, params, proceed) for part in self._parts}
        for part, by_level in sums.items():
            scalars[f"{part}_loss"] = float(by_level[0].sum() / by_level[1].sum())
            levels = mean_loss_by_noise_level(by_level)
            scalars |= {f"{part}_{level}": value for level, value in levels.items()}
        for metric, value in list(scalars.items()):
            if metric.startswith("validation_loss"):
                gap = metric.replace("validation_loss", "loss_gap")
                scalars[gap] = value - scalars[metric.replace("validation", "training")]
        return Evaluation(scalars)

    def _sum(self, part: str, params: Any, proceed: Proceed) -> Float[np.ndarray, "2 levels"]:
        """Summed loss and number of examples per interval of logsnr."""
        mesh, size = partitioning.make_mesh(self._config.mesh), self._config.data.batch_size
        found = []
        with closing_stream(iter(self._parts[part](0))) as stream:
            for index, batch in enumerate(itertools.islice(stream, self._batches)):
                proceed()
                placed = self._encode(partitioning.place_batch(batch, mesh, size))
                key = jax.random.fold_in(self._key, index)
                found.append(self._loss(params, placed, key))
        proceed()
        return np.asarray(jax.device_get(found), np.float64).sum(axis=0)

    def _by_noise_level(self, params: Any, batch: Mapping[str, Array], key: Any) -> Array:
        randomness = sample_randomness(key, len(batch["image"]), self._config)
        _, report = loss_given_randomness(params, {**batch, **randomness}, None, self._config)
        by_level = report["loss_by_noise_level"]
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return by_level
        return jax.lax.with_sharding_constraint(by_level, partitioning.replicated(mesh))
