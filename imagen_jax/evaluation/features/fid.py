"""FID and its relatives of a folder of pictures against a reference (Sec. 4, Table 1).

A picture becomes the largest centred square of it, brought to one side by Pillow's bicubic filter
(a square of that side stays as it is), then Inception's input by a named filter (resizing.py), then
2048 features (features.py). The card says all that a score depends on.
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
from imagen_jax.data.sources.folder import PICTURES, walk
from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import clip_score, distances, extract, frechet
from imagen_jax.evaluation.features.extract import Network, Parts, Pictures
from imagen_jax.evaluation.features.frechet import Gaussian
from imagen_jax.evaluation.features.resizing import FILTERS
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import hf_clip, inception
from imagen_jax.io import images
from imagen_jax.models.inception import Inception

SQUARE_FILTER = "bicubic"
# Resamples of the interval: its half width is then good to a tenth.
RESAMPLES = 50
# Precision and recall depend on the number of pictures; so many are compared, or all if fewer.
PRECISION_RECALL_IMAGES = 10_000


class Settings(NamedTuple):
    """What a score is measured with.

    Attributes:
      inception: file of the weights.
      filter: row of `resizing.FILTERS`.
      size: side of the pictures, pixels; 0: the shorter side of the first drawn one.
      clip: Hugging Face CLIP folder for CMMD; "": none.
      batch_size: pictures at a time.
      resamples: of the interval.
    """

    inception: str
    filter: str = "clean"
    size: int = 0
    clip: str = ""
    batch_size: int = 32
    resamples: int = RESAMPLES


class Reference(NamedTuple):
    """What drawn pictures are compared with.

    Attributes:
      gaussian: mean and covariance of its features.
      about: what is known of it, for the card.
      parts: its features; None where only statistics are there.
      clip_parts: its CLIP embeddings, if asked for.
    """

    gaussian: Gaussian
    about: dict[str, Any]
    parts: Parts | None = None
    clip_parts: Parts | None = None


@jax.jit
def _inception_features(params: Any, pictures: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    features: Any = Inception().apply({"params": params}, pictures)
    return features


def inception_network(path: str, filter: str) -> tuple[Network, dict[str, Any]]:
    """Inception as `features.extract` wants it, and what the card says of it.

    Raises:
      EvaluationError: no such filter. WeightsError: the file does not hold FID's Inception.
    """
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


def load_images(folder: str, size: int = 0) -> tuple[Pictures, int]:
    """The pictures of a folder, made square.

    Args:
      folder: one with samples.jsonl, whose order holds, or any with picture files below it, by
        name.
      size: side, pixels; 0: the shorter side of the first one.

    Returns:
      The pictures and their side.

    Raises:
      EvaluationError: no such folder, or no pictures in it.
    """
    root = pathlib.Path(folder)
    if (root / "samples.jsonl").is_file():
        files = [row["file"] for row in samples.read_rows(folder)]
    elif root.is_dir():
        found = [file.name for file in walk(root)]
        files = [name for name in found if pathlib.PurePosixPath(name).suffix.lower() in PICTURES]
    else:
        raise EvaluationError(f"{folder} is not a folder of pictures")
    if len(files) < 2:
        raise EvaluationError(f"{folder} holds {len(files)} pictures; at least 2 are needed")
    size = size or min(samples.load(folder, files[0]).shape[:2])
    return Pictures(len(files), lambda i: square(samples.load(folder, files[i]), size)), size


def square(picture: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The rule by which any picture, drawn or real, gets its size."""
    return images.center_crop_resize(picture, size, SQUARE_FILTER)


def evaluate(
    samples_dir: str,
    reference: str,
    store: str | pathlib.Path,
    settings: Settings,
    *,
    log: Callable[[str], None] = print,
) -> tuple[dict[str, Any], Reference]:
    """Scores a folder of drawn pictures.

    Args:
      samples_dir: folder of pictures.
      reference: folder of real ones, or an .npz of statistics (see `frechet.load`).
      store: folder for features, so that an interrupted run goes on.
      settings: what is measured with.
      log: receives progress lines.

    Returns:
      The card, and the reference, whose statistics can be saved.

    Raises:
      EvaluationError, WeightsError: something is missing or does not belong together.
    """
    network, about = inception_network(settings.inception, settings.filter)
    drawn, size = load_images(samples_dir, settings.size)
    about["size"] = size
    towers = hf_clip.read_towers(settings.clip) if settings.clip else None
    look = FeatureExtractor(network, towers, pathlib.Path(store), settings.batch_size, log)
    if reference.endswith(".npz"):
        compared = read_reference(reference, about)
    else:
        compared = compute_reference(look, load_images(reference, size)[0], about)
    card = {"card": "fid", **score(look, drawn, compared, settings.resamples), **about}
    return card, compared


class FeatureExtractor(NamedTuple):
    """The networks that look at pictures, and where they leave what they saw."""

    network: Network
    towers: hf_clip.Towers | None
    store: pathlib.Path
    batch_size: int
    log: Callable[[str], None]

    def features(self, pictures: Pictures, name: str) -> Parts:
        """Inception's features of the pictures called `name`."""
        return self._extract(self.network, pictures, name)

    def embeddings(self, pictures: Pictures, name: str) -> Parts | None:
        """CLIP's of them, if there is a CLIP."""
        if self.towers is None:
            return None
        return self._extract(clip_score.image_network(self.towers), pictures, f"{name}_clip")

    def _extract(self, network: Network, pictures: Pictures, name: str) -> Parts:
        say = lambda line: self.log(f"{name}: {line}")  # noqa: E731
        folder = self.store / name
        return extract.extract(pictures, network, folder, batch_size=self.batch_size, log=say)


def compute_reference(
    look: FeatureExtractor, pictures: Pictures, about: dict[str, Any]
) -> Reference:
    """A reference of real pictures.

    Args:
      look: the networks.
      pictures: the real ones.
      about: what is looked with, for the card.
    """
    parts = look.features(pictures, "reference")
    known = {**about, "reference_sha256": parts.sha256, "reference_images": parts.count}
    gaussian = parts.statistics().gaussian()
    return Reference(gaussian, known, parts, look.embeddings(pictures, "reference"))


def read_reference(path: str, about: dict[str, Any]) -> Reference:
    """A reference of statistics; one of ours must have been made with the same things.

    Raises:
      EvaluationError: it was made with another filter, network or size.
    """
    gaussian, known = frechet.load(path)
    for field in ("filter", "inception_sha256", "size"):
        if known and known.get(field) != about[field]:
            raise EvaluationError(
                f"--reference={path} was made with {field}={known.get(field)}, not {about[field]}; "
                "make it again, or measure as it was made"
            )
    mine = {
        "reference_sha256": _sha256_of_file(path),
        "reference_images": gaussian.count or None,
        "reference_file": pathlib.Path(path).name,
    }
    return Reference(gaussian, {**mine, **known})


def score(
    look: FeatureExtractor, drawn: Pictures, reference: Reference, resamples: int
) -> dict[str, Any]:
    """The numbers of a card: distances of drawn pictures to a reference.

    Args:
      look: the networks.
      drawn: the pictures.
      reference: what they are compared with; without its features there is only the FID.
      resamples: of the interval.
    """
    parts = look.features(drawn, "samples")
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
        kid = distances.kid(own, real)
        numbers |= {"kid": kid.value, "kid_error": _number(kid.error)}
        least = min(len(own), len(real), PRECISION_RECALL_IMAGES)
        if least > distances.NEIGHBOURS:
            own, real = _some(own, least), _some(real, least)
            numbers |= distances.precision_recall(own, real)._asdict()
            numbers["precision_recall_images"] = least
    embedded = look.embeddings(drawn, "samples") if reference.clip_parts else None
    if embedded is not None and reference.clip_parts is not None:
        numbers["cmmd"] = distances.cmmd(embedded.features(), reference.clip_parts.features())
        numbers["clip_sha256"] = look.towers.sha256 if look.towers else None
    return numbers


def _some(cloud: np.ndarray, count: int) -> np.ndarray:
    """As many pictures of a cloud, the same each time."""
    return cloud[np.sort(np.random.default_rng(0).permutation(len(cloud))[:count])]


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if np.isnan(value) else value


def _sha256_of_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
