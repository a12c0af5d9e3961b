"""Index, embedding store and reading at scale, against an earlier checkout.

    git worktree add --detach /tmp/before 6a3ecfd
    taskset -c 0 python benchmarks/data_scale.py index --against=/tmp/before [--samples=100000]
    taskset -c 0 python benchmarks/data_scale.py store --against=/tmp/before [--captions=10000000]
    taskset -c 0 python benchmarks/data_scale.py latency [--milliseconds=30]

Every measurement is a process of its own, and the two checkouts take turns. `index`: header pass
over webdataset shards, records per second of one process and of two, by the clock and by CPU time;
then memory of a pass, files of the index, a pass that is killed ten times, and the pass after one
more shard. `store`: seconds and megabytes to open a store of small vectors, lookups per second, and
seconds to the first batch of a source with an image for every caption. `latency`: images/s of 64
px, by loader, of a source whose reads take so many milliseconds, and of the same source without
them. Prints tables and one JSON line.
"""

import argparse
import hashlib
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
SHARD = 5000  # Samples.
DIM, TOKENS = 4, 2

INDEX = """
import os, resource, sys, time
try:
    from imagen_jax.config.data import DataConfig
    from imagen_jax.data.index import scan
    from imagen_jax.data.sources.webdataset import WebDatasetReader as Reader
except ImportError:  # The first layout of the package.
    from imagen_jax.config_data import DataConfig
    from imagen_jax.data import scan, webdataset
    Reader = next(v for v in vars(webdataset).values() if hasattr(v, "scan"))
if __name__ == "__main__":
    data = DataConfig(kind="webdataset", path=sys.argv[1], check="header")
    processes = len(sys.argv) > 2
    scan._processors = lambda: 2 if processes else 1
    used = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (0, -1))
    peak = lambda: resource.getrusage(0).ru_maxrss * 1024
    wall, cpu, before = time.perf_counter(), used(), peak()
    table = scan.cached_index(Reader(data), data, *([Reader] if processes else []))[0]
    print(len(table), time.perf_counter() - wall, used() - cpu, peak() - before)
"""

STORE = """
import resource, sys, time
import numpy as np
try:
    from imagen_jax.data.embeddings.store import EmbeddingStore
except ImportError:
    from imagen_jax.data.embeddings import EmbeddingStore
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, start = memory(), time.perf_counter()
store = EmbeddingStore.open(sys.argv[1])
opened, held = time.perf_counter() - start, memory() - before
rng = np.random.default_rng(0)
count = int(sys.argv[2])
batches = [[f"synthetic image {i}" for i in rng.integers(0, count, 256)] for _ in range(80)]
for batch in batches[:40]:
    store.lookup(batch, 4)
start = time.perf_counter()
for batch in batches[40:]:
    store.lookup(batch, 4)
print(opened, held, 40 * 256 / (time.perf_counter() - start))
"""


def start(code, checkout, *arguments):
    """A process that runs `code` with the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd="/", **pipes)


FIRST_BATCH = """
import sys, time
began = time.perf_counter()
from imagen_jax.config.data import DataConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.sources.registry import open_source
imported = time.perf_counter()
data = DataConfig(kind="synthetic", name=f"{sys.argv[2]}x64", path=sys.argv[1], check="header",
    embeddings=sys.argv[1], max_text_len=4, loader="numpy", batch_size=64)
stream = Pipeline(open_source(data), EmbeddingStore.open(data.embeddings), data, seed=0)
batches = loaders.batches(stream)
next(batches)
print(imported - began, time.perf_counter() - imported)
batches.close()
"""


def child(code, checkout, *arguments):
    """The numbers that a process prints; arguments as of `start`."""
    process = start(code, checkout, *arguments)
    said, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)
    return [float(word) for word in said.splitlines()[-1].split()]


def write_shard(path, number):
    """Samples as img2dataset writes them: .jpg, .txt and .json."""
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg", quality=50)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for i in range(SHARD):
            text = f"a photograph of thing {number * SHARD + i} on a table"
            row = json.dumps({"caption": text, "width": 64, "height": 64})
            parts = {"jpg": buffer.getvalue(), "txt": text.encode(), "json": row.encode()}
            for part, data in parts.items():
                member = tarfile.TarInfo(f"{number:05d}{i:04d}.{part}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def clear(folder):
    """Removes the index beside the data."""
    subprocess.run(["rm", "-rf", str(folder / ".imagen_index")], check=True)


def files_of(folder):
    """The files of the index with their content."""
    paths = sorted((folder / ".imagen_index").rglob("*"))
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in paths if path.is_file()}


def killed(folder, shards, kills=10):
    """Whether the index of a pass that is killed again and again is that of a whole one.

    Returns:
      That, and the number of shards that were read although they had been finished.
    """
    expected = files_of(folder)
    clear(folder)
    times = {}
    for kill in range(kills):
        process = start(INDEX, ROOT, folder)
        target = (kill + 1) * shards // (kills + 1)
        while process.poll() is None:
            found = list((folder / ".imagen_index" / "shards").glob("*.safetensors"))
            if len(found) >= target:
                break
            time.sleep(0.02)
        process.kill()
        process.communicate()
        for path in (folder / ".imagen_index" / "shards").glob("*.safetensors"):
            times.setdefault(path, path.stat().st_mtime_ns)
    child(INDEX, ROOT, folder)
    again = sum(path.stat().st_mtime_ns != then for path, then in times.items())
    return files_of(folder) == expected, again


def index(flags, checkouts):
    """Header passes, in turns."""
    rows = {name: [] for name in [*checkouts, "this, two processes"]}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shards = -(-flags.samples // SHARD)
        for number in range(shards):
            write_shard(folder / f"{number:05d}.tar", number)
        for _ in range(flags.repeats):
            for checkout, path in checkouts.items():
                clear(folder)
                rows[checkout].append(child(INDEX, path, folder))
            clear(folder)
            rows["this, two processes"].append(child(INDEX, ROOT, folder, "processes"))
        clear(folder)
        whole = child(INDEX, ROOT, folder)
        files = [
            path.stat().st_size for path in folder.rglob(".imagen_index/**/*") if path.is_file()
        ]
        same, again = killed(folder, shards)
        write_shard(folder / "99999.tar", 99_999)
        more = child(INDEX, ROOT, folder)
    print("| checkout | records/s | per CPU second |\n|---|---|---|")
    result = {}
    for checkout, found in rows.items():
        wall, cpu = (
            statistics.median(n / row[k] for row in found for n in row[:1]) for k in (1, 2)
        )
        result[checkout] = {"per_s": round(wall), "per_cpu_s": round(cpu)}
        print(f"| {checkout} | {wall:,.0f} | {cpu:,.0f} |")
    share = more[2] / whole[2]
    word = "identical" if same else "DIFFERS"
    print(
        f"memory of the pass {whole[3] / 1e6:.0f} MB; {len(files)} files, {sum(files) / 1e6:.0f} MB"
    )
    print(f"killed 10 times: index {word}, {again} finished shards read again")
    print(f"one more shard of {shards + 1}: {share:.1%} of the CPU time of a full pass")
    result |= {
        "memory_mb": round(whole[3] / 1e6),
        "files": len(files),
        "mb": round(sum(files) / 1e6),
    }
    result |= {"identical_after_kills": same, "read_again": again}
    return {**result, "one_more_shard": round(share, 4), "samples": shards * SHARD}


def write_store(folder, count):
    """A store of `count` captions in units of 2**16."""
    sys.path.insert(0, str(ROOT))
    from imagen_jax.data.embeddings import store

    rows = np.ones((TOKENS, DIM), np.float32)
    units = []
    for start in range(0, count, 1 << 16):
        captions = [f"synthetic image {i}" for i in range(start, min(start + (1 << 16), count))]
        path = folder / f"unit_{start:012d}.bin"
        store.write_unit(path, captions, [rows] * len(captions))
        units.append(store.describe_unit(path))
    store.write_manifest(folder, units, {})


def store(flags, checkouts):
    """Opening and lookups, in turns."""
    rows = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as name:
        write_store(pathlib.Path(name), flags.captions)
        for _ in range(flags.repeats):
            for checkout, path in checkouts.items():
                rows[checkout].append(child(STORE, path, name, flags.captions))
        child(
            FIRST_BATCH, ROOT, name, flags.captions
        )  # Builds the index, and compares all captions once.
        first = [child(FIRST_BATCH, ROOT, name, flags.captions) for _ in range(flags.repeats)]
    print("| checkout | opens, s | MB | lookups/s |\n|---|---|---|---|")
    result = {"captions": flags.captions}
    for checkout, found in rows.items():
        seconds, held, rate = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {checkout} | {seconds:.2f} | {held / 1e6:.0f} | {rate:,.0f} |")
        result[checkout] = {"s": round(seconds, 3), "mb": round(held / 1e6), "per_s": round(rate)}
    imports, batch = (statistics.median(column) for column in zip(*first, strict=True))
    print(f"source, store and first batch: {batch:.2f} s, after {imports:.1f} s of imports")
    return {**result, "first_batch_s": round(batch, 2)}


LATENCY = """
import dataclasses, itertools, pathlib, sys, time
import benchmarks.input as world
from imagen_jax.config.data import DataConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.sources.registry import open_source
from imagen_jax.data.sources.webdataset import WebDatasetReader
folder, loader, delay, reads = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
data = DataConfig(kind="webdataset", path=folder + "/images.tar", embeddings=folder + "/store",
    max_text_len=world.LENGTH, loader=loader, image_size=64, batch_size=256, reads=reads)
source = open_source(data, log=lambda line: None)
read = WebDatasetReader.read
def slow(self, key, location):
    time.sleep(delay)
    return read(self, key, location)
WebDatasetReader.read = slow
stream = Pipeline(source, EmbeddingStore.open(data.embeddings), data, seed=0, cache_bytes=0)
batches = loaders.batches(stream)
for _ in range(3):
    next(batches)
start, count = time.perf_counter(), 0
while time.perf_counter() - start < 4:
    count += len(next(batches)["image"])
print(count / (time.perf_counter() - start), 0, 0)
"""


def latency(flags, checkouts):
    """Loaders with and without latency, in turns."""
    del checkouts
    delays = (0.0, flags.milliseconds / 1000)
    rows = {(loader, delay): [] for loader in flags.loaders.split(",") for delay in delays}
    sys.path.insert(0, str(ROOT))
    import benchmarks.input as world

    with tempfile.TemporaryDirectory() as name:
        world.write_world(pathlib.Path(name), 64, 512)
        for _ in range(flags.repeats):
            for (loader, delay), found in rows.items():
                found.append(child(LATENCY, ROOT, name, loader, delay, flags.reads)[0])
    print("| loader | ms per read | images/s |\n|---|---|---|")
    result = {}
    for (loader, delay), found in rows.items():
        print(f"| {loader} | {1000 * delay:.0f} | {statistics.median(found):,.0f} |")
        result[f"{loader} {1000 * delay:.0f} ms"] = round(statistics.median(found))
    return {**result, "reads": flags.reads}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("index", "store", "latency"))
    parser.add_argument("--against", help="an earlier checkout")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=10_000_000)
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--reads", type=int, default=64)
    parser.add_argument("--loaders", default="numpy,seqio")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    checkouts = {"this": ROOT}
    if flags.against:
        checkouts["before"] = pathlib.Path(flags.against)
    result = globals()[flags.part](flags, checkouts)
    print(json.dumps({"benchmark": f"data_scale {flags.part}", **result}))


if __name__ == "__main__":
    main()
