"""Whether a run can use an address in a bucket, and how fast."""

from __future__ import annotations

import os
import time
import uuid
from typing import Literal

from imagen_jax.io import buckets

PROBE_BYTES = 32 << 20


def check_bucket(address: str) -> tuple[Literal["ok", "failed"], str]:
    """Writes, reads, lists and deletes an object below an address.

    Returns:
      A finding of `doctor`, with the throughput of PROBE_BYTES in one request each way.

    Raises:
      BucketError: the store does not answer, or a right is missing.
    """
    name, data = f"doctor_{uuid.uuid4().hex}", os.urandom(PROBE_BYTES)
    probe, start = buckets.join(address, name), time.monotonic()
    try:
        buckets.write(probe, data, new=True)
        written = time.monotonic()
        same = buckets.read(probe).data == data
        read = time.monotonic()
        listed = name in buckets.names(address)
    finally:
        buckets.delete([probe])
    if not same or not listed:
        return "failed", f"{address} does not return what was written; name another --workdir"
    up, down = (len(data) / 1e6 / max(t, 1e-9) for t in (written - start, read - written))
    return "ok", f"{address} is writable; {up:.0f} MB/s written, {down:.0f} MB/s read"
