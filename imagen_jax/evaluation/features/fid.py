"""FID, KID, precision and recall of a folder of images against a reference (Sec. 4, Table 1).

Preprocessing: largest centred square, resized to one size by Pillow's bicubic filter (unchanged if
it has that size), resized to Inception's input by a named filter (resizing.py). Inception gives
2048 features (extract.py). The card records everything that determines a score.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from imagen_jax.config.fields import unknown_name
from imagen_jax.data.sources.folder import list_files
from imagen_jax.data.sources.names import is_image
from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import clip_score, distances, extract, frechet
from imagen_jax.evaluation.features.extract import LazyImages, Network, Parts
from imagen_jax.evaluation.features.frechet import Gaussian
from imagen_jax.evaluation.features.resizing import DEFAULT_FILTER, FILTERS, NATIVE, filter_name
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import hf_clip, inception
from imagen_jax.io import images
from imagen_jax.models.inception import Inception

SQUARE_FILTER = "bicubic"
# Groups of the jackknife: the interval's half width then has a relative error of about 10%.
RESAMPLES = 50
# Precision and recall depend on the number of images; at most this many of each are compared.
PRECISION_RECALL_IMAGES = 10_000
KID_IMAGES = 10_000  # Of each set; the time grows with the square.
# A score of fewer images says more about their number than about the images.
LEAST_IMAGES = 50


class Settings(NamedTuple):
    """Settings of a measurement.

    Attributes:
      inception: file of Inception's weights.
      filter: row of `resizing.FILTERS`.
      size: side of the images, pixels; 0: the shortest side of all samples.
      clip: Hugging Face CLIP folder for CMMD; "": none.
      batch_size: images per batch.
      resamples: groups of images of the jackknife.
    """

    inception: str
    filter: str = DEFAULT_FILTER
    size: int = 0
    clip: str = ""
    batch_size: int = 32
    resamples: int = RESAMPLES


class Reference(NamedTuple):
    """The reference of the distances.

    Attributes:
      gaussian: mean and covariance of its features.
      about: fields of the card.
      parts: its features; None if only statistics are known.
      clip_parts: its CLIP embeddings; None without a CLIP.
    """

    gaussian: Gaussian
    about: dict[str, Any]
    parts: Parts | None = None
    clip_parts: Parts | None = None


@jax.jit
def _inception_features(params: Any, inputs: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    features: Any = Inception().apply({"params": params}, inputs)
    return features


def inception_network(path: str, filter: str) -> tuple[Network, dict[str, Any]]:
    """Inception as a feature network, and its fields of the card.

    Raises:
      EvaluationError: unknown filter. WeightsError: the file is not FID's Inception.
    """
    filter = filter_name(filter)
    if filter not in FILTERS:
        raise EvaluationError(unknown_name("--filter", filter, list(FILTERS)))
    params, sha256 = inception.read(path)
    about = {
        "filter": filter,
        "inception_sha256": sha256,
        "inception_file": pathlib.Path(path).name,
        "inception_file_sha256": _sha256_of_file(path),
    }
    network = Network(f"inception {sha256} {filter}", FILTERS[filter], _inception_features, params)
    return network, about


def load_images(folder: str, size: int = 0, filter: str = DEFAULT_FILTER) -> tuple[LazyImages, int]:
    """The images of a folder, cropped to squares and resized; of a NATIVE filter as they are.

    Args:
      folder: folder with a samples.jsonl, in its order, or with image files at any depth, by name.
      size: side, pixels; 0: the shortest side of all images, which no file name affects.
      filter: row of `resizing.FILTERS`.

    Returns:
      The images and their side; 0: they have any size.

    Raises:
      EvaluationError: no such folder, or fewer than two images in it.
    """
    root = pathlib.Path(folder)
    if (root / "samples.jsonl").is_file():
        files = [row["file"] for row in samples.read_rows(folder)]
    elif root.is_dir():
        files = [file.name for file in list_files(root) if is_image(file.name)]
    else:
        raise EvaluationError(f"{folder} is not a folder of images")
    if len(files) < 2:
        raise EvaluationError(f"{folder} holds {len(files)} images; at least 2 are needed")
    if filter_name(filter) in NATIVE:
        if size:
            raise EvaluationError(
                f"--size={size} does not go with --filter={filter}, which resizes whole images; "
                "leave it out"
            )
        return LazyImages(len(files), lambda i: samples.load(folder, files[i])), 0
    size = size or min(samples.shorter_side(folder, file) for file in files)
    load = lambda i: center_square(samples.load(folder, files[i]), size)  # noqa: E731
    return LazyImages(len(files), load), size


def center_square(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Preprocessing of every image, generated or real."""
    return images.center_crop_resize(image, size, SQUARE_FILTER)


def evaluate(
    samples_dir: str,
    reference: str,
    store: str | pathlib.Path,
    settings: Settings,
    *,
    log: Callable[[str], None] = print,
) -> tuple[dict[str, Any], Reference]:
    """Scores a folder of generated images.

    Args:
      samples_dir: folder of generated images.
      reference: folder of real images, or an .npz of statistics (see `frechet.load`).
      store: folder of the feature cache; an interrupted run resumes.
      settings: settings of the measurement.
      log: receives progress lines.

    Returns:
      The card, and the reference, whose statistics can be saved.

    Raises:
      EvaluationError, WeightsError: something is missing or does not fit, or there are fewer than
        LEAST_IMAGES images.
    """
    network, about = inception_network(settings.inception, settings.filter)
    generated, size = load_images(samples_dir, settings.size, settings.filter)
    check_count(generated.count, f"--samples={samples_dir}")
    about["size"] = size
    towers = hf_clip.read_towers(settings.clip) if settings.clip else None
    extractor = FeatureExtractor(network, towers, pathlib.Path(store), settings.batch_size, log)
    if reference.endswith(".npz"):
        compared = read_reference(reference, about)
        if compared.gaussian.count:
            check_count(compared.gaussian.count, f"--reference={reference}")
    else:
        real, _ = load_images(reference, size, settings.filter)
        check_count(real.count, f"--reference={reference}")
        compared = compute_reference(extractor, real, about)
    card = {"card": "fid", **score(extractor, generated, compared, settings.resamples), **about}
    return card, compared


def check_count(count: int, given: str, warn: Callable[[str], None] | None = None) -> None:
    """Whether there are LEAST_IMAGES images.

    Args:
      count: number of images.
      given: flag that names them.
      warn: receives a line in place of the error, for distances that are no FID.

    Raises:
      EvaluationError: there are fewer.
    """
    if count >= LEAST_IMAGES:
        return
    message = (
        f"{given}: {count} images give no FID; at least {LEAST_IMAGES} are needed, and comparable "
        "scores need thousands, of equal number"
    )
    if warn is None:
        raise EvaluationError(message)
    warn(f"warning: {message.replace('FID', 'distance')}")


class FeatureExtractor(NamedTuple):
    """Feature networks with the folder that caches their features."""

    network: Network
    towers: hf_clip.Towers | None
    store: pathlib.Path
    batch_size: int
    log: Callable[[str], None]

    def features(self, lazy_images: LazyImages, name: str) -> Parts:
        """Features of the feature network, cached in the subfolder `name`."""
        return self._extract(self.network, lazy_images, name)

    def embeddings(self, lazy_images: LazyImages, name: str) -> Parts | None:
        """CLIP embeddings; None without a CLIP."""
        if self.towers is None:
            return None
        return self._extract(clip_score.image_network(self.towers), lazy_images, f"{name}_clip")

    def _extract(self, network: Network, lazy_images: LazyImages, name: str) -> Parts:
        log = lambda line: self.log(f"{name}: {line}")  # noqa: E731
        folder = self.store / name
        return extract.extract(lazy_images, network, folder, batch_size=self.batch_size, log=log)


def compute_reference(
    extractor: FeatureExtractor, real: LazyImages, about: dict[str, Any]
) -> Reference:
    """The reference of a set of real images.

    Args:
      extractor: the feature networks.
      real: real images.
      about: fields of the card that describe the networks.
    """
    parts = extractor.features(real, "reference")
    known = {**about, "reference_sha256": parts.sha256, "reference_images": parts.count}
    gaussian = parts.statistics().gaussian()
    return Reference(gaussian, known, parts, extractor.embeddings(real, "reference"))


def read_reference(path: str, about: dict[str, Any]) -> Reference:
    """The reference of a file of statistics.

    Raises:
      EvaluationError: a file of this program with another filter, network or size.
    """
    gaussian, known = frechet.load(path)
    for field in ("filter", "inception_sha256", "size"):
        if known and filter_name(str(known.get(field))) != str(about[field]):
            raise EvaluationError(
                f"--reference={path} was made with {field}={known.get(field)}, not {about[field]}; "
                "compute it again, or use its settings"
            )
    mine = {
        "reference_sha256": _sha256_of_file(path),
        "reference_images": gaussian.count or None,
        "reference_file": pathlib.Path(path).name,
    }
    return Reference(gaussian, {**mine, **known})


def score(
    extractor: FeatureExtractor, generated: LazyImages, reference: Reference, resamples: int
) -> dict[str, Any]:
    """The numbers of a card: distances of generated images to a reference.

    Args:
      extractor: the feature networks.
      generated: generated images.
      reference: the reference; without its features only the FID is computed.
      resamples: groups of images of the jackknife.
    """
    parts = extractor.features(generated, "samples")
    own = parts.features()
    interval = frechet.distance_interval(own, reference.gaussian, resamples=resamples)
    numbers = {
        "fid": interval.value,
        "low": interval.low,
        "high": interval.high,
        "resamples": resamples,
        "images": parts.count,
        "pictures_sha256": parts.sha256,
        "reference_sha256": reference.about["reference_sha256"],
        "reference_images": reference.about["reference_images"],
    }
    if reference.parts is not None:
        real = reference.parts.features()
        pairs = [_subset(x, min(len(x), KID_IMAGES)) for x in (own, real)]
        if min(map(len, pairs)) > 3:
            kid = distances.kid(*pairs)
            numbers |= {f"kid_{name}": value for name, value in kid._asdict().items()}
            numbers["kid"] = numbers.pop("kid_value")
            numbers["kid_images"] = [len(x) for x in pairs]
        least = min(len(own), len(real), PRECISION_RECALL_IMAGES)
        if least > distances.NEIGHBOURS:
            own, real = _subset(own, least), _subset(real, least)
            numbers |= distances.precision_recall(own, real)._asdict()
            numbers["precision_recall_images"] = least
    embedded = extractor.embeddings(generated, "samples") if reference.clip_parts else None
    if embedded is not None and reference.clip_parts is not None:
        numbers["cmmd"] = distances.cmmd(embedded.features(), reference.clip_parts.features())
        numbers["clip_sha256"] = extractor.towers.sha256 if extractor.towers else None
    return numbers


def _subset(features: np.ndarray, count: int) -> np.ndarray:
    """A fixed random subset of `count` rows."""
    return features[np.sort(np.random.default_rng(0).permutation(len(features))[:count])]


def _sha256_of_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
