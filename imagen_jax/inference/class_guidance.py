"""Classifier guidance of a request: its labels, and the classifier on the devices of a stage."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Int

from imagen_jax.config.schema import Config
from imagen_jax.inference import placement
from imagen_jax.inference.request import RequestError, SampleRequest
from imagen_jax.parallel import partitioning
from imagen_jax.stages.classifier import TrainedClassifier


def labels_of(
    trained: TrainedClassifier | None, request: SampleRequest
) -> Int[np.ndarray, "n k"] | None:
    """The labels of the classes of a request; None: it has none, and there is no classifier.

    Raises:
      RequestError: classes without a classifier, or a classifier without classes.
      ConfigError: no such attribute or class.
    """
    if (trained is None) != (request.classes is None):
        raise RequestError(
            "classes and a classifier go together; load one by Cascade.load(classifier=DIR) or "
            "--classifier=DIR, and give the classes of each image"
        )
    if trained is None or request.classes is None:
        return None
    return trained.config.labels(request.classes)


def placed(trained: TrainedClassifier | None, config: Config) -> TrainedClassifier | None:
    """The classifier on the devices of a stage; None: it guides another one."""
    if trained is None or trained.config.image_size != config.data.image_size:
        return None
    mesh = placement.make_mesh(config.sampling) or partitioning.local_mesh()
    return trained._replace(params=jax.device_put(trained.params, partitioning.replicated(mesh)))
