"""Streams of batches, as `train` and its evaluations read them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Array

# A source of batches: a position in the data -> its batch and all that follow. A batch has the rows
# of `partitioning.batch_rows`, or all rows. The position is the step, until a roll-back skips data.
Batches = Callable[[int], Iterable[Mapping[str, np.ndarray]]]
# Input processing on the devices: encodes the captions where embeddings are not stored.
Encode = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@contextlib.contextmanager
def closing_stream(stream: Iterator) -> Iterator[Iterator]:
    """Closes a stream that has a `close` method."""
    try:
        yield stream
    finally:
        close = getattr(stream, "close", None)
        if close:
            close()
