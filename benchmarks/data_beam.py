"""`prepare --duplicates` by Apache Beam against the local command, with a worker killed.

    make beam
    .venv_beam/bin/python benchmarks/data_beam.py [--samples=100000] [--workers=2] [--folder=DIR]

Webdataset shards of small JPEGs, a fifth of which repeat an earlier sample: half of these in its
bytes, half recompressed. The local command and the pipeline on the multi-process direct runner
index the same folder one after the other, with `data.check=header`. One worker of the pipeline is
killed after a fifth of the shards, and the command is repeated. Prints seconds, CPU seconds and
whether all files of the index and all lines of the report are equal, then one JSON line.
"""

import argparse
import hashlib
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
SHARD = 5000  # Samples.
SIDE = 24  # Pixels.
CONFIG = """
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

def get_config(name=""):
    c = overrides.to_config_dict(Config())
    c.data.kind, c.data.path, c.data.check = "webdataset", {path!r}, "header"
    return c
"""


def jpeg(pixels, quality):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def sample(number):
    """Image and caption; a fifth repeat an earlier one."""
    rng = np.random.default_rng(number)
    repeats = number % 5 == 4
    other = int(rng.integers(number // 5 + 1)) * 5 if repeats else number
    pixels = np.random.default_rng(other).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    quality = 70 if repeats and number % 2 else 90
    return jpeg(pixels, quality), f"a photograph of thing {other} on a table"


def write_shards(folder, samples):
    for start in range(0, samples, SHARD):
        with tarfile.open(folder / f"{start:010d}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
            for number in range(start, min(start + SHARD, samples)):
                image, text = sample(number)
                for part, data in (("jpg", image), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{number:010d}.{part}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))


def digests(folder):
    """A hash of every file of the index."""
    paths = sorted(path for path in (folder / ".imagen_index").rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def workers(mark):
    """Ids of the worker processes with this variable in their environment."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            own = mark in (path / "environ").read_bytes()
        except OSError:
            continue
        is_worker = b"apache_beam.runners.worker.sdk_worker_main" in words  # Not its shell.
        if is_worker and own:
            found.append(int(path.name))
    return found


def timed(command, folder=None, kill_at=0):
    """Report, seconds and CPU seconds of a command; `kill_at`: shards after which a worker dies."""
    mark = f"IMAGEN_BENCHMARK={os.getpid()}"
    environment = {**os.environ, "IMAGEN_BENCHMARK": str(os.getpid())}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    while kill_at and process.poll() is None:
        if len(list((folder / ".imagen_index" / "shards").glob("*.safetensors"))) >= kill_at:
            os.kill(workers(mark.encode())[0], signal.SIGKILL)
            break
        time.sleep(0.1)
    lines = process.communicate()[0].splitlines(keepends=True)
    said = "".join(line for line in lines if not line.startswith("index: "))  # Progress.
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode != bool(kill_at):
        sys.exit(f"{command} ended with {process.returncode}")
    return said, time.perf_counter() - start, cpu


def measure(folder, flags):
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        write_shards(data, flags.samples)
    shards = len(list(data.glob("*.tar")))
    (folder / "config.py").write_text(CONFIG.format(path=str(data)))
    command = [sys.executable, "-m", "imagen_jax", "prepare", f"--config={folder / 'config.py'}"]
    command.append("--duplicates")
    options = f"direct_running_mode=multi_processing,direct_num_workers={flags.workers}"
    shutil.rmtree(data / ".imagen_index", ignore_errors=True)
    said, seconds, cpu = timed(command)
    expected = digests(data)
    rows = [("local", seconds, cpu)]
    shutil.rmtree(data / ".imagen_index")
    command.append(f"--beam_options=runner=FnApiRunner,{options}")
    _, seconds, cpu = timed(command, data, kill_at=max(shards // 5, 1))
    left = len(list((data / ".imagen_index" / "shards").glob("*.safetensors")))
    rows.append((f"Beam, a worker killed ({left} of {shards} shards done)", seconds, cpu))
    again, seconds, cpu = timed(command)
    rows.append(("Beam, the command again", seconds, cpu))
    found = digests(data)
    return said, rows, {"index": found == expected, "report": again == said, "files": len(found)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="keep the data there, or use those that are there")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(flags.folder or name)
        folder.mkdir(parents=True, exist_ok=True)
        said, rows, equal = measure(folder, flags)
    print(said)
    print(f"| {flags.samples:,} samples | s | CPU s |\n|---|---|---|")
    for name, seconds, cpu in rows:
        print(f"| {name} | {seconds:,.0f} | {cpu:,.0f} |")
    print(f"{equal['files']} files of the index: {'equal' if equal['index'] else 'DIFFER'}")
    print(f"report: {'equal' if equal['report'] else 'DIFFERS'}")
    timings = {name: [round(seconds), round(cpu)] for name, seconds, cpu in rows}
    print(json.dumps({"benchmark": "data_beam", "samples": flags.samples, **equal, **timings}))


if __name__ == "__main__":
    main()
