"""Retrieval: whether the real image nearest to a sample is the one that its prompt names.

Each sample is compared with all images of a gallery, near-duplicates counted as one answer. Beside
the score stand the `ceiling` (the real image of the same row, shifted by a pixel, as JPEG) and the
 `chance` (the same samples with the prompts of other rows).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import extract, networks
from imagen_jax.evaluation.features.extract import LazyImages
from imagen_jax.evaluation.retrieval import gallery as gallery_lib
from imagen_jax.evaluation.retrieval import ranks, rates
from imagen_jax.evaluation.retrieval.gallery import Gallery
from imagen_jax.evaluation.retrieval.ranks import Ranking
from imagen_jax.evaluation.retrieval.rates import Comparison, Marks
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.evaluation.scorers import Row
from imagen_jax.io import images

TITLE = "Retrieval of the real image"
# Levels of 255. Between equal art rasterised twice (below 1) and neighbouring skin tones of a
# small figure (above 3).
NEAR_DUPLICATE = 2.0
JPEG_QUALITY = 90  # Of the ceiling's images.
TOP = {"exact": 1, "top5": 5}
Pixels = UInt8[np.ndarray, "n size size 3"]


class Measure(NamedTuple):
    """A way to compare images.

    Attributes:
      suffix: of its attributes; "" for pixels.
      embed: images and a name for the cache -> what is compared.
      distances: of n embedded images from m embedded images, [n, m].
    """

    suffix: str
    embed: Callable[[Pixels, str], np.ndarray]
    distances: Callable[[np.ndarray, np.ndarray], Float[np.ndarray, "n m"]]


class Reference(NamedTuple):
    """The gallery as the samples are compared with it.

    Attributes:
      gallery: the real images.
      answer_of: index of the answer of each, equal for near-duplicates.
      measures: each with the embedded gallery.
    """

    gallery: Gallery
    answer_of: Int[np.ndarray, " m"]
    measures: list[tuple[Measure, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """A scorer (`scorers.Scorer`) for the images of a gallery.

    Attributes:
      gallery: captioned folder of real images.
      match: field of a prompt row and of the gallery's metadata that names the right image; "": the
        prompt is one of its captions.
      marks: fields in which the nearest image is compared with the row.
      size: side at which images are compared, pixels; 0: the smaller of the samples' and of the
        gallery's first image, so that no image is upsampled.
      fit: how an image of the gallery becomes square, as `config.data.fit`.
      near_duplicate: largest root mean square difference of images that are one answer, levels.
      features: row of `networks.FEATURE_NETWORKS` for a second measure; "": pixels only.
      features_from: its weights.
      store: folder of the feature cache; "": none is kept.
      batch_size: images per batch of the feature network.
    """

    gallery: str
    match: str = ""
    marks: tuple[str, ...] = ()
    size: int = 0
    fit: str = "center_crop"
    near_duplicate: float = NEAR_DUPLICATE
    features: str = ""
    features_from: str = ""
    store: str = ""
    batch_size: int = 32

    def can_score(self, row: Row) -> bool:
        """Whether the gallery has a right image."""
        try:
            gallery_lib.answers([row], self._read(1), self.match)
        except EvaluationError:
            return False
        return True

    def real_image(
        self, row: Row, *, index: int, size: int | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The first right image; `index` has no effect."""
        del index
        gallery = self._read(size or self.size)
        return gallery.pixels[gallery_lib.answers([row], gallery, self.match)[0][0]]

    def evaluate(
        self, samples_dir: str | os.PathLike[str], by: str = "kind", *, against: str = ""
    ) -> dict[str, Any]:
        """Scores a folder of samples.

        Args:
          samples_dir: folder written by `sample`.
          by: row field that groups the prompts (`rates.group`).
          against: another folder with samples of the same prompts; "": none.

        Returns:
          `title`, `pictures` and `kinds` as `Scorer.evaluate`. `exact` is top-1, `top5` the share
          of images with the right answer among the nearest five; the other attributes are the
          fields of `marks`. Those of the feature network end in its name. Also `gallery` (images,
          answers, size and settings), `rows` (per image `right`, `rank` and `nearest`), and with
          `against` the `differences` by group (`rates.differences`).

        Raises:
          EvaluationError: a file is missing, or a row has no right image.
        """
        rows, generated = load_squares(samples_dir)
        reference = self._reference(generated.shape[1])
        own = self._compare(rows, generated, reference)
        groups = rates.group(rows, by)
        card = {
            "title": TITLE,
            "pictures": len(rows),
            "gallery": self._describe(reference),
            "kinds": {name: rates.tally(own, index) for name, index in groups.items()},
        }
        if against:
            other_rows, other_generated = load_squares(against)
            order = rates.pair(rows, other_rows, match=self.match)
            other_rows = [other_rows[i] for i in order]
            other = self._compare(other_rows, other_generated[order], reference)
            card["against"] = str(against)
            card["differences"] = {
                name: rates.differences(own, other, index) for name, index in groups.items()
            }
        return {**card, "rows": own.results}

    def score_folder(
        self, samples_dir: str | os.PathLike[str]
    ) -> dict[str, dict[str, dict[str, float]]]:
        """The `scores` of `evaluate` by kind of prompt."""
        return {name: part["scores"] for name, part in self.evaluate(samples_dir)["kinds"].items()}

    def format_table(self, report: Mapping[str, Any]) -> str:
        """See `rates.format_table`."""
        return rates.format_table(report)

    def _read(self, size: int, at_most: int | None = None) -> Gallery:
        return gallery_lib.read(self.gallery, size=size, at_most=at_most, fit=self.fit)

    def _reference(self, at_most: int) -> Reference:
        gallery = self._read(self.size, at_most)
        for field in self.marks:
            gallery_lib.check_field(gallery, field, "--marks")
        measures = [Measure("", lambda pixels, name: pixels, ranks.squared_distances)]
        if self.features:
            measures.append(self._by_features())
        return Reference(
            gallery,
            ranks.near_duplicates(gallery.pixels, self.near_duplicate),
            [(measure, measure.embed(gallery.pixels, "gallery")) for measure in measures],
        )

    def _by_features(self) -> Measure:
        """Squared Euclidean distances of normalised features, 2 - 2 cosine."""
        network, _ = networks.load(self.features, self.features_from)

        def embed(pixels: Pixels, name: str) -> Float[np.ndarray, "n d"]:
            lazy = LazyImages(len(pixels), pixels.__getitem__)
            kept = contextlib.nullcontext(self.store)
            with kept if self.store else tempfile.TemporaryDirectory() as store:
                folder = pathlib.Path(store) / name
                parts = extract.extract(lazy, network, folder, batch_size=self.batch_size)
                features = parts.features().astype(np.float64)
            return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

        return Measure(f"_{self.features}", embed, lambda a, b: 2 - 2 * a @ b.T)

    def _describe(self, reference: Reference) -> dict[str, Any]:
        return {
            "images": len(reference.gallery.names),
            "answers": int(reference.answer_of.max()) + 1,
            "size": reference.gallery.pixels.shape[1],
            "near_duplicate": self.near_duplicate,
            "match": self.match or "caption",
            "features": self.features,
        }

    def _compare(
        self, rows: Sequence[dict[str, Any]], generated: Pixels, reference: Reference
    ) -> Comparison:
        gallery, answer_of, _ = reference
        right = gallery_lib.answers(rows, gallery, self.match)
        named = [tuple(np.unique(answer_of[list(own)]).tolist()) for own in right]
        sets = list(dict.fromkeys(named))
        columns = np.array([sets.index(own) for own in named])
        # The real image of each row, once where rows share it.
        reals, real_of = np.unique([own[0] for own in right], return_inverse=True)
        degraded = np.stack([degrade(gallery.pixels[i]) for i in reals])
        size = gallery.pixels.shape[1]
        resized = np.stack([images.resize_host(image, size) for image in generated])
        results = [
            {"row": i, "file": row["file"], "prompt": row["prompt"], "right": gallery.names[own[0]]}
            for i, (row, own) in enumerate(zip(rows, right, strict=True))
        ]
        marks: dict[str, dict[str, Marks]] = {"generated": {}, "ceiling": {}}
        parts = {"generated": (resized, np.arange(len(rows))), "ceiling": (degraded, real_of)}
        for measure, embedded in reference.measures:
            for part, (pixels, index) in parts.items():
                ranking = _rank(measure, measure.embed(pixels, part), embedded, answer_of, sets)
                found = {name: (ranking.ranks <= top, columns) for name, top in TOP.items()}
                for field in self.marks:
                    found[field] = _agreements(field, rows, gallery, answer_of, ranking.nearest)
                for name, (table, own) in found.items():
                    marks[part][name + measure.suffix] = Marks(table[index], own)
                if part == "generated":
                    for i, result in enumerate(results):
                        result["rank" + measure.suffix] = int(ranking.ranks[i, columns[i]])
                        result["nearest" + measure.suffix] = gallery.names[ranking.nearest[i]]
        prompts = np.array([str(row.get("prompt_index", row["prompt"])) for row in rows])
        return Comparison(prompts, marks["generated"], marks["ceiling"], results)


def load_squares(folder: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], Pixels]:
    """Rows and images of a folder written by `sample`.

    Raises:
      EvaluationError: images are not square or differ in size.
    """
    rows = samples.read_rows(folder)
    loaded = [samples.load(folder, row["file"]) for row in rows]
    side = loaded[0].shape[0]
    for row, image in zip(rows, loaded, strict=True):
        if image.shape[:2] != (side, side):
            raise EvaluationError(
                f"{pathlib.Path(folder) / row['file']} has {image.shape[1]}x{image.shape[0]} "
                f"pixels, expected {side}x{side}; images of a folder must be squares of one size"
            )
    return rows, np.stack(loaded)


def degrade(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The image shifted right by one pixel (its edge repeated) and stored as JPEG."""
    shifted = np.concatenate([image[:, :1], image[:, :-1]], axis=1)
    file = io.BytesIO()
    Image.fromarray(shifted).save(file, format="jpeg", quality=JPEG_QUALITY)
    return images.decode(file.getvalue())


def _rank(
    measure: Measure,
    embedded: np.ndarray,
    gallery: np.ndarray,
    answer_of: np.ndarray,
    sets: Sequence[Sequence[int]],
) -> Ranking:
    distances = lambda block: measure.distances(embedded[block], gallery)  # noqa: E731
    return ranks.rank(len(embedded), distances, answer_of, sets)


def _agreements(
    field: str,
    rows: Sequence[Row],
    gallery: Gallery,
    answer_of: np.ndarray,
    nearest: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Marks of a field: whether an image of the nearest answer has a row's value.

    Returns:
      Table and columns of `Marks`, a column per value.
    """
    of_rows = [gallery_lib.values(row, field) for row in rows]
    distinct = list(dict.fromkeys(of_rows))
    columns = np.array([distinct.index(own) if own else -1 for own in of_rows])
    of_answers: dict[int, set[str]] = {}
    for answer, row in zip(answer_of.tolist(), gallery.fields, strict=True):
        of_answers.setdefault(answer, set()).update(gallery_lib.values(row, field))
    found = [of_answers[answer] for answer in answer_of[nearest].tolist()]
    table = [[bool(own & set(value)) for value in distinct] for own in found]
    return np.array(table, bool), columns
