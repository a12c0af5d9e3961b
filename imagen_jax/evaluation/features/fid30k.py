"""FID-30K on COCO (Sec. 4.1, Table 1): selected captions, one sample each, one card.

The reference is the whole 2014 validation set, which TFDS's `coco_captions` holds as Karpathy's
three splits. Paper is silent: which captions ("30K prompts from the COCO validation set").
`select_captions` depends on the data and a seed only; the list is written and hashed, so other
programs can use it.

`sample` and the feature cache resume: the command of a killed run, started again, finishes it with
the same card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from imagen_jax import __version__
from imagen_jax.config.data import DataConfig
from imagen_jax.config.schema import Config
from imagen_jax.data.index.indexed_source import IndexedSource
from imagen_jax.data.sources.registry import open_source
from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import clip_score, fid
from imagen_jax.evaluation.features.extract import LazyImages
from imagen_jax.evaluation.features.fid import FeatureExtractor, Settings
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import hf_clip
from imagen_jax.io import atomic
from imagen_jax.stages.folder import config_hash

COUNT = 30_000
BUILDER = "coco_captions/2014"
SPLITS = ("val", "test", "restval")  # Together the 40,504 images of val2014.
RULE = "one caption each of the first pictures by sha256(seed/picture), see docs/evaluation.md"


def open_data(path: str, splits: Sequence[str] = SPLITS, max_quarantined: float = 0.05) -> list:
    """Sources of the reference: TFDS's splits if `path` holds them, else a captioned folder.

    Args:
      path: a TFDS data_dir, or a folder of captioned images (docs/data.md); of a text file, every
        line is a caption, as COCO has five for an image.
      splits: TFDS: splits to use.
      max_quarantined: share of unusable records above which this fails.

    Raises:
      ConfigError: no data, or too many unusable records.
    """
    common = {"path": path, "max_quarantined": max_quarantined, "check": "header"}
    if not (pathlib.Path(path) / BUILDER.split("/")[0]).is_dir():
        return [open_source(DataConfig(kind="folder", caption_lines=True, **common))]
    tfds = {"kind": "tfds", "name": BUILDER, "caption_key": "captions/text"}
    return [open_source(DataConfig(split=split, **tfds, **common)) for split in splits]


def select_captions(
    sources: Sequence[IndexedSource], count: int, seed: int
) -> list[dict[str, Any]]:
    """Rows with `prompt` and `picture`, the index of the caption's image.

    Images are numbered 0, 1, ... through the sources in order. Image i has the digest
    SHA-256("SEED/I"). The `count` images with the smallest digests are selected, in digest order;
    of the K captions of an image, the one at index (last 8 bytes of the digest, big-endian) mod K.
    Paper is silent: whether an image may contribute two captions. Here it contributes one.

    Raises:
      EvaluationError: fewer images than `count`, or fewer than an FID needs.
    """
    fid.check_count(count, f"--count={count}")
    records = [(source, i) for source in sources for i in range(len(source))]
    if len(records) < count:
        raise EvaluationError(
            f"--data holds {len(records)} usable images, --count={count} captions need as many; "
            "give all splits, or a smaller count"
        )
    digests = [hashlib.sha256(f"{seed}/{i}".encode()).digest() for i in range(len(records))]
    rows = []
    for number in sorted(range(len(records)), key=digests.__getitem__)[:count]:
        source, i = records[number]
        captions = source.captions(i)
        caption = int.from_bytes(digests[number][-8:], "big") % len(captions)
        rows.append({"prompt": captions[caption], "picture": number})
    return rows


def captions_sha256(rows: Sequence[dict[str, Any]]) -> str:
    """Hash of a list of captions: its lines in order, each followed by a line feed."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["prompt"].replace("\n", " ").encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def write_captions(rows: Sequence[dict[str, Any]], out: str | pathlib.Path) -> None:
    """Writes OUT/captions.jsonl.

    Raises:
      EvaluationError: the folder belongs to a run with other captions.
    """
    path = pathlib.Path(out) / "captions.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise EvaluationError(
            f"{path} holds other captions than --data, --count and --caption_seed select; give "
            "another --out"
        )
    atomic.write_text(path, text)


def load_images(sources: Sequence[IndexedSource], size: int) -> LazyImages:
    """All images of the sources, preprocessed by `fid.center_square`; size 0: as they are."""
    records = [(source, i) for source in sources for i in range(len(source))]

    def load(number: int) -> np.ndarray:
        source, i = records[number]
        image = source.record(i).image
        return fid.center_square(image, size) if size else image

    return LazyImages(len(records), load)


def evaluate(
    out: str,
    sources: Sequence[IndexedSource],
    settings: Settings,
    about: dict[str, Any],
    *,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Scores OUT/samples, the samples of the prompts in OUT/captions.jsonl.

    Args:
      out: folder of the run; features are cached in OUT/features.
      sources: the reference.
      settings: settings of the measurement.
      about: fields of the card that describe the sampling.
      log: receives progress lines.

    Returns:
      The card.
    """
    folder = pathlib.Path(out)
    network, described = fid.inception_network(settings.inception, settings.filter)
    generated, size = fid.load_images(str(folder / "samples"), settings.size, settings.filter)
    described["size"] = size
    towers = hf_clip.read_towers(settings.clip) if settings.clip else None
    extractor = FeatureExtractor(network, towers, folder / "features", settings.batch_size, log)
    reference = fid.compute_reference(extractor, load_images(sources, size), described)
    numbers = fid.score(extractor, generated, reference, settings.resamples)
    if towers is not None:
        samples_dir = str(folder / "samples")
        numbers |= clip_score_of(extractor, generated, samples_dir, settings.clip, towers)
    return {"card": "fid30k", **numbers, **described, **about, "version": __version__}


def clip_score_of(
    extractor: FeatureExtractor,
    generated: LazyImages,
    folder: str,
    clip: str,
    towers: hf_clip.Towers,
) -> dict[str, Any]:
    """The CLIP score of a folder of samples with its interval, as fields of a card.

    Args:
      extractor: the feature networks.
      generated: the images of the folder.
      folder: folder written by `sample`.
      clip: Hugging Face CLIP folder, for its vocabulary.
      towers: networks of that folder.
    """
    parts = extractor.embeddings(generated, "samples")
    captions = [row["prompt"] for row in samples.read_rows(folder)]
    embedded = parts.features() if parts else np.zeros((0, 0))
    found = clip_score.score(embedded, captions, clip, towers, batch_size=extractor.batch_size)
    names = {"clip_score": "clip_score", "low": "clip_score_low", "high": "clip_score_high"}
    return {ours: found[theirs] for theirs, ours in names.items()}


def about_run(
    rows: Sequence[dict[str, Any]], configs: Sequence[Config], caption_seed: int, seed: int
) -> dict[str, Any]:
    """Fields of the card that describe the sampling.

    Args:
      rows: the captions.
      configs: configurations of the stages, with the sampling settings used.
      caption_seed: seed of `select_captions`.
      seed: seed of the noise.
    """
    stages = [
        {
            "name": config.name,
            "config": config_hash(config),
            **dataclasses.asdict(config.sampling),
        }
        for config in configs
    ]
    return {
        "captions": len(rows),
        "captions_sha256": captions_sha256(rows),
        "captions_rule": RULE,
        "caption_seed": caption_seed,
        "seed": seed,
        "zero_shot": not any(map(trained_on_coco, configs)),
        "stages": stages,
    }


def trained_on_coco(config: Config) -> bool:
    """Whether a stage's configuration names COCO as its training data."""
    sources = [config.data, *config.data.sources().values()]
    return any("coco" in f"{s.name if s.kind == 'tfds' else s.path}".lower() for s in sources)
