"""Configured names against the registries that own them; before anything is compiled.

`config/` imports no registry, so a new row needs no change there.
"""

from __future__ import annotations

from collections.abc import Collection

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import process, samplers, thresholding, timesteps
from imagen_jax.stages.network import MODELS


def check_names(config: Config, where: str = "config") -> None:
    """Raises ConfigError where a name of the stage is no row of its registry.

    Args:
      config: the stage.
      where: what the message calls the configuration.
    """
    settings, sampling = config.diffusion, config.sampling
    rows: list[tuple[str, str, Collection[str]]] = [
        ("model.name", config.model.name, MODELS),
        ("diffusion.schedule", settings.schedule, process.SCHEDULES),
        ("diffusion.aug_schedule", settings.aug_schedule, process.SCHEDULES),
        ("diffusion.loss_weight", settings.loss_weight, process.LOSS_WEIGHTS),
        ("diffusion.prediction", settings.prediction, process.PREDICTIONS),
        ("sampling.sampler", sampling.sampler, samplers.SAMPLERS),
        ("sampling.spacing", sampling.spacing, timesteps.NAMES),
        ("sampling.thresholding", sampling.thresholding, thresholding.THRESHOLDS),
    ]
    for field, name, registry in rows:
        if name not in registry:
            raise ConfigError(unknown_name(f"{where}.{field}", name, list(registry)))
