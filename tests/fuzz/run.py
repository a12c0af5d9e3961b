"""Reads mutated files with every reader: no traceback, no hang, no child process, bounded memory.

    python -m tests.fuzz.run --count=10000 [--readers=png,tar] [--coverage]

Prints a JSON object by reader: inputs, share that passed the header, errors, seconds of the
slowest input, growth of peak memory in MB; with --coverage also the branches of the readers'
modules that were taken.
The process ends at once, with a traceback of all threads, when an input takes a minute.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import pathlib
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings

MODULES = (
    *("io.images", "io.rendering", "io.colour", "io.png_chunks", "io.jsonl"),
    *("data.sources.tfrecord", "data.sources.webdataset", "data.sources.parquet"),
    *("data.sources.folder", "interop.weights", "interop.torch_pickle", "inference.prompts"),
    *("evaluation.samples", "evaluation.raters.score", "data.embeddings.unit_file"),
)
MEMORY = 3 << 30  # Bytes of the address space beyond what the imports take.
SECONDS = 60


def main() -> int:
    """Runs the readers; returns 1 after a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="inputs per reader")
    parser.add_argument("--readers", default="", help="names, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true")
    flags = parser.parse_args()
    measured = None
    if flags.coverage:
        import coverage

        measured = coverage.Coverage(branch=True, source=["imagen_jax"], data_file=None)
        measured.start()
    module = importlib.import_module("tests.fuzz.readers")
    children: list[str] = []
    sys.addaudithook(lambda event, _: children.append(event) if event in CHILDREN else None)
    warnings.simplefilter("ignore")
    results, faults = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        known = module.readers(folder)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        names = flags.readers.split(",") if flags.readers else list(known)
        for name in names:
            results[name] = _run(known[name], folder / f"{name.replace('.', '_')}", flags, faults)
    report = {"readers": results, "children": children, "faults": faults}
    if measured is not None:
        measured.stop()
        report["branch_coverage"] = _coverage(measured)
    print(json.dumps(report, indent=1))
    return 1 if faults or children else 0


CHILDREN = {"subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn"}


def _run(reader, folder: pathlib.Path, flags: argparse.Namespace, faults: list[str]) -> dict:
    """Reads `flags.count` mutations; adds what must not happen to `faults`."""
    folder.mkdir()
    path = folder / f"file{reader.suffix}"
    rng = random.Random(f"{flags.seed} {folder.name}")
    passed, errors, slowest = 0, 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in reader.seeds:
        path.write_bytes(seed)
        assert reader.read(path), f"{folder.name}: a valid file is refused"
    for number in range(flags.count):
        data = reader.mutation(rng.choice(reader.seeds), rng)
        path.write_bytes(data)
        started = time.monotonic()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        passed += reader.header is not None and reader.header(data)
        try:
            passed += bool(reader.read(path)) and reader.header is None
        except reader.errors as error:
            errors += 1
            if "\n" in str(error):
                faults.append(f"{folder.name} {number}: a message of several lines: {error}")
        except BaseException as error:  # Also MemoryError and SystemExit.
            text = "".join(traceback.format_exception(error)[-3:])
            faults.append(f"{folder.name} {number}: {text}")
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - started)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "inputs": flags.count,
        "past_header": round(passed / max(flags.count, 1), 3),
        "errors": errors,
        "slowest_s": round(slowest, 2),
        "memory_mb": grown // 1024,
    }


def _coverage(measured) -> dict[str, str]:
    found = {}
    for name in MODULES:
        module = sys.modules.get(f"imagen_jax.{name}")
        if module is not None and module.__file__:
            numbers = measured._analyze(module.__file__).numbers
            found[name] = f"{numbers.n_executed_branches}/{numbers.n_branches}"
    return found


if __name__ == "__main__":
    sys.exit(main())
