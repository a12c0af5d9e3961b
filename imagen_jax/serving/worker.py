"""The thread that owns the devices: takes requests from a bounded queue and samples in batches.

Images of several requests share a batch where the requests' settings are equal. A batch has 1, 2,
4, ... images, filled up with copies of the last one, so that few programs are compiled. Image k of
a request is sample k of `imagen sample --prompt=... --seed=...`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import secrets
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from imagen_jax.inference.cascade import Cascade, Progress
from imagen_jax.inference.request import SampleRequest
from imagen_jax.io import images
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import ClientRequest, Limits

REPORTS_PER_STAGE = 20  # updates of progress and preview
STOP_TIMEOUT = 30.0  # seconds; a compilation cannot be interrupted
MAX_FINISHED_JOBS = 1000  # finished jobs that clients can still look up


class QueueFull(RuntimeError):
    """The queue is at its limit."""


class Stopped(Exception):
    """The server is shutting down."""


@dataclasses.dataclass(eq=False)
class Job:
    """A queued request and its state; only the worker changes it.

    Attributes:
      request: the validated request.
      id: random identifier.
      state: "waiting", "drawing" (being sampled), "done" or "failed".
      started: number of images that have been put into a batch.
      progress: share of the work done, 0..1.
      doing: stage and step, for people.
      images: identifiers of the finished images.
      preview: estimates of x0 of the images being sampled, [n, h, w, 3] in [-1, 1].
    """

    request: ClientRequest
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))
    state: str = "waiting"
    started: int = 0
    progress: float = 0.0
    doing: str = ""
    images: list[str] = dataclasses.field(default_factory=list)
    preview: np.ndarray | None = None

    def batch_key(self) -> str:
        """Requests share a batch if these strings are equal."""
        negative = bool(self.request.negative_prompt)
        return json.dumps([self.request.stages, negative], sort_keys=True)

    def describe(self) -> dict[str, Any]:
        """The job as the JSON API shows it."""
        shown = {name: getattr(self, name) for name in ("id", "state", "progress", "doing")}
        shown["preview"] = self.preview is not None
        return shown | {"pictures": list(self.images), **dataclasses.asdict(self.request)}


class Worker:
    """The queue and the thread that serves it."""

    def __init__(
        self,
        cascade: Cascade,
        gallery: Gallery,
        limits: Limits,
        *,
        checkpoint: str = "",
        log: Callable[[str], None] = print,
    ):
        """Prepares the thread; `start` starts it.

        Args:
          cascade: samples the images.
          gallery: receives the images.
          limits: of the queue and of a batch.
          checkpoint: the stage folders, recorded with every image.
          log: receives lines.
        """
        self.ready = False
        self._cascade, self._gallery, self._limits = cascade, gallery, limits
        self._checkpoint, self._log = checkpoint, log
        self._queue: collections.deque[Job] = collections.deque()
        self._jobs: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Starts the thread, which first compiles the programs of the default settings."""
        self._thread.start()

    def stop(self) -> None:
        """Stops between two steps, or after STOP_TIMEOUT seconds; waiting requests are lost."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT)

    def submit(self, request: ClientRequest) -> Job:
        """Queues a request. Raises QueueFull."""
        job = Job(request)
        with self._changed:
            if len(self._queue) >= self._limits.queue:
                raise QueueFull(f"{len(self._queue)} requests wait; try again in a few seconds")
            self._queue.append(job)
            self._jobs[job.id] = job
            self._changed.notify()
        return job

    def job(self, identifier: str) -> Job | None:
        """The job of that identifier; None: unknown, or forgotten."""
        return self._jobs.get(identifier)

    def ahead(self, job: Job) -> int:
        """Number of requests that wait before this one."""
        with self._changed:
            return self._queue.index(job) if job in self._queue else 0

    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._queue)

    def _run(self) -> None:
        # Long prompts are warned about; Python's warning registry would grow with every one.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._warm_up()
                while True:
                    self._process(self._take_batch())
            except Stopped:
                return

    def _warm_up(self) -> None:
        sizes = {1, _padded(self._limits.batch, self._limits.batch)}
        for size in sorted(sizes):
            self._log(f"compiling for batches of {size}")
            request = SampleRequest(prompts=[""] * size, batch_size=size)
            self._cascade.sample(request, on_progress=self._check)
        self.ready = True
        self._log("ready")

    def _check(self, progress: Progress) -> None:
        if self._stopping:
            raise Stopped

    def _take_batch(self) -> list[tuple[Job, int]]:
        """The next batch, (job, sample index), of requests with the settings of the oldest one."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if self._stopping:
                raise Stopped
            key, units = self._queue[0].batch_key(), []
            for job in list(self._queue):
                if job.batch_key() == key:
                    room = self._limits.batch - len(units)
                    end = min(job.started + room, job.request.samples)
                    units += [(job, sample) for sample in range(job.started, end)]
                    job.started, job.state = end, "drawing" if end else job.state
                    if end == job.request.samples:
                        self._queue.remove(job)
            return units

    def _process(self, units: list[tuple[Job, int]]) -> None:
        """Samples a batch, stores its images and updates its jobs."""
        jobs = list({job.id: job for job, _ in units}.values())
        try:
            batch = self._sample(units)
            for (job, sample), image in zip(units, batch, strict=False):
                job.images.append(self._gallery.add(image, self._settings_of(job, sample)))
        except Stopped:
            raise
        # The failure of one batch does not affect the next one.
        except Exception:
            self._log(traceback.format_exc())
            self._finish(jobs, "failed")
            return
        self._finish([j for j in jobs if len(j.images) == j.request.samples], "done")

    def _sample(self, units: list[tuple[Job, int]]) -> np.ndarray:
        """Images of a batch, [n, h, w, 3] uint8, n >= len(units); reports progress to its jobs."""
        size = _padded(len(units), self._limits.batch)
        filled = units + [units[-1]] * (size - len(units))
        requests = [job.request for job, _ in filled]
        stages = requests[0].stages
        negative = [request.negative_prompt for request in requests]
        steps = max(settings["steps"] for settings in stages.values())

        def report(progress: Progress) -> None:
            self._check(progress)
            share = (progress.stage_index + progress.step / progress.steps) / progress.stages
            estimates = np.asarray(progress.x0)
            for job in {job.id: job for job, _ in units}.values():
                rows = [row for row, (other, _) in enumerate(units) if other is job]
                done = len(job.images) + share * len(rows)
                job.doing = f"{progress.stage}: step {progress.step} of {progress.steps}"
                job.progress = done / job.request.samples
                job.preview = estimates[rows]

        batch = SampleRequest(
            prompts=[request.prompt for request in requests],
            seed=[request.seed for request in requests],
            prompt_indices=[0] * size,
            sample_indices=[sample for _, sample in filled],
            negative_prompts=negative if any(negative) else None,
            stage_settings=stages,
            batch_size=size,
        )
        return self._cascade.sample(
            batch, on_progress=report, report_every=max(steps // REPORTS_PER_STAGE, 1)
        )

    def _settings_of(self, job: Job, sample: int) -> dict[str, Any]:
        """Everything that determines an image; the gallery stores it with the image."""
        settings = dataclasses.asdict(job.request)
        return {**settings, "sample_index": sample, "checkpoint": self._checkpoint}

    def _finish(self, jobs: list[Job], state: str) -> None:
        with self._changed:
            for job in jobs:
                if job in self._queue:
                    self._queue.remove(job)
                job.state, job.preview, job.doing = state, None, ""
                job.progress = 1.0 if state == "done" else job.progress
            finished = [job for job in self._jobs.values() if job.state in ("done", "failed")]
            for job in finished[:-MAX_FINISHED_JOBS]:
                del self._jobs[job.id]


def preview(job: Job) -> bytes | None:
    """The current estimates of a job's images, side by side, as PNG; None: there are none."""
    estimates = job.preview
    if estimates is None:
        return None
    return images.encode_png(np.concatenate(images.to_uint8(estimates), axis=1))


def _padded(count: int, largest: int) -> int:
    """The smallest power of two that is at least `count`, at most `largest`."""
    return min(1 << (count - 1).bit_length(), largest)
