"""The evaluators of `train` by name: each row builds one from the configuration and the data.

A new evaluator is a callable (`training.evaluations.Evaluator`) and a row of EVALUATORS; outside
the package, an entry point of the group `imagen_jax.evaluators` or `package.module:make`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from imagen_jax.cli.distance_evaluator import FeatureDistances
from imagen_jax.cli.sampling_evaluators import HeldOutSamples, ScoredSamples
from imagen_jax.config import plugins
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.training.evaluations import Evaluator
from imagen_jax.training.validation_loss import ValidationLoss

Make = Callable[[Config, Pipeline, str], Evaluator]


def _validation_loss(config: Config, pipeline: Pipeline, workdir: str) -> Evaluator:
    del workdir
    return ValidationLoss(
        config,
        held_out=functools.partial(loaders.batches, _held_out(config, pipeline)),
        training=functools.partial(loaders.batches, pipeline),
        encode=pipeline.encode,
    )


def _samples(config: Config, pipeline: Pipeline, workdir: str) -> Evaluator:
    del workdir
    held_out = functools.partial(loaders.batches, _held_out(config, pipeline))
    return HeldOutSamples(config, held_out, pipeline.encode)


def _scorer(config: Config, pipeline: Pipeline, workdir: str) -> Evaluator:
    del pipeline
    return ScoredSamples(config, workdir)


def _distances(config: Config, pipeline: Pipeline, workdir: str) -> Evaluator:
    return FeatureDistances(config, _held_out(config, pipeline), workdir)


def _held_out(config: Config, pipeline: Pipeline) -> Pipeline:
    if not config.data.held_out:
        raise ConfigError(
            f"config.evaluate.evaluators={config.evaluate.evaluators} need held-out data, but "
            "config.data.held_out=0; try 0.02, or set config.evaluate.every=0"
        )
    return pipeline.held_out()


EVALUATORS: dict[str, Make] = {
    "validation_loss": _validation_loss,
    "samples": _samples,
    "scorer": _scorer,
    "distances": _distances,
}


def make_evaluators(config: Config, pipeline: Pipeline, workdir: str) -> dict[str, Evaluator]:
    """The evaluators of `evaluate.evaluators` by name; {} where `evaluate.every` is 0.

    Args:
      config: of the run.
      pipeline: its training batches.
      workdir: folder of the run.

    Raises:
      ConfigError: an unknown name, or one that the configuration does not provide for.
    """
    if not config.evaluate.every:
        return {}
    field = "config.evaluate.evaluators"
    return {
        name: plugins.find(field, name, plugins.EVALUATORS, EVALUATORS)(config, pipeline, workdir)
        for name in config.evaluate.evaluators
    }
