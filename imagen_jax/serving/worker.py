"""One thread owns the devices: it takes requests from a bounded queue and draws them in batches.

Pictures of several requests go into one call of the model if their settings allow it. A batch has
1, 2, 4, ... pictures (the last one is repeated to fill it up), so that few programs are compiled.
Picture k of a request is what `imagen sample --prompt=... --seed=...` draws as sample k.
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
from imagen_jax.io import images
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import Limits, Order

REPORTS_PER_STAGE = 20  # looks at a stage while it draws
PATIENCE = 30.0  # seconds; a compilation cannot be interrupted
MAX_FINISHED_JOBS = 1000  # jobs whose answer is remembered


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class Stopped(Exception):
    """The server is going down."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way; only the worker changes it.

    Attributes:
      order: what was asked for.
      state: waiting, drawing, done or failed.
      started: pictures that the model was given.
      progress: share of the work done, 0..1.
      doing: what goes on, for people.
      pictures: identifiers of those that are ready.
      preview: estimates of the pictures being drawn, [n, h, w, 3] in [-1, 1].
    """

    order: Order
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))
    state: str = "waiting"
    started: int = 0
    progress: float = 0.0
    doing: str = ""
    pictures: list[str] = dataclasses.field(default_factory=list)
    preview: np.ndarray | None = None

    def settings(self) -> str:
        """What two requests must share to be drawn by one call."""
        negative = bool(self.order.negative_prompt)
        return json.dumps([self.order.stages, negative], sort_keys=True)

    def describe(self) -> dict[str, Any]:
        """The job as its client sees it."""
        shown = {name: getattr(self, name) for name in ("id", "state", "progress", "doing")}
        shown["preview"] = self.preview is not None
        return shown | {"pictures": list(self.pictures), **dataclasses.asdict(self.order)}


class Worker:
    """The queue and the thread behind it."""

    def __init__(
        self,
        cascade: Cascade,
        gallery: Gallery,
        limits: Limits,
        *,
        checkpoint: str = "",
        log: Callable[[str], None] = print,
    ):
        """Starts nothing yet.

        Args:
          cascade: draws.
          gallery: keeps the pictures.
          limits: of the queue and of a batch.
          checkpoint: where the stages came from, for the record.
          log: receives lines.
        """
        self.ready = False
        self._cascade, self._gallery, self._limits = cascade, gallery, limits
        self._checkpoint, self._log = checkpoint, log
        self._queue: collections.deque[Job] = collections.deque()
        self._jobs: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="draws", daemon=True)

    def start(self) -> None:
        """Starts the thread, which first compiles what requests with default settings need."""
        self._thread.start()

    def stop(self) -> None:
        """Stops between two steps, or after PATIENCE seconds; requests that wait are lost."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE)

    def submit(self, order: Order) -> Job:
        """Queues a request. Raises QueueFull."""
        job = Job(order)
        with self._changed:
            if len(self._queue) >= self._limits.queue:
                raise QueueFull(f"{len(self._queue)} requests wait; try again in a few seconds")
            self._queue.append(job)
            self._jobs[job.id] = job
            self._changed.notify()
        return job

    def job(self, identifier: str) -> Job | None:
        """The job of that identifier, as long as it is remembered."""
        return self._jobs.get(identifier)

    def ahead(self, job: Job) -> int:
        """Requests that wait before this one."""
        with self._changed:
            return self._queue.index(job) if job in self._queue else 0

    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def _run(self) -> None:
        # Cut prompts are said to the client; the interpreter would remember each warning for good.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._warm_up()
                while True:
                    self._draw(self._take())
            except Stopped:
                return

    def _warm_up(self) -> None:
        sizes = {1, _padded(self._limits.batch, self._limits.batch)}
        for size in sorted(sizes):
            self._log(f"compiling for batches of {size}")
            self._cascade.sample([""] * size, batch_size=size, on_progress=self._check)
        self.ready = True
        self._log("ready")

    def _check(self, progress: Progress) -> None:
        if self._stopping:
            raise Stopped

    def _take(self) -> list[tuple[Job, int]]:
        """The next batch: (job, sample index) of requests with the settings of the oldest one."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if self._stopping:
                raise Stopped
            settings, units = self._queue[0].settings(), []
            for job in list(self._queue):
                if job.settings() == settings:
                    room = self._limits.batch - len(units)
                    end = min(job.started + room, job.order.samples)
                    units += [(job, sample) for sample in range(job.started, end)]
                    job.started, job.state = end, "drawing" if end else job.state
                    if end == job.order.samples:
                        self._queue.remove(job)
            return units

    def _draw(self, units: list[tuple[Job, int]]) -> None:
        jobs = list({job.id: job for job, _ in units}.values())
        try:
            pictures = self._sample(units)
            for (job, sample), picture in zip(units, pictures, strict=False):
                job.pictures.append(self._gallery.add(picture, self._about(job, sample)))
        except Stopped:
            raise
        # Whatever it was, the next request may be drawn all the same.
        except Exception:
            self._log(traceback.format_exc())
            self._finish(jobs, "failed")
            return
        self._finish([j for j in jobs if len(j.pictures) == j.order.samples], "done")

    def _sample(self, units: list[tuple[Job, int]]) -> np.ndarray:
        size = _padded(len(units), self._limits.batch)
        filled = units + [units[-1]] * (size - len(units))
        orders = [job.order for job, _ in filled]
        negative = [order.negative_prompt for order in orders]
        steps = max(settings["steps"] for settings in orders[0].stages.values())

        def report(progress: Progress) -> None:
            self._check(progress)
            share = (progress.stage_index + progress.step / progress.steps) / progress.stages
            estimates = np.asarray(progress.x0)
            for job in {job.id: job for job, _ in units}.values():
                mine = [row for row, (other, _) in enumerate(units) if other is job]
                done = len(job.pictures) + share * len(mine)
                job.doing = f"{progress.stage}: step {progress.step} of {progress.steps}"
                job.progress = done / job.order.samples
                job.preview = estimates[mine]

        return self._cascade.sample(
            [order.prompt for order in orders],
            seed=[order.seed for order in orders],
            prompt_indices=[0] * size,
            sample_indices=[sample for _, sample in filled],
            negative_prompts=negative if any(negative) else None,
            stage_settings=orders[0].stages,
            batch_size=size,
            on_progress=report,
            report_every=max(steps // REPORTS_PER_STAGE, 1),
        )

    def _about(self, job: Job, sample: int) -> dict[str, Any]:
        """What is kept with a picture: all that it follows from."""
        about = dataclasses.asdict(job.order)
        return {**about, "sample_index": sample, "checkpoint": self._checkpoint}

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
    """The pictures of a job as they are now, side by side, as PNG; None: nothing to see."""
    estimates = job.preview
    if estimates is None:
        return None
    return images.encode_png(np.concatenate(images.to_uint8(estimates), axis=1))


def _padded(count: int, largest: int) -> int:
    """The power of two from `count` on, at most `largest`."""
    return min(1 << (count - 1).bit_length(), largest)
