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
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from imagen_jax.inference.cascade import Cascade, Progress
from imagen_jax.inference.request import SampleRequest
from imagen_jax.io import images
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import ClientRequest, Limits
from imagen_jax.serving.metrics import Metrics

REPORTS_PER_STAGE = 20  # updates of progress and preview
STOP_TIMEOUT = 30.0  # seconds; a compilation cannot be interrupted
MAX_FINISHED_JOBS = 1000  # finished jobs that clients can still look up
ENDED = ("done", "failed", "cancelled")
FAILURES = 3  # consecutive batches that fail, after which the server's health is "failed"
LOG_SECONDS = 60.0  # at most one traceback in this time


class QueueFull(RuntimeError):
    """The queue is at its limit."""


class WorkerFailed(RuntimeError):
    """The thread that samples has ended."""


class Stopped(Exception):
    """The server is shutting down."""


class Dropped(Exception):
    """No client waits for the batch any more."""


class Preview:
    """Estimates of x0 of a job's images during sampling; encoded once, when a client asks."""

    def __init__(self, estimates: np.ndarray):
        """Holds estimates [n, h, w, 3] in [-1, 1]."""
        self._estimates, self._png = estimates, b""
        self._lock = threading.Lock()

    def png(self) -> bytes:
        """The estimates side by side, as PNG."""
        with self._lock:
            if not self._png:
                pixels = images.to_uint8(self._estimates)
                self._png = images.encode_png(np.concatenate(pixels, axis=1))
            return self._png


@dataclasses.dataclass(eq=False)
class Job:
    """A queued request and its state; only the worker changes it.

    Attributes:
      request: the validated request.
      id: random identifier.
      state: "waiting", "sampling", "done", "failed" or "cancelled" (a client's wish, or no
        client has asked about it for a while).
      started: number of images that have been put into a batch.
      progress: share of the work done, 0..1.
      doing: stage and step, for people.
      images: identifiers of the finished images.
      preview: estimates of x0 of the images being sampled.
      asked: when a client last asked about it, of `time.monotonic`.
    """

    request: ClientRequest
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))
    state: str = "waiting"
    started: int = 0
    progress: float = 0.0
    doing: str = ""
    images: list[str] = dataclasses.field(default_factory=list)
    preview: Preview | None = None
    asked: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in ENDED

    def batch_key(self) -> str:
        """Requests share a batch if these strings are equal."""
        negative = bool(self.request.negative_prompt)
        return json.dumps([self.request.stages, negative], sort_keys=True)

    def describe(self) -> dict[str, Any]:
        """The job as the JSON API shows it."""
        shown = {name: getattr(self, name) for name in ("id", "state", "progress", "doing")}
        shown["preview"] = self.preview is not None
        return shown | {"images": list(self.images), **dataclasses.asdict(self.request)}


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
        self.state = "warming up"  # then "ready", or "failed"
        self.metrics = Metrics()
        self.metrics.watch("waiting", "Jobs that wait.", self.waiting)
        self.metrics.watch("ready", "1: batches are sampled.", lambda: self.state == "ready")
        self._failures, self._ended, self._logged = 0, False, -LOG_SECONDS
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
        """Queues a request. Raises QueueFull or WorkerFailed."""
        job = Job(request)
        with self._changed:
            if self._ended:
                raise WorkerFailed("the server has failed; its log has the reason")
            self._drop_abandoned()
            if len(self._queue) >= self._limits.queue:
                raise QueueFull(f"{len(self._queue)} requests wait; try again in a few seconds")
            self._queue.append(job)
            self._jobs[job.id] = job
            self._changed.notify()
        return job

    def job(self, identifier: str) -> Job | None:
        """The job of that identifier, for a client; None: unknown, or forgotten."""
        found = self._jobs.get(identifier)
        if found:
            found.asked = time.monotonic()
        return found

    def cancel(self, identifier: str) -> Job | None:
        """Drops the job of that identifier unless it has ended; None: unknown, or forgotten."""
        found = self._jobs.get(identifier)
        if found:
            self._finish([found], "cancelled")
        return found

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
            # Whatever it is, clients must learn that nothing is sampled any more.
            except BaseException:
                self._log(traceback.format_exc())
                with self._changed:
                    self.state, self._ended = "failed", True
                    self._finish(list(self._jobs.values()), "failed")

    def _warm_up(self) -> None:
        sizes = {1, _padded(self._limits.batch, self._limits.batch)}
        for size in sorted(sizes):
            self._log(f"compiling for batches of {size}")
            request = SampleRequest(prompts=[""] * size, batch_size=size)
            self._cascade.sample(request, on_progress=self._check)
        self.state = "ready"
        self._log("ready")

    def _check(self, progress: Progress) -> None:
        if self._stopping:
            raise Stopped

    def _take_batch(self) -> list[tuple[Job, int]]:
        """The next batch, (job, sample index), of requests with the settings of the oldest one."""
        with self._changed:
            self._drop_abandoned()
            while not self._queue:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    raise Stopped
                self._drop_abandoned()
            if self._stopping:
                raise Stopped
            key, units = self._queue[0].batch_key(), []
            for job in list(self._queue):
                if job.batch_key() == key:
                    room = self._limits.batch - len(units)
                    end = min(job.started + room, job.request.samples)
                    units += [(job, sample) for sample in range(job.started, end)]
                    job.started, job.state = end, "sampling" if end else job.state
                    if end == job.request.samples:
                        self._queue.remove(job)
            return units

    def _drop_abandoned(self) -> None:
        oldest = time.monotonic() - self._limits.patience
        abandoned = [job for job in self._jobs.values() if job.asked < oldest]
        self._finish(abandoned, "cancelled")

    def _process(self, units: list[tuple[Job, int]]) -> None:
        """Samples a batch, stores its images and updates its jobs."""
        jobs = list({job.id: job for job, _ in units}.values())
        try:
            with self.metrics.batch_seconds.time():
                batch = self._sample(units)
            for (job, sample), image in zip(units, batch, strict=False):
                if not job.ended:
                    job.images.append(self._gallery.add(image, self._settings_of(job, sample)))
        except Stopped:
            raise
        except Dropped:
            return
        # The failure of one batch does not affect the next one.
        except Exception as error:
            self._failures += 1
            if self._failures >= FAILURES:
                self.state = "failed"
            self._report(error)
            self._finish(jobs, "failed")
            return
        self._failures, self.state = 0, "ready"
        self._finish([j for j in jobs if len(j.images) == j.request.samples], "done")

    def _report(self, error: Exception) -> None:
        """Logs the failure of a batch; a client that causes many must not fill the disk."""
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._log("".join(traceback.format_exception(error)))

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
            with self._changed:
                self._drop_abandoned()
            waited_for = {job.id: job for job, _ in units if not job.ended}
            if not waited_for:
                raise Dropped
            share = (progress.stage_index + progress.step / progress.steps) / progress.stages
            estimates = np.asarray(progress.x0)
            for job in waited_for.values():
                rows = [row for row, (other, _) in enumerate(units) if other is job]
                done = len(job.images) + share * len(rows)
                job.doing = f"{progress.stage}: step {progress.step} of {progress.steps}"
                job.progress = done / job.request.samples
                job.preview = Preview(estimates[rows])

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

    def _finish(self, jobs: Iterable[Job], state: str) -> None:
        """Ends those of the jobs that have not ended."""
        with self._changed:
            for job in jobs:
                if job.ended:
                    continue
                self.metrics.jobs.labels(state).inc()
                self.metrics.images.inc(len(job.images) if state == "done" else 0)
                if job in self._queue:
                    self._queue.remove(job)
                job.state, job.preview, job.doing = state, None, ""
                job.progress = 1.0 if state == "done" else job.progress
            finished = [job for job in self._jobs.values() if job.ended]
            for job in finished[:-MAX_FINISHED_JOBS]:
                del self._jobs[job.id]


def _padded(count: int, largest: int) -> int:
    """The smallest power of two that is at least `count`, at most `largest`."""
    return min(1 << (count - 1).bit_length(), largest)
