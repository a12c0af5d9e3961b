"""LoRAs of a request: `[STAGE=]PATH[@WEIGHT]`, added to the parameters of loaded stages."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import Config
from imagen_jax.io import copies, paths
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


def names(specs: Sequence[LoraSpec]) -> list[str]:
    """The names of a stage's LoRAs in requests.

    The last part of the path; the path if two share it, and with a number where it is given twice.
    """
    short = [pathlib.PurePath(spec.path).name.removesuffix(".safetensors") for spec in specs]
    found: list[str] = []
    for name, spec in zip(short, specs, strict=True):
        name = name if short.count(name) == 1 else spec.path
        found.append(name if name not in found else f"{name}#{len(found) + 1}")
    return found


def with_loras(configs: Sequence[Config], specs: Sequence[LoraSpec]) -> list[Config]:
    """Configurations whose `sampling.loras` are all that are loaded, with their weights.

    Raises:
      ConfigError: as `of_stages`.
    """
    changed = []
    for config, own in zip(configs, of_stages(specs, configs), strict=True):
        loras = tuple(f"{n}@{spec.weight}" for n, spec in zip(names(own), own, strict=True))
        sampling = dataclasses.replace(config.sampling, loras=loras)
        changed.append(dataclasses.replace(config, sampling=sampling))
    return changed


def weights(texts: Sequence[str], loaded: Sequence[str], where: str) -> dict[str, float]:
    """Name -> weight of the LoRAs of a request.

    Args:
      texts: NAME@WEIGHT, or NAME for the weight 1.
      loaded: the same of all that are loaded.
      where: names the field in messages.

    Raises:
      ConfigError: a LoRA is not loaded or given twice, or its weight is no number.
    """
    known = [text.rpartition("@")[0] for text in loaded]
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = (text, "", "1") if text in known else text.rpartition("@")
        if name not in known:
            raise ConfigError(unknown_name(f"{where}: LoRA", name or text, known or ["(none)"]))
        try:
            weight = float(number)
        except ValueError:
            weight = math.inf
        if not abs(weight) < math.inf or name in found:
            raise ConfigError(f"{where}={text!r} must be NAME@WEIGHT, once, such as {name}@0.8")
        found[name] = weight
    return found


def read(specs: Sequence[LoraSpec], config: Config) -> dict[str, lora.Adapter]:
    """The LoRAs of a stage by their names. Raises WeightsError."""
    return {name: _read(spec, config) for name, spec in zip(names(specs), specs, strict=True)}


def digest(specs: Sequence[LoraSpec], config: Config) -> str:
    """A short hash of LoRAs and weights, beside that of the stage's file; "" for none."""
    if not specs:
        return ""
    hashed = hashlib.sha256()
    for spec in specs:
        for path, pair in sorted(_read(spec, config).items()):
            hashed.update(path.encode())
            for array in pair:
                hashed.update(array.tobytes())
        hashed.update(str(spec.weight).encode())
    return f"+{hashed.hexdigest()[:16]}"


def _read(spec: LoraSpec, config: Config) -> dict[str, lora.Factors]:
    with copies.reading(spec.path) as path:
        return lora_file.read(path, config)
