"""Batches that tests of training loops share."""

import pytest


@pytest.fixture(scope="module")
def stream(make_batch):
    """(config, change, event) -> batches by position; `change(position, batch)` spoils some."""

    def open_stream(config, change=lambda position, batch: batch, event=lambda position: None):
        def batches(start: int):
            for position in range(start, 10**9):
                event(position)
                yield change(position, make_batch(config, seed=position))

        return batches

    return open_stream
