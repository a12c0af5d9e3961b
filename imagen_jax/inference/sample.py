"""Samples a list of prompts with a cascade, on any number of hosts, and writes the images.

Each host samples its share of the images that the folder does not hold yet. At the end the first
host writes samples.jsonl and grid.png. The same command again continues where it was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.config import overrides
from imagen_jax.config.sampling import PLACEMENT
from imagen_jax.diffusion.editing import Edit
from imagen_jax.inference import sample_folder
from imagen_jax.inference.cascade import Cascade, Progress
from imagen_jax.inference.given_inputs import GivenInputs
from imagen_jax.inference.sample_folder import GRID_IMAGES, Sample
from imagen_jax.inference.trace import Trace
from imagen_jax.io import atomic, images
from imagen_jax.parallel import distributed
from imagen_jax.stages.folder import config_hash

# Batches that each stage samples before the next one is loaded, where one is in memory at a time.
BATCHES_PER_STAGE = 16
# Steps between two checks of the clock, and seconds between two lines within a batch.
REPORT_EVERY, LOG_INTERVAL = 8, 10.0


@dataclasses.dataclass(frozen=True, eq=False)
class SampleOptions:
    """The settings that all images of a folder share.

    Attributes:
      seed: with prompt and sample index, all that an image's noise depends on.
      samples_per_prompt: images per prompt.
      batch_size: images sampled at a time.
      stage_settings: fields of `SamplingConfig` by stage name.
      negative_prompt: the negative prompt of all images; "": the null text.
      classifier_scale: of the gradient, where the cascade has a classifier; the classes of an
        image are those of its row.
      edit: one image that all start from, with a mask or without; None: from noise.
      lowres: one image [1, h, w, 3] for the first super-resolution stage to upsample.
      checkpoint: paths of the stages, recorded with each image.
      trace: "png" or "gif" of the steps beside each image; "": none.
      given: inputs of all images in place of computed ones; None: none.
      floats: also write the images before they are rounded to uint8.
    """

    seed: int = 0
    samples_per_prompt: int = 1
    batch_size: int = 32
    stage_settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    negative_prompt: str = ""
    classifier_scale: float = 1.0
    edit: Edit | None = None
    lowres: UInt8[np.ndarray, "1 h w 3"] | None = None
    checkpoint: str = ""
    trace: str = ""
    given: GivenInputs | None = None
    floats: bool = False


def sample(
    cascade: Cascade,
    rows: Sequence[Mapping[str, Any]],
    out: str,
    options: SampleOptions,
    log: Callable[[str], None] = print,
) -> None:
    """Writes `OUT/PPPPP_KK.png`, `OUT/samples.jsonl` and `OUT/grid.png`; `floats`: also .npy.

    Args:
      cascade: the stages and the text encoder.
      rows: prompts; `seed` of a row replaces that of `options`, `classes` are for the classifier
        of the cascade; further fields are copied to samples.jsonl.
      out: folder to write, shared by all hosts or one per host.
      options: seed, number of images and sampling settings.
      log: called with the progress lines.

    Raises:
      SampleError: the folder holds images of another run.
    """
    folder = pathlib.Path(out)
    samples = [Sample(p, k) for p in range(len(rows)) for k in range(options.samples_per_prompt)]
    about = _image_metadata(cascade, options)
    own = [{"prompt": r["prompt"], **about, "seed": str(r.get("seed", options.seed))} for r in rows]
    if cascade.classifier is not None:
        for row, text in zip(rows, own, strict=True):
            if "classes" not in row:
                raise sample_folder.SampleError(
                    f"prompt {row['prompt']!r} has no classes; a classifier guides every image, "
                    'give the row a field like "classes": {"colour": "red"}'
                )
            text["classes"] = json.dumps(row["classes"], sort_keys=True)
    texts = [own[sample.prompt_index] for sample in samples]
    # Images that any host has are done. The exchange is also a barrier before the first write.
    found = sample_folder.find_finished(
        folder, samples, texts, floats=options.floats, trace=options.trace
    )
    done = distributed.all_gather(found).any(axis=0)
    folder.mkdir(parents=True, exist_ok=True)
    if done.any():
        log(f"{folder}: {done.sum()} of {len(samples)} images are there already")
    _sample_share(
        cascade, folder, [(samples[i], texts[i]) for i in np.flatnonzero(~done)], options, log
    )

    # Also a barrier. Images that a host does not have are black.
    shown, size = samples[:GRID_IMAGES], cascade.configs[-1].data.image_size
    shown_images = distributed.all_gather(sample_folder.read_images(folder, shown, size)).max(
        axis=0
    )
    if distributed.is_first():
        sample_folder.write_rows(folder, samples, rows, options.seed)
        sheet = sample_folder.grid(shown_images, [text["prompt"] for text in texts[: len(shown)]])
        images.save_png(folder / "grid.png", sheet, about)


def _image_metadata(cascade: Cascade, options: SampleOptions) -> dict[str, str]:
    """The PNG text chunks that all images of a run share."""
    settings: dict[str, Any] = {}
    for trained, config, weights in zip(
        cascade.configs,
        cascade.placed_configs(options.stage_settings),
        cascade.weight_hashes,
        strict=True,
    ):
        values = dataclasses.asdict(config.sampling)
        if config.model.dtype == trained.model.dtype:
            del values["dtype"]  # It is in `config`.
        values = {name: value for name, value in values.items() if name not in PLACEMENT}
        settings[config.name] = {"weights": weights, **values}
    if cascade.encoder is not None:
        settings["text_encoder"] = overrides.fingerprint(cascade.encoder.fingerprint())
    if options.negative_prompt:
        settings["negative_prompt"] = options.negative_prompt
    if cascade.guide_hashes:
        settings["guides"] = cascade.guide_hashes
    if cascade.classifier is not None:
        about = {"weights": cascade.classifier_hash, "scale": options.classifier_scale}
        settings["classifier"] = about
    if options.lowres is not None:
        settings["lowres"] = _digest(options.lowres)
    if options.given is not None:
        settings["inputs"] = options.given.digest()
    if options.edit is not None:
        names = ("strength", "resamplings", "jump")
        settings["edit"] = {name: getattr(options.edit, name) for name in names}
        settings["edit"]["pictures"] = _digest(options.edit.images)
        settings["edit"]["masks"] = (
            "" if options.edit.masks is None else _digest(options.edit.masks)
        )
    trained = {config.name: config_hash(config) for config in cascade.configs}
    return {
        "seed": str(options.seed),
        "config": json.dumps(trained, sort_keys=True),
        "settings": json.dumps(settings, sort_keys=True),
        "checkpoint": options.checkpoint,
    }


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def _sample_share(
    cascade: Cascade,
    folder: pathlib.Path,
    work: Sequence[tuple[Sample, Mapping[str, str]]],
    options: SampleOptions,
    log: Callable[[str], None],
) -> None:
    """Samples this host's share of the work and writes it, part by part."""
    size = min(options.batch_size, len(work))
    part_size = size * (BATCHES_PER_STAGE if cascade.keep == "one" else 1)
    parts = [work[i : i + part_size] for i in range(0, len(work), part_size or 1)]
    parts = parts[distributed.index() :: distributed.count()]
    line = _ProgressLine(sum(map(len, parts)), log)
    for part in parts:
        # The last batch is padded, so that shapes stay fixed.
        samples = [sample for sample, _ in part]
        filled = samples + [samples[-1]] * (-len(samples) % size)
        prompts = [text["prompt"] for _, text in part]
        prompts += [prompts[-1]] * (len(filled) - len(part))
        seeds = [int(text["seed"]) for _, text in part]
        classes = None
        if cascade.classifier is not None:
            classes = [json.loads(text["classes"]) for _, text in part]
            classes += [classes[-1]] * (len(filled) - len(part))
        trace = Trace(options.trace) if options.trace else None
        one = np.zeros(len(filled), int)

        def on_progress(progress: Progress, trace=trace) -> None:
            line.within(progress)
            if trace:
                trace(progress)

        sample_images = cascade.sample_floats if options.floats else cascade.sample
        sampled = sample_images(
            prompts,
            seed=seeds + [seeds[-1]] * (len(filled) - len(part)),
            prompt_indices=[sample.prompt_index for sample in filled],
            sample_indices=[sample.sample_index for sample in filled],
            stage_settings=options.stage_settings,
            negative_prompts=[options.negative_prompt] * len(filled)
            if options.negative_prompt
            else None,
            classes=classes,
            classifier_scale=options.classifier_scale,
            edit=options.edit and options.edit.rows(one),
            batch_size=size,
            on_progress=on_progress,
            report_every=1 if trace else REPORT_EVERY,
            **_arrays(options, filled),
        )
        for (sample, text), image in zip(part, sampled, strict=False):
            if options.floats:
                with atomic.file((folder / sample.file).with_suffix(".npy")) as file:
                    file.write_bytes(_npy(image))
                image = images.to_uint8(image)
            images.save_png(folder / sample.file, image, text)
        if trace:
            trace.write(folder / "trace", filled[: len(part)], [text for _, text in part])
        line.after(len(part))


def _arrays(options: SampleOptions, samples: Sequence[Sample]) -> dict[str, Any]:
    """The arguments of `Cascade.sample` that hold arrays."""
    arguments: dict[str, Any] = {}
    if options.given is not None:
        each = options.samples_per_prompt
        rows = [sample.prompt_index * each + sample.sample_index for sample in samples]
        arguments |= options.given.rows(np.array(rows))
    if options.lowres is not None:
        arguments["lowres"] = options.lowres[np.zeros(len(samples), int)]
    return arguments


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class _ProgressLine:
    """The progress line: images done, images/s and time left of this host's share."""

    def __init__(self, total: int, log: Callable[[str], None]):
        self.total, self.done, self.log = total, 0, log
        self.started = self.last_logged = time.monotonic()
        # The rate excludes the first part, which also compiles.
        self.steady: tuple[float, int] | None = None

    def after(self, count: int) -> None:
        """Logs that a part of `count` images is written."""
        self.done, self.last_logged = self.done + count, time.monotonic()
        since, before = self.steady or (self.started, 0)
        rate = (self.done - before) / max(self.last_logged - since, 1e-9)
        left = (self.total - self.done) / rate
        hosts = distributed.count()
        of = f" on host 1 of {hosts}" if hosts > 1 else ""
        self.log(f"{self.done}/{self.total} images{of}  {rate:.1f} images/s  {left:.0f} s left")
        if self.steady is None:
            self.steady = self.last_logged, self.done

    def within(self, progress: Progress) -> None:
        """Logs the step within a part, at most every LOG_INTERVAL seconds."""
        if time.monotonic() - self.last_logged > LOG_INTERVAL:
            self.last_logged = time.monotonic()
            at = f"{progress.stage} step {progress.step}/{progress.steps}"
            self.log(f"{self.done}/{self.total} images  {at}")
