"""FID-30K on COCO (Sec. 4.1, Table 1): captions drawn by rule, one picture each, one card.

The reference is all pictures of the validation set of 2014. TFDS's `coco_captions` has it in the
three splits that Karpathy made of it. The paper says "30K prompts from the COCO validation set" and
no more; the rule here (`select_captions`) depends on nothing but the data and a seed, and the list
itself is written and hashed, so that another program can use it.

Everything is kept on the way: drawn pictures by `sample`, features in parts, so that a run that was
killed goes on by the same command and ends with the same card.
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
from imagen_jax.config import overrides
from imagen_jax.config.data import DataConfig
from imagen_jax.config.schema import Config
from imagen_jax.data.sources.registry import Source, open_source
from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import clip_score, fid
from imagen_jax.evaluation.features.extract import Pictures
from imagen_jax.evaluation.features.fid import FeatureExtractor, Settings
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import hf_clip
from imagen_jax.io import atomic

COUNT = 30_000
BUILDER = "coco_captions/2014"
SPLITS = ("val", "test", "restval")  # Together the 40,504 pictures of val2014.
RULE = "one caption each of the first pictures by sha256(seed/picture), see docs/evaluation.md"


def open_data(path: str, splits: Sequence[str] = SPLITS, max_quarantined: float = 0.05) -> list:
    """The reference's sources: TFDS's splits if they are below `path`, else a captioned folder.

    Args:
      path: a TFDS data_dir, or a folder of pictures with captions (see docs/data.md).
      splits: TFDS: which ones.
      max_quarantined: share of unusable records above which this fails.

    Raises:
      ConfigError: nothing there, or too much of it unusable.
    """
    common = {"path": path, "max_quarantined": max_quarantined, "check": "header"}
    if not (pathlib.Path(path) / BUILDER.split("/")[0]).is_dir():
        return [open_source(DataConfig(kind="folder", **common))]
    tfds = {"kind": "tfds", "name": BUILDER, "caption_key": "captions/text"}
    return [open_source(DataConfig(split=split, **tfds, **common)) for split in splits]


def select_captions(sources: Sequence[Source], count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with `prompt` and `picture`, the number of the caption's own picture.

    Pictures are numbered 0, 1, ... through the sources in their order. Picture i has the digest
    SHA-256("SEED/I"); the `count` pictures with the smallest digests are taken, in the order of
    their digests, and of K captions of a picture the one with the number given by the digest's last
    8 bytes, modulo K. Paper is silent on whether a picture may give two captions; here it gives
    one.

    Raises:
      EvaluationError: there are fewer pictures.
    """
    places = [(source, i) for source in sources for i in range(len(source))]
    if len(places) < count:
        raise EvaluationError(
            f"--data holds {len(places)} usable pictures, --count={count} captions are wanted; "
            "give all splits, or a smaller count"
        )
    digests = [hashlib.sha256(f"{seed}/{i}".encode()).digest() for i in range(len(places))]
    rows = []
    for number in sorted(range(len(places)), key=digests.__getitem__)[:count]:
        source, i = places[number]
        captions = source.captions(i)
        chosen = int.from_bytes(digests[number][-8:], "big") % len(captions)
        rows.append({"prompt": captions[chosen], "picture": number})
    return rows


def captions_sha256(rows: Sequence[dict[str, Any]]) -> str:
    """Hash of a list of captions: of its lines, in order, each with a line feed."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["prompt"].replace("\n", " ").encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def write_captions(rows: Sequence[dict[str, Any]], out: str | pathlib.Path) -> None:
    """Writes OUT/captions.jsonl.

    Raises:
      EvaluationError: the folder is that of a run with other captions.
    """
    path = pathlib.Path(out) / "captions.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise EvaluationError(
            f"{path} holds other captions than --data, --count and --caption_seed give; choose "
            "another --out"
        )
    atomic.write_text(path, text)


def load_images(sources: Sequence[Source], size: int) -> Pictures:
    """All pictures of the sources, made square by `fid.square`."""
    places = [(source, i) for source in sources for i in range(len(source))]

    def load(number: int) -> np.ndarray:
        source, i = places[number]
        return fid.square(source.record(i).image, size)

    return Pictures(len(places), load)


def evaluate(
    out: str,
    sources: Sequence[Source],
    settings: Settings,
    about: dict[str, Any],
    *,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Scores OUT/samples, which `sample` drew for OUT/captions.jsonl.

    Args:
      out: folder of the run; features go to OUT/features.
      sources: the reference.
      settings: what is measured with.
      about: fields that the card takes over: how the pictures were drawn.
      log: receives progress lines.

    Returns:
      The card.
    """
    folder = pathlib.Path(out)
    network, with_what = fid.inception_network(settings.inception, settings.filter)
    drawn, size = fid.load_images(str(folder / "samples"), settings.size)
    with_what["size"] = size
    towers = hf_clip.read_towers(settings.clip) if settings.clip else None
    look = FeatureExtractor(network, towers, folder / "features", settings.batch_size, log)
    reference = fid.compute_reference(look, load_images(sources, size), with_what)
    numbers = fid.score(look, drawn, reference, settings.resamples)
    if towers is not None:
        numbers |= clip_score_of(look, drawn, str(folder / "samples"), settings.clip, towers)
    return {"card": "fid30k", **numbers, **with_what, **about, "version": __version__}


def clip_score_of(
    look: FeatureExtractor, drawn: Pictures, folder: str, clip: str, towers: hf_clip.Towers
) -> dict[str, Any]:
    """The CLIP score of a folder of samples with its interval, for a card.

    Args:
      look: the networks.
      drawn: the folder's pictures.
      folder: what `sample` wrote.
      clip: Hugging Face CLIP folder, for its vocabulary.
      towers: what was read from it.
    """
    parts = look.embeddings(drawn, "samples")
    captions = [row["prompt"] for row in samples.read_rows(folder)]
    embedded = parts.features() if parts else np.zeros((0, 0))
    found = clip_score.score(embedded, captions, clip, towers, batch_size=look.batch_size)
    names = {"clip_score": "clip_score", "low": "clip_score_low", "high": "clip_score_high"}
    return {ours: found[theirs] for theirs, ours in names.items()}


def about_run(
    rows: Sequence[dict[str, Any]], configs: Sequence[Config], caption_seed: int, seed: int
) -> dict[str, Any]:
    """How pictures were drawn, for the card.

    Args:
      rows: the captions.
      configs: of the stages, as they drew.
      caption_seed: of `select_captions`.
      seed: of the noise.
    """
    stages = [
        {
            "name": config.name,
            "config": overrides.fingerprint(config),
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
    """Whether a stage's own configuration says that it was trained on COCO."""
    sources = [config.data, *config.data.sources().values()]
    return any("coco" in f"{s.name if s.kind == 'tfds' else s.path}".lower() for s in sources)
