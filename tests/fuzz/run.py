"""Reads mutated files with every reader: no traceback, no hang, no child process, bounded memory.

    python -m tests.fuzz.run --count=10000 [--readers=png,tar] [--coverage]

Prints a JSON object by reader: inputs, share that passed the header, errors, seconds of the
slowest input, growth of peak memory in MB; with --coverage also the branches of the reader's
modules that were taken. --table=FILE adds the readers to a Markdown table (docs/fuzzing.md).
The process ends at once, with a traceback of all threads, when an input takes a minute.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Iterator

_IMAGES = ("io.images", "io.rendering", "io.colour")
_BOXES = (*_IMAGES, "io.isobmff", "io.icc")
_INDEX = ("data.index.check", "data.index.scan", "data.sources.records")
_TEXT = ("io.text", "io.encodings")
_FOLDER = (*_INDEX, *_TEXT, "data.sources.folder", "data.sources.metadata", "data.sources.captions")
# Modules of the readers, by the start of their names.
MODULES = {
    "png": (*_IMAGES, "io.png_chunks", "io.icc"),
    "avif": _BOXES,
    "heif": _BOXES,
    "tfrecord": (*_INDEX, "data.sources.tfrecord"),
    "tar": (*_INDEX, "data.sources.tar", "data.sources.webdataset", "data.sources.captions"),
    "parquet": (*_INDEX, "data.sources.parquet"),
    "captions": _FOLDER,
    "prompts": (*_TEXT, "inference.prompts"),
    "safetensors": ("interop.weights",),
    "torch": ("interop.weights", "interop.torch_pickle"),
    "config": ("config.overrides",),
    "samples": ("evaluation.samples", "io.jsonl"),
    "ratings": ("evaluation.raters.score",),
    "key": ("evaluation.raters.score",),
    "statistics": ("evaluation.features.frechet",),
    "embeddings": ("data.embeddings.unit_file",),
    "manifest": ("data.embeddings.store", "data.embeddings.packs", "data.embeddings.key_table"),
}
MEMORY = 3 << 30  # Bytes of the address space beyond what the imports take.
SECONDS = 60


def main() -> int:
    """Runs the readers; returns 1 after a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="inputs per reader")
    parser.add_argument("--readers", default="", help="names, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--table", default="", help="Markdown file to add the results to")
    flags = parser.parse_args()
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
            place = folder / name.replace(".", "_")
            with _measured(name if flags.coverage else "") as branches:
                results[name] = _run(known[name], place, flags, faults)
            results[name] |= {"branches": branches} if branches else {}
    report = {"readers": results, "children": children, "faults": faults}
    print(json.dumps(report, indent=1))
    if flags.table and not (faults or children):
        _add_to_table(pathlib.Path(flags.table), results)
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


@contextlib.contextmanager
def _measured(name: str) -> Iterator[dict[str, str]]:
    """Branches of the reader's modules that are taken in the context, filled at its end."""
    taken: dict[str, str] = {}
    if not name:
        yield taken
        return
    import coverage

    names = next((MODULES[start] for start in MODULES if name.startswith(start)), _IMAGES)
    modules = {module: importlib.import_module(f"imagen_jax.{module}") for module in names}
    files = {module: str(found.__file__) for module, found in modules.items()}
    measured = coverage.Coverage(branch=True, include=list(files.values()), data_file=None)
    measured.start()
    try:
        yield taken
    finally:
        measured.stop()
    for module, file in files.items():
        numbers = measured._analyze(file).numbers
        taken[module] = f"{numbers.n_executed_branches}/{numbers.n_branches}"


def _add_to_table(file: pathlib.Path, results: dict[str, dict]) -> None:
    """Replaces or adds the rows of the readers in a Markdown table, the only one of the file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    for name, found in results.items():
        branches = ", ".join(f"{module} {share}" for module, share in found["branches"].items())
        cells = [f"{value}" for value in (found | {"branches": branches}).values()]
        lines = [line for line in lines if not line.startswith(f"| {name} |")]
        last = max(i for i, line in enumerate(lines) if line.startswith("|"))
        lines.insert(last + 1, f"| {' | '.join([name, *cells])} |")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
