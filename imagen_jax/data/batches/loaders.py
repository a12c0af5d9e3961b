"""The loaders by name: who prepares the batches of a pipeline ahead of the training step.

Both give the bits of `Pipeline.batch_at`, so a run may change the loader when it is resumed.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.data.batches.pipeline import Batch, Pipeline


def batches(pipeline: Pipeline, start_step: int = 0) -> Iterator[Batch]:
    """Yields batches of the pipeline's rows from a step on, without end, prepared by `data.loader`.

    Args:
      pipeline: makes the batches.
      start_step: first step; starting late costs nothing.

    Raises:
      ConfigError: unknown loader, or its libraries are not installed.
    """
    loader = pipeline.data.loader
    if loader not in LOADERS:
        raise ConfigError(unknown_name("config.data.loader", loader, list(LOADERS)))
    return LOADERS[loader](pipeline, start_step)


def _numpy(pipeline: Pipeline, start_step: int) -> Iterator[Batch]:
    """`data.prefetch` batches at a time, made by threads."""
    ahead = max(pipeline.data.prefetch, 1)
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="batches")
    # Each batch under way reads as many images at a time.
    reads = ThreadPoolExecutor(ahead * pipeline.data.reads, thread_name_prefix="reads")
    steps = itertools.count(start_step)
    try:
        pending = collections.deque(
            pool.submit(pipeline.batch_at, next(steps), reads) for _ in range(ahead)
        )
        while True:
            batch = pending.popleft().result()
            pending.append(pool.submit(pipeline.batch_at, next(steps), reads))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
        reads.shutdown()


def _seqio(pipeline: Pipeline, start_step: int) -> Iterator[Batch]:
    """By tf.data, through the seqio task of the pipeline."""
    try:
        from imagen_jax.data.batches import tasks
    except ImportError as error:
        raise ConfigError(
            f"config.data.loader='seqio' needs the module {error.name!r}; install it or set "
            "--config.data.loader=numpy, which gives the same batches"
        ) from None
    return tasks.imagen_batches(pipeline, start_step)


LOADERS: dict[str, Callable[[Pipeline, int], Iterator[Batch]]] = {
    "seqio": _seqio,
    "numpy": _numpy,
}
