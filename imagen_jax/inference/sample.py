"""Draws a list of prompts with a cascade, on any number of hosts, and writes the pictures.

Each host draws its share of what the folder does not hold yet; at the end the first one writes
samples.jsonl and grid.png. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.config import overrides
from imagen_jax.diffusion.editing import Edit
from imagen_jax.inference import sample_folder
from imagen_jax.inference.cascade import Cascade, Progress
from imagen_jax.inference.request import with_settings
from imagen_jax.inference.sample_folder import GRID_IMAGES, Sample
from imagen_jax.inference.trace import Trace
from imagen_jax.io import images
from imagen_jax.parallel import distributed

# Batches that each stage draws before the next one is read, where one is in memory at a time.
BATCHES_PER_STAGE = 16
# Steps between two looks at the clock, and seconds between two lines within a batch.
REPORT_EVERY, LOG_INTERVAL = 8, 10.0


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What all pictures of a run share.

    Attributes:
      seed: with prompt and sample index, all that a picture's noise depends on.
      samples_per_prompt: pictures per prompt.
      batch_size: pictures drawn at a time.
      stage_settings: fields of `SamplingConfig` by stage name.
      negative_prompt: what guidance leads away from; "": no text.
      edit: one picture that all are made from, with a mask or without; None: none.
      lowres: one picture [1, h, w, 3] for the first super-resolution stage to enlarge.
      checkpoint: where the stages came from, for the record.
      trace: "png" or "gif" of the steps beside each picture; "": none.
    """

    seed: int = 0
    samples_per_prompt: int = 1
    batch_size: int = 32
    stage_settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    negative_prompt: str = ""
    edit: Edit | None = None
    lowres: UInt8[np.ndarray, "1 h w 3"] | None = None
    checkpoint: str = ""
    trace: str = ""


def sample(
    cascade: Cascade,
    rows: Sequence[Mapping[str, Any]],
    out: str,
    job: Job,
    log: Callable[[str], None] = print,
) -> None:
    """Writes `OUT/PPPPP_KK.png`, `OUT/samples.jsonl` and `OUT/grid.png`.

    Args:
      cascade: draws them.
      rows: prompts; each further field of a row is carried into samples.jsonl.
      out: folder to write, of all hosts or of each its own.
      job: how.
      log: receives the progress lines.

    Raises:
      SampleError: the folder holds pictures of another run.
    """
    folder = pathlib.Path(out)
    samples = [Sample(p, k) for p in range(len(rows)) for k in range(job.samples_per_prompt)]
    about = _about(cascade, job)
    texts = [{"prompt": rows[s.prompt_index]["prompt"], **about} for s in samples]
    # What one host has none need draw, and all have looked before one begins.
    done = distributed.all_gather(sample_folder.finished(folder, samples, texts)).any(axis=0)
    folder.mkdir(parents=True, exist_ok=True)
    if done.any():
        log(f"{folder}: {done.sum()} of {len(samples)} pictures are there already")
    _draw(cascade, folder, [(samples[i], texts[i]) for i in np.flatnonzero(~done)], job, log)

    # Also waits for all hosts. Black is what a host has not.
    shown, size = samples[:GRID_IMAGES], cascade.configs[-1].data.image_size
    pictures = distributed.all_gather(sample_folder.read_images(folder, shown, size)).max(axis=0)
    if distributed.is_first():
        sample_folder.write_rows(folder, samples, rows, job.seed)
        sheet = sample_folder.grid(pictures, [text["prompt"] for text in texts[: len(shown)]])
        images.save_png(folder / "grid.png", sheet, about)


def _about(cascade: Cascade, job: Job) -> dict[str, str]:
    """The text chunks that all pictures of a run share."""
    settings: dict[str, Any] = {}
    for config, weights in zip(
        with_settings(cascade.configs, job.stage_settings), cascade.weight_hashes, strict=True
    ):
        settings[config.name] = {"weights": weights, **dataclasses.asdict(config.sampling)}
    if cascade.encoder is not None:
        settings["text_encoder"] = overrides.fingerprint(cascade.encoder.fingerprint())
    if job.negative_prompt:
        settings["negative_prompt"] = job.negative_prompt
    if cascade.guide_hashes:
        settings["guides"] = cascade.guide_hashes
    if job.lowres is not None:
        settings["lowres"] = _digest(job.lowres)
    if job.edit is not None:
        names = ("strength", "resamplings", "jump")
        settings["edit"] = {name: getattr(job.edit, name) for name in names}
        settings["edit"]["pictures"] = _digest(job.edit.images)
        settings["edit"]["masks"] = "" if job.edit.masks is None else _digest(job.edit.masks)
    trained = {config.name: overrides.fingerprint(config) for config in cascade.configs}
    return {
        "seed": str(job.seed),
        "config": json.dumps(trained, sort_keys=True),
        "settings": json.dumps(settings, sort_keys=True),
        "checkpoint": job.checkpoint,
    }


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def _draw(
    cascade: Cascade,
    folder: pathlib.Path,
    work: Sequence[tuple[Sample, Mapping[str, str]]],
    job: Job,
    log: Callable[[str], None],
) -> None:
    """Draws this host's share of the work and writes it, part by part."""
    size = min(job.batch_size, len(work))
    part_size = size * (BATCHES_PER_STAGE if cascade.keep == "one" else 1)
    parts = [work[i : i + part_size] for i in range(0, len(work), part_size or 1)]
    parts = parts[distributed.index() :: distributed.count()]
    line = _ProgressLine(sum(map(len, parts)), log)
    for part in parts:
        # The last batch is filled up, so that shapes stay fixed.
        samples = [sample for sample, _ in part]
        filled = samples + [samples[-1]] * (-len(samples) % size)
        prompts = [text["prompt"] for _, text in part]
        prompts += [prompts[-1]] * (len(filled) - len(part))
        trace = Trace(job.trace) if job.trace else None
        one = np.zeros(len(filled), int)

        def look(progress: Progress, trace=trace) -> None:
            line.within(progress)
            if trace:
                trace(progress)

        pictures = cascade.sample(
            prompts,
            seed=job.seed,
            prompt_indices=[sample.prompt_index for sample in filled],
            sample_indices=[sample.sample_index for sample in filled],
            stage_settings=job.stage_settings,
            negative_prompts=[job.negative_prompt] * len(filled) if job.negative_prompt else None,
            edit=job.edit and job.edit.rows(one),
            lowres=None if job.lowres is None else job.lowres[one],
            batch_size=size,
            on_progress=look,
            report_every=1 if trace else REPORT_EVERY,
        )
        for (sample, text), picture in zip(part, pictures, strict=False):
            images.save_png(folder / sample.file, picture, text)
        if trace:
            trace.write(folder / "trace", filled[: len(part)], [text for _, text in part])
        line.after(len(part))


class _ProgressLine:
    """The progress line: pictures, images/s and time left of this host's share."""

    def __init__(self, total: int, log: Callable[[str], None]):
        self.total, self.done, self.log = total, 0, log
        self.started = self.said = time.monotonic()
        # What comes after the first part, which also compiles, tells the rate.
        self.steady: tuple[float, int] | None = None

    def after(self, count: int) -> None:
        """A part of `count` pictures is written."""
        self.done, self.said = self.done + count, time.monotonic()
        since, before = self.steady or (self.started, 0)
        rate = (self.done - before) / max(self.said - since, 1e-9)
        left = (self.total - self.done) / rate
        hosts = distributed.count()
        of = f" on host 1 of {hosts}" if hosts > 1 else ""
        self.log(f"{self.done}/{self.total} pictures{of}  {rate:.1f} images/s  {left:.0f} s left")
        if self.steady is None:
            self.steady = self.said, self.done

    def within(self, progress: Progress) -> None:
        """A few steps are done."""
        if time.monotonic() - self.said > LOG_INTERVAL:
            self.said = time.monotonic()
            at = f"{progress.stage} step {progress.step}/{progress.steps}"
            self.log(f"{self.done}/{self.total} pictures  {at}")
