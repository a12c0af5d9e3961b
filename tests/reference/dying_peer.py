"""`imagen train` in several processes, of which the last one dies before a call of a function.

    python tests/reference/dying_peer.py PLACE train FLAGS...

Runs in every process of a launch (tests/reference/processes.py).
"""

import itertools
import os
import signal
import sys

from imagen_jax.cli.main import main
from imagen_jax.parallel import distributed, partitioning

# The function, and the number of its call before which the process dies.
PLACES = {
    "start": (distributed, "initialize", 0),
    "devices": (partitioning, "make_mesh", 0),
    "ownership": (distributed, "share", 0),
    # Connected to the others: the exchange of lengths is over, that of the texts begins.
    "exchange": (distributed, "all_gather", 1),
}


def dies_at(function, call: int):
    """`function` whose call of that number, from 0, kills the process."""
    calls = itertools.count()

    def counted(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


if __name__ == "__main__":
    place, *arguments = sys.argv[1:]
    distributed.START_TIMEOUT = 20
    if os.environ["JAX_PROCESS_ID"] == str(int(os.environ["JAX_NUM_PROCESSES"]) - 1):
        module, name, number = PLACES[place]
        setattr(module, name, dies_at(getattr(module, name), number))
    sys.exit(main(arguments))
