"""Input throughput of one host per core: cached embeddings and images to batches.

    taskset -c 0 python benchmarks/input.py [--loaders=numpy,seqio] [--seconds=6] [--repeats=3]

Embeddings have width 4096 in bfloat16 and 20 tokens on average, and are padded to 32 in float32.
Images are JPEGs (quality 90, structure at all scales) in a tar file, decoded for every batch (no
cache). Prints, for each case and loader, images/s (median, lowest, highest) and images/s per core
in use, then one JSON line. Pin the process to cores (`taskset`) on which nothing else runs.
"""

import argparse
import dataclasses
import io
import itertools
import json
import os
import pathlib
import statistics
import tarfile
import tempfile
import time

import ml_dtypes
import numpy as np
from PIL import Image

from imagen_jax.config.data import DataConfig
from imagen_jax.data.batches import loaders
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.store import (
    EmbeddingStore,
    describe_unit,
    unit_name,
    write_manifest,
    write_unit,
)
from imagen_jax.data.sources.registry import open_source

WIDTH, LENGTH = 4096, 32
H200S, PER_CHIP = 8, 83  # images/s of a base stage at 40% MFU on an H200, computed, not measured.
# name -> (side of the stored images, number of images, data settings of the stage)
CASES = {
    "text": (8, 512, {"image_size": 8, "batch_size": 256}),
    "64": (64, 512, {"image_size": 64, "batch_size": 256}),
    "256 to 64": (256, 256, {"image_size": 64, "batch_size": 128}),
    "1024 to 256 crops": (
        1024,
        48,
        {"image_size": 256, "lowres_size": 64, "crop_from": 1024, "batch_size": 16},
    ),
}


def photo(side, seed):
    """A JPEG with structure at all scales, as photographs have."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((side, side, 3))
    for cells in (2, 8, 32, 128):
        if cells <= side:
            coarse = rng.normal(size=(cells, cells, 3)).astype(np.float32)
            layers = [Image.fromarray(coarse[..., c], "F") for c in range(3)]
            large = [np.asarray(p.resize((side, side), Image.Resampling.BICUBIC)) for p in layers]
            pixels += np.stack(large, axis=-1) * 100 / cells**0.5
    buffer = io.BytesIO()
    Image.fromarray((pixels + 127).clip(0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def write_world(folder, side, count):
    """Writes a tar file of images and the embeddings of their captions."""
    captions = [f"picture {i} of {side} px" for i in range(count)]
    with tarfile.open(folder / "images.tar", "w") as shard:
        for i, caption in enumerate(captions):
            for name, data in ((f"{i}.jpg", photo(side, i)), (f"{i}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    rng = np.random.default_rng(0)
    store = folder / "store"
    store.mkdir()
    lengths = rng.integers(10, 31, count)
    rows = [rng.normal(size=(n, WIDTH)).astype(ml_dtypes.bfloat16) for n in lengths]
    unit = store / unit_name(captions)
    write_unit(unit, captions, rows)
    write_manifest(store, [describe_unit(unit)], {})


def rates(stream, seconds, repeats):
    """Sorted images/s of `repeats` measurements, and the median number of cores in use."""
    batches = loaders.batches(stream)
    for _ in range(2 * stream.data.prefetch + 1):
        next(batches)
    found, used = [], []
    for _ in range(repeats):
        begin, busy, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < seconds:
            count += len(next(batches)["image"])
        took = time.perf_counter() - begin
        found.append(count / took)
        used.append((time.process_time() - busy) / took)
    if hasattr(batches, "close"):
        batches.close()
    return sorted(found), statistics.median(used)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loaders", default="numpy,seqio")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rows = []
    print(
        f"{cores} core(s), L = {LENGTH}, D = {WIDTH}, load of the machine {os.getloadavg()[0]:.1f}"
    )
    print("| images | loader | images/s | lowest-highest | cores in use | per core |")
    print("|---|---|---|---|---|---|")
    for case, loader in itertools.product(flags.cases.split(","), flags.loaders.split(",")):
        side, count, settings = CASES[case]
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            write_world(folder, side, count)
            data = DataConfig(
                kind="webdataset",
                path=str(folder / "images.tar"),
                embeddings=str(folder / "store"),
                max_text_len=LENGTH,
                loader=loader,
                prefetch=max(cores, 2),
                **settings,
            )
            store = EmbeddingStore.open(data.embeddings)
            source = open_source(data, log=lambda line: None)
            stream = Pipeline(source, store, dataclasses.replace(data), seed=0, cache_bytes=0)
            found, used = rates(stream, flags.seconds, flags.repeats)
        median = statistics.median(found)
        print(
            f"| {case} | {loader} | {median:,.0f} | {found[0]:,.0f}-{found[-1]:,.0f} "
            f"| {used:.2f} | {median / used:,.0f} |",
            flush=True,
        )
        rows.append(
            {"case": case, "loader": loader, "per_s": round(median), "cores": round(used, 2)}
        )
    need = H200S * PER_CHIP
    for row in rows:
        if row["case"] in ("64", "256 to 64"):
            cores_needed = need / (row["per_s"] / row["cores"])
            print(
                f"eight H200s at the base stage, {need} images/s: {cores_needed:.1f} cores "
                f"({row['case']}, {row['loader']})"
            )
    print(json.dumps({"benchmark": "input", "max_text_len": LENGTH, "width": WIDTH, "rows": rows}))


if __name__ == "__main__":
    main()
