"""The folder of a noise-aware classifier, which guides a stage (classifier guidance).

    classifier.json      the network, the size of its images and the classes of each attribute
    params.safetensors   the parameters

`benchmarks/classifier_guidance.py` trains and writes one; `Cascade.load`
and `sample --classifier` read it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.config.schema import ModelConfig
from imagen_jax.interop import shards, weights
from imagen_jax.io import atomic
from imagen_jax.models import classifier
from imagen_jax.parallel import partitioning
from imagen_jax.stages.folder import PARAMS_FILE, has_params, weights_hash, write_params

CONFIG_FILE = "classifier.json"
UNKNOWN = -1  # Label of an attribute that is not given.


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is, and what its logits mean.

    Attributes:
      model: shape of the network, see `models.classifier.Classifier`.
      image_size: of its images, pixels; it guides the stage of this size.
      classes: attributes, each its name and the names of its classes.
    """

    model: ModelConfig
    image_size: int
    classes: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def network(self) -> classifier.Classifier:
        """The network."""
        return classifier.Classifier(self.model, tuple(len(names) for _, names in self.classes))

    def labels(self, rows: Sequence[Mapping[str, str]]) -> Int[np.ndarray, "n k"]:
        """The label of each attribute, UNKNOWN where a row leaves it out.

        Args:
          rows: class names by attribute.

        Raises:
          ConfigError: no such attribute or class.
        """
        known = dict(self.classes)
        for row in rows:
            for attribute, name in row.items():
                if attribute not in known:
                    raise ConfigError(unknown_name("classes: attribute", attribute, list(known)))
                if name not in known[attribute]:
                    field = f"classes: {attribute}"
                    raise ConfigError(unknown_name(field, name, list(known[attribute])))
        return np.array(
            [
                [names.index(row[key]) if key in row else UNKNOWN for key, names in self.classes]
                for row in rows
            ],
            np.int32,
        ).reshape(len(rows), len(known))


class TrainedClassifier(NamedTuple):
    """A classifier: its configuration with its parameters."""

    config: ClassifierConfig
    params: Any

    def log_prob(
        self, z: Float[Array, "b h w c"], logsnr: Float[Array, " b"], labels: Int[Array, "b k"]
    ) -> Float[Array, " b"]:
        """log p(labels | z) of each image, nats, summed over its known attributes."""
        logits: Any = self.config.network.apply({"params": self.params}, z, logsnr)
        return classifier.log_prob(logits, labels)


def load_classifier(path: str) -> TrainedClassifier:
    """Reads the folder of a classifier.

    Raises:
      ConfigError: a file is missing, or classifier.json describes none.
      WeightsError: the parameters are damaged, or not those of the network.
    """
    folder = pathlib.Path(path)
    for name, found in (
        (CONFIG_FILE, (folder / CONFIG_FILE).is_file()),
        (PARAMS_FILE, has_params(folder)),
    ):
        if not found:
            raise ConfigError(f"--classifier: {folder} has no {name}; give a classifier's folder")
    try:
        values = json.loads((folder / CONFIG_FILE).read_text())
        model = overrides.from_dict(ModelConfig, values["model"], "model")
        classes = tuple((name, _names(names)) for name, names in values["classes"].items())
        config = ClassifierConfig(model, int(values["image_size"]), classes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error!r}; write it again") from error
    params = shards.read_shards(folder / PARAMS_FILE)
    shape = (1, config.image_size, config.image_size, 3)
    boxed = jax.eval_shape(
        config.network.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros((1,))
    )
    expected = partitioning.unbox(boxed["params"])
    weights.check_parameters(
        folder / PARAMS_FILE,
        {name: array.shape for name, array in params.items()},
        {name: array.shape for name, array in weights.flatten(expected).items()},
    )
    return TrainedClassifier(config, weights.unflatten(params))


def classifier_hash(path: str) -> str:
    """Hash of the parameters and of what they mean; samples record it."""
    config = (pathlib.Path(path) / CONFIG_FILE).read_bytes()
    return weights_hash(path) + hashlib.sha256(config).hexdigest()[:8]


def _names(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"classes {found!r} must be a list of names")
    return tuple(found)


def write_classifier(path: str | pathlib.Path, trained: TrainedClassifier) -> None:
    """Writes the folder of a classifier atomically; replaces an older one.

    Raises:
      OutputError: `path` exists and is no such folder.
    """
    config = trained.config
    values = {
        "image_size": config.image_size,
        "classes": {name: list(names) for name, names in config.classes},
        "model": dataclasses.asdict(config.model),
    }
    folder = atomic.check_replaceable(str(path), CONFIG_FILE, "classifier's folder")
    with atomic.folder(folder) as temporary:
        write_params(temporary, trained.params)
        (temporary / CONFIG_FILE).write_text(json.dumps(values, indent=1) + "\n")
