"""The train step of a checkout of any version, run when asked; for `shapes_step.py --against`.

    python benchmarks/step_worker.py DIR [flags of DIR/benchmarks/shapes_step.py]

For each line on stdin, a number, runs as many steps and prints their wall and processor seconds per
step. Nothing of this checkout is imported: the script of DIR makes the step, and where it would
time it, this loop takes over.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def serve(calls: Mapping[str, Callable[[], Any]], *_: Any, **__: Any) -> None:
    """In place of `reporting.interleaved`; ends the process with stdin."""
    for line in sys.stdin:
        wall, processor, count = time.perf_counter(), time.process_time(), int(line)
        for _ in range(count):
            calls["step"]()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        print(wall / count, processor / count, flush=True)
    raise SystemExit


def main() -> None:
    folder = os.path.abspath(sys.argv[1])
    os.chdir(folder)
    sys.path[0:1] = [os.path.join(folder, "benchmarks"), folder]
    import reporting
    import shapes_step

    reporting.interleaved = serve
    sys.argv = ["shapes_step.py", *sys.argv[2:], "--repeats=1", "--only_steps"]
    shapes_step.main()


if __name__ == "__main__":
    main()
