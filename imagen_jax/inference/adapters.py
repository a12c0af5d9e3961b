"""LoRAs of a request: `[STAGE=]PATH[@WEIGHT]`, added to the parameters of loaded stages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.io import paths
from imagen_jax.stages import lora, lora_file


class LoraSpec(NamedTuple):
    """A LoRA to use.

    Attributes:
      stage: name of the stage; "": the only one.
      path: as of `lora_file.read`.
      weight: factor of its updates.
    """

    stage: str
    path: str
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.stage}={self.path}@{self.weight:g}"


def parse(text: str) -> LoraSpec:
    """Reads `[STAGE=]PATH[@WEIGHT]`. Raises ConfigError."""
    stage, equals, rest = text.partition("=")
    stage, rest = (stage, rest) if equals else ("", text)
    path, at, weight = rest.rpartition("@")
    try:
        value = float(weight) if at else 1.0
    except ValueError:
        path, at, value = rest, "", 1.0  # The @ is part of the path.
    path = path if at else rest
    if not path or not abs(value) < float("inf"):
        raise ConfigError(
            f"--loras={text!r} must be [STAGE=]PATH[@WEIGHT], such as base=runs/cat@0.8"
        )
    return LoraSpec(stage, paths.home(path), value)


def of_stages(specs: Sequence[LoraSpec], configs: Sequence[Config]) -> list[list[LoraSpec]]:
    """The LoRAs of each stage. Raises ConfigError where a stage is unknown or not named."""
    names = [config.name for config in configs]
    found: list[list[LoraSpec]] = [[] for _ in configs]
    for spec in specs:
        if not spec.stage and len(names) > 1:
            raise ConfigError(
                f"--loras={spec.path}: name its stage, {names[0]}={spec.path}; the stages are "
                f"{', '.join(names)}"
            )
        if spec.stage and spec.stage not in names:
            raise ConfigError(unknown_name("--loras: stage", spec.stage, names))
        found[names.index(spec.stage) if spec.stage else 0].append(spec)
    return found


def read(specs: Sequence[LoraSpec], config: Config) -> list[tuple[lora.Adapter, float]]:
    """The LoRAs of a stage with their weights. Raises WeightsError."""
    return [(lora_file.read(spec.path, config), spec.weight) for spec in specs]


def digest(specs: Sequence[LoraSpec], config: Config) -> str:
    """A short hash of LoRAs and weights, beside that of the stage's file; "" for none."""
    if not specs:
        return ""
    hashed = hashlib.sha256()
    for spec in specs:
        for path, pair in sorted(lora_file.read(spec.path, config).items()):
            hashed.update(path.encode())
            for array in pair:
                hashed.update(array.tobytes())
        hashed.update(str(spec.weight).encode())
    return f"+{hashed.hexdigest()[:16]}"
