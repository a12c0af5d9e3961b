"""The evaluator `distances`: FID and CMMD of samples to the held-out images of their captions."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.evaluation.features import distances, extract, fid, frechet, networks
from imagen_jax.evaluation.features.extract import LazyImages, Network
from imagen_jax.inference.stage_sampler import image_keys, sample_stage
from imagen_jax.io import copies, images
from imagen_jax.parallel import partitioning
from imagen_jax.stages.conditioning import Text
from imagen_jax.training.batch_streams import closing_stream
from imagen_jax.training.evaluations import Evaluation, Proceed

# Folder of the features, of the held-out images and of the last samples.
FOLDER = "features"
# Row of FEATURE_NETWORKS -> name of its distance; of the others, frechet_NAME.
NAMES = {"inception": "fid", "clip": "cmmd"}


def _ignore(line: str) -> None:
    del line


class FeatureDistances:
    """`fid` (Inception), `cmmd` (CLIP) or `frechet_NAME` for each of `evaluate.features`.

    `evaluate.examples` captions of held-out records are sampled once each, at the stage's size and
    with its sampling settings; a super-resolution stage gets the real low-resolution images. The
    distances are to the images of these records. Both depend on the number of images: numbers of
    one run are comparable, numbers of two runs where they have as many.
    """

    def __init__(self, config: Config, held_out: Pipeline, workdir: str):
        """Loads the networks.

        Args:
          config: the stage.
          held_out: batches of the records that training does not read.
          workdir: folder of the run.

        Raises:
          ConfigError: no network is named, or there are too few held-out records.
          EvaluationError, WeightsError: a network cannot be loaded.
        """
        chosen = config.evaluate.features
        if not chosen:
            raise ConfigError(
                "config.evaluate.features=() must name networks for the row distances, such as "
                "('inception=FILE', 'clip=FOLDER')"
            )
        # A record that is sampled twice would count as two images.
        self._count = min(config.evaluate.examples, len(held_out.source))
        if self._count < fid.LEAST_IMAGES:
            raise ConfigError(
                f"config.evaluate.examples={config.evaluate.examples} of "
                f"{len(held_out.source)} held-out records must be at least {fid.LEAST_IMAGES} for "
                "the row distances; raise it, or config.data.held_out"
            )
        self._config, self._held_out = config, held_out
        self._folder = pathlib.Path(workdir) / FOLDER
        self._networks: dict[str, Network] = {}
        for text in chosen:
            name, _, file = text.partition("=")
            self._networks[name], _ = networks.load(name, copies.local(file))
        names = (_metric(name) for name in self._networks)
        self.metrics: Mapping[str, Literal["lower", "higher"]] = dict.fromkeys(names, "lower")

    def __call__(self, params: Any, step: int, name: str, proceed: Proceed) -> Evaluation:
        """See `evaluations.Evaluator`."""
        del step
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for pair in self._batches(params, proceed):
            for part, pixels in zip(parts, pair, strict=True):
                part.append(images.to_uint8(pixels))
        real, sampled = (np.concatenate(part)[: self._count] for part in parts)
        return Evaluation(
            {_metric(key): self._distance(key, real, sampled, name) for key in self._networks}
        )

    def _batches(self, params: Any, proceed: Proceed) -> Any:
        """(real images, samples of their captions), batch by batch."""
        size = self._config.data.batch_size
        mesh = partitioning.make_mesh(self._config.mesh)
        with closing_stream(iter(loaders.batches(self._held_out, 0))) as stream:
            for start in range(0, self._count, size):
                proceed()
                placed = partitioning.place_batch(next(stream), mesh, size)
                batch = {
                    field: partitioning.fetch(value)
                    for field, value in self._held_out.encode(placed).items()
                }
                keys = image_keys(self._config.seed, range(start, start + size), [0] * size)
                text = Text(batch["text_emb"], batch["text_mask"])
                sampled = sample_stage(params, self._config, text, keys, batch.get("lowres"))
                yield batch["image"], partitioning.fetch(sampled)

    def _distance(self, key: str, real: np.ndarray, sampled: np.ndarray, name: str) -> float:
        network = self._networks[key]
        first, second = (
            extract.extract(
                LazyImages(len(pixels), pixels.__getitem__),
                network,
                self._folder / key / folder,
                batch_size=self._config.data.batch_size,
                log=_ignore,
            )
            for folder, pixels in (("real", real), (name, sampled))
        )
        if key == "clip":
            return distances.cmmd(second.features(), first.features())
        gaussians = (part.statistics().gaussian() for part in (second, first))
        return frechet.distance(*gaussians)


def _metric(network: str) -> str:
    return NAMES.get(network, f"frechet_{network}")
