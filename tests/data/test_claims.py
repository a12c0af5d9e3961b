"""claims.py: one worker holds a claim; exactly one other replaces a dead worker."""

import os
import threading
import time

import pytest

from imagen_jax.data.embeddings.claims import Claims

PATIENCE = 0.3


@pytest.fixture
def worker(tmp_path):
    """A worker without heartbeats: its thread is not started."""
    return lambda patience=PATIENCE: Claims(tmp_path, patience)


def outwait(claims, name) -> float:
    """Seconds until `claims` gets `name`."""
    start = time.monotonic()
    while not claims.take(name):
        time.sleep(0.02)
        assert time.monotonic() - start < 20 * PATIENCE
    return time.monotonic() - start


def test_only_one_has_a_claim_until_it_is_released(worker, tmp_path):
    first, second = worker(), worker()
    assert first.take("unit") and not second.take("unit")
    assert second.take("other")
    first.release("unit")
    assert second.take("unit")
    second.release("unit")
    second.release("other")
    assert list(tmp_path.iterdir()) == []


def test_one_of_many_concurrent_workers_wins(worker):
    won = []
    start = threading.Barrier(8)

    def run(claims):
        start.wait()
        won.extend(name for name in map(str, range(50)) if claims.take(name))

    threads = [threading.Thread(target=run, args=[worker()]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won, key=int) == [str(i) for i in range(50)]


def test_exactly_one_worker_replaces_a_dead_one(worker, tmp_path):
    dead, second, third = worker(), worker(), worker()
    assert dead.take("unit")
    assert not second.take("unit") and not third.take("unit")
    assert outwait(second, "unit") > 0.9 * PATIENCE
    # The third, too, has seen the dead one's silence; the claim is no longer the dead one's.
    assert not third.take("unit")
    # The dead one was only slow: what it gives up is the second's, which is done as well then.
    dead.release("unit")
    assert list(tmp_path.iterdir()) == []


def test_heartbeats_keep_a_claim(worker):
    waiting = worker()
    with worker() as living:
        assert living.take("unit")
        deadline = time.monotonic() + 4 * PATIENCE
        while time.monotonic() < deadline:
            assert not waiting.take("unit")
            time.sleep(0.02)
    # Left without an end to its work, by an exception say: at once free again.
    assert waiting.take("unit")


def test_clocks_of_other_machines_do_not_matter(worker, tmp_path):
    dead, second = worker(), worker()
    assert dead.take("unit")
    claim = next(tmp_path.iterdir())
    for shift in (-1e6, 1e6):
        os.utime(claim, (time.time() + shift,) * 2)
        assert not second.take("unit")
    assert outwait(second, "unit") > 0.9 * PATIENCE
