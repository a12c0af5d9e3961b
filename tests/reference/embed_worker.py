"""`imagen embed` as one of several workers that logs every call of the encoder.

    python -m tests.reference.embed_worker LOG SECONDS --config=...

Before each call a line with the hash of its ids is appended to LOG; then the worker sleeps SECONDS.
"""

import hashlib
import os
import sys
import time

import numpy as np

from imagen_jax.cli import main as run
from imagen_jax.text.frozen_encoder import FrozenEncoder

encode = FrozenEncoder.encode


def main() -> int:
    log, seconds, *arguments = sys.argv[1:]

    def logged(self, ids, mask):
        line = hashlib.sha256(np.asarray(ids).tobytes()).hexdigest() + "\n"
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())
        os.close(file)
        time.sleep(float(seconds))
        return encode(self, ids, mask)

    FrozenEncoder.encode = logged
    return run.main(["embed", *arguments])


if __name__ == "__main__":
    sys.exit(main())
